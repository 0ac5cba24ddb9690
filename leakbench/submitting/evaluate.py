"""`leakbench evaluate`: an entry's own rows beside those of the baselines, and where it would rank. No torch at import.

What a submitter measures is claimed: it is shown to them, and no board takes it. The project runs the entry itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leakbench.board.defenses import defenses
from leakbench.board.lanes import lanes
from leakbench.entries import Description
from leakbench.errors import UserError
from leakbench.grids import Cell
from leakbench.results import load_rows
from leakbench.runner.session import Report, Request, run_suite
from leakbench.sources import find_source
from leakbench.submitting.check import describe_file, readable


@dataclass(frozen=True)
class Evaluated:
    """An entry among baselines.

    Args:
        entry: What it says of itself.
        suite: The suite.
        out: Folder of its rows.
        table: One line per lane, stage and attack (of an attack), or per task and defense (of a defense); ``own`` marks
            the entry.
        failed: Jobs of the entry that failed, with the error.
        counts: Rows of the entry by status.
    """

    entry: Description
    suite: str
    out: Path
    table: pd.DataFrame
    failed: list[str]
    counts: dict[Any, int]

    def content(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping; the badge is always ``claimed``."""
        return {
            "entry": self.entry.content(),
            "suite": self.suite,
            "rows": str(self.out),
            "badge": "claimed",
            "counts": self.counts,
            "failed": self.failed,
            "table": self.table.astype(object).where(self.table.notna(), None).to_dict("records"),
        }


def evaluate_file(
    ref: str,
    suite: str,
    *,
    trials: int | None = None,
    against: tuple[Path, ...] = (),
    out: Path | None = None,
    isolation: str = "auto",
    workers: int | None = None,
    only_available: bool = False,
) -> Evaluated:
    """Run an entry on a suite and place it among the baselines.

    Args:
        ref: ``FILE`` or ``FILE:CLASS``.
        suite: Suite by name or YAML file.
        trials: Instead of the suite's.
        against: Folders with rows of the baselines; they are run now where there is none.
        out: Folder of the rows; None: ``runs/SUITE-with-NAME``.
        isolation: As of `leakbench run`.
        workers: Jobs at a time.
        only_available: Whether to leave out what lacks its data.

    Raises:
        UserError: The file holds no entry, the suite has nothing for it, or rows cannot be read.
    """
    problem = readable(find_source("attack", ref).path)
    if problem is not None:
        raise UserError(f"{ref}: {problem}")
    _, told = describe_file(ref, isolation)
    if isinstance(told, UserError):
        raise UserError(f"{told}; see: leakbench check {ref}")
    attack = told.kind == "attack"
    place = out or Path("runs") / f"{Path(suite).stem}-with-{told.name}"

    def run(folder: Path, keep: Callable[[Cell], bool], entries: tuple[str, ...] = ()) -> Report:
        return run_suite(
            Request(
                suite=suite,
                attacks=entries if attack else (),
                defenses=() if attack else entries,
                trials=trials,
                out=folder,
                isolation=isolation,
                workers=workers,
                only_available=only_available,
                keep_cell=keep,
                other_code="fresh",
                command=f"leakbench evaluate {ref} --suite {suite}",
            )
        )

    # Attacks are ranked without a defense; a defense is shown beside the suite's, under the suite's attacks.
    def kept(cell: Cell) -> bool:
        return not (attack and cell.defense)

    report = run(place / "entry", kept, (ref,))
    if not against:
        run(place / "baselines", kept)
    own = load_rows(place / "entry")
    others = load_rows(list(against) if against else place / "baselines")
    others = others[others["task_hash"].isin(own["task_hash"]) & others["trial"].isin(own["trial"])]
    if attack:
        others = others[~((others["attack"] == told.name) & (others["attack_source_sha256"] == told.source_sha256))]
    table = _among_attacks(own, others, told) if attack else _among_defenses(own, others, told)
    return Evaluated(told, suite, place / "entry", table, report.failed, own["status"].value_counts().to_dict())


def _among_attacks(own: pd.DataFrame, others: pd.DataFrame, told: Description) -> pd.DataFrame:
    """Return the lanes that the entry ran in."""
    table = lanes(pd.concat([own, others], ignore_index=True))
    table["own"] = (table["attack"] == told.name) & (table["attack_source_sha256"] == told.source_sha256)
    with_it = table.groupby(["lane", "target", "stage"])["own"].transform("any")
    names = ["lane", "target", "stage", "rank_group", "attack_label", "own", "covered", "tasks"]
    return table.loc[with_it, [*names, "mean", "reference", "edge", "edge_low", "edge_high"]].reset_index(drop=True)


def _among_defenses(own: pd.DataFrame, others: pd.DataFrame, told: Description) -> pd.DataFrame:
    """Return, task by task, the worst that the suite's attacks do to the entry and to other defenses."""
    table = defenses(pd.concat([own, others], ignore_index=True))
    table["own"] = (table["defense"] == told.name) & (table["defense_source_sha256"] == told.source_sha256)
    names = ["task", "defense_label", "own", "privacy", "worst_attack", "worst", "ci_low", "ci_high", "undefended"]
    table = table.sort_values(["task", "privacy"], ascending=[True, False], kind="stable")
    return table[[*names, "floor", "unranked_because"]].reset_index(drop=True)


def text(found: Evaluated) -> list[str]:
    """Return the placement as lines."""
    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items())
    lines = [f"{found.entry.kind} {found.entry.name} on {found.suite}: trials {counts}"]
    lines += [f"  failed: {line}" for line in found.failed]
    attack = found.entry.kind == "attack"
    keys = ["lane", "target", "stage"] if attack else ["task"]
    for names, part in found.table.groupby(keys, sort=False):
        lines.append(" / ".join(map(str, names if isinstance(names, tuple) else (names,))))
        for row in part.to_dict("records"):
            mark = ">" if row["own"] else " "
            lines.append(f"{mark} {_attack_line(row) if attack else _defense_line(row)}")
        lines += [_place(row, part) for row in part[part["own"]].to_dict("records") if attack]
    return [*lines, "claimed: measured by you and on no board; the project runs what is submitted itself"]


def _attack_line(row: dict[Any, Any]) -> str:
    if pd.isna(row["rank_group"]):
        return f" -  {row['attack_label']}: not applicable"
    interval = f"{row['edge']:.3g} [{row['edge_low']:.3g}, {row['edge_high']:.3g}]"
    return (
        f"{int(row['rank_group']):>2}  {row['attack_label']}: edge {interval}, {row['covered']} of {row['tasks']} tasks"
    )


def _defense_line(row: dict[Any, Any]) -> str:
    if pd.isna(row["worst"]):
        return f"{row['defense_label']}: {row['unranked_because']}"
    privacy = "-" if pd.isna(row["privacy"]) else f"{row['privacy']:.2f}"
    note = f"; {row['unranked_because']}" if row["unranked_because"] else ""
    return f"{row['defense_label']}: privacy {privacy}, worst {row['worst']:.3g} by {row['worst_attack']}{note}"


def _place(row: dict[Any, Any], part: pd.DataFrame) -> str:
    if pd.isna(row["rank_group"]):
        return "  it ran on no task here; see `needs`, and the rows' errors"
    group, last = int(row["rank_group"]), int(part["rank_group"].max())
    ties = part[(part["rank_group"] == group) & ~part["own"]]["attack_label"].tolist()
    return f"  would be in rank group {group} of {last}" + (f", with {', '.join(ties)}" if ties else "")

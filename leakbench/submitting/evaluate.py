"""`leakbench evaluate`: an entry's own rows beside those of the baselines, and where it would rank. No torch at import.

What a submitter measures is claimed: it is shown to them, and no board takes it. The project runs the entry itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leakbench.board.defenses import defenses
from leakbench.board.lanes import LANE_KEYS, lanes
from leakbench.board.stats import MIN_PAIRS
from leakbench.entries import Description
from leakbench.errors import UserError
from leakbench.grids import Cell
from leakbench.results import FAILURES, latest_rows, load_rows, read_files
from leakbench.runner.session import Request, planned_jobs, run_suite
from leakbench.sources import find_source
from leakbench.store import result_folders
from leakbench.submitting.check import describe_file, readable


@dataclass(frozen=True)
class Evaluated:
    """An entry among baselines.

    Args:
        entry: What it says of itself.
        suite: The suite.
        out: Folder of its rows.
        table: One line per lane, stage and attack (of an attack), or per task and defense (of a defense); ``own`` marks
            the entry, ``label`` tells the versions of a name apart.
        failed: What failed of the entry, with the error.
        counts: Rows of the entry by status.
        compared: Rows of the baselines on the same victims.
    """

    entry: Description
    suite: str
    out: Path
    table: pd.DataFrame
    failed: list[str]
    counts: dict[Any, int]
    compared: int

    def content(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping; the badge is always ``claimed``."""
        return {
            "entry": self.entry.content(),
            "suite": self.suite,
            "rows": str(self.out),
            "badge": "claimed",
            "counts": self.counts,
            "compared": self.compared,
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
    others = load_rows(result_folders(against)) if against else None

    given = [] if trials is None else ["--trials", str(trials)]
    given += [word for folder in against for word in ("--against", str(folder))]
    given += [] if out is None else ["--out", str(out)]
    given += ["--only-available"] if only_available else []

    def run(folder: Path, keep: Callable[[Cell], bool], entries: tuple[str, ...] = ()) -> None:
        run_suite(
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
                command=shlex.join(["leakbench", "evaluate", ref, "--suite", suite, *given]),
            )
        )

    # Attacks are ranked without a defense; a defense is shown beside the suite's, under the suite's attacks.
    def kept(cell: Cell) -> bool:
        return not (attack and cell.defense)

    run(place / "entry", kept, (ref,))
    own = _planned_rows(place / "entry")
    if others is None:
        tasks = set(own["task_hash"])
        run(place / "baselines", lambda cell: kept(cell) and cell.task.hash in tasks)
        others = _planned_rows(place / "baselines")
    victims = ["season_commitment", "task_hash", "trial"]
    others = others.merge(own[victims].drop_duplicates(), on=victims)
    kind = told.kind
    if attack:
        others = others[others["defense"] == "none"]
    others = others[~((others[kind] == told.name) & (others[f"{kind}_source_sha256"] == told.source_sha256))]
    table = _among_attacks(own, others, told) if attack else _among_defenses(own, others, told)
    counts = own["status"].value_counts().to_dict()
    return Evaluated(told, suite, place / "entry", _labelled(table, told.kind), _failed(own), counts, len(others))


def _planned_rows(folder: Path) -> pd.DataFrame:
    """Return the rows of the last plan: beside them may lie those of an earlier edit of the file, or of more trials."""
    rows = read_files([folder], "run")
    return latest_rows(rows[rows["job_id"].isin(planned_jobs(folder))])


def _failed(own: pd.DataFrame) -> list[str]:
    """Return a line per task and reason, of what failed now or in an earlier run of the same file."""
    bad = own[own["status"].isin(FAILURES)]
    keys = ["task", "attack_label", "defense_label", "status", "error"]
    return [
        f"{task} / {attack} / {defense}: {len(part)} {status}: {error}"
        for (task, attack, defense, status, error), part in bad.groupby(keys, sort=False, dropna=False)
    ]


def _among_attacks(own: pd.DataFrame, others: pd.DataFrame, told: Description) -> pd.DataFrame:
    """Return the lanes that the entry ran in."""
    # Boards are of one suite; whoever names rows of another to compare with means those tasks that both have.
    table = lanes(pd.concat([own, others.assign(suite=own["suite"].iloc[0])], ignore_index=True))
    table["own"] = (table["attack"] == told.name) & (table["attack_source_sha256"] == told.source_sha256)
    with_it = table.groupby(list(LANE_KEYS))["own"].transform("any")
    names = [*LANE_KEYS, "rank_group", "attack_label", "attack_version", "own", "covered", "tasks"]
    return table.loc[with_it, [*names, "mean", "reference", "edge", "edge_low", "edge_high"]].reset_index(drop=True)


def _among_defenses(own: pd.DataFrame, others: pd.DataFrame, told: Description) -> pd.DataFrame:
    """Return, task by task, the worst that the suite's attacks do to the entry and to other defenses."""
    table = defenses(pd.concat([own, others], ignore_index=True))
    table["own"] = (table["defense"] == told.name) & (table["defense_source_sha256"] == told.source_sha256)
    names = ["task", "defense_label", "defense_version", "own", "role", "privacy", "worst_attack", "worst"]
    table = table.sort_values(["task", "privacy"], ascending=[True, False], kind="stable")
    return table[[*names, "ci_low", "ci_high", "undefended", "floor", "unranked_because"]].reset_index(drop=True)


def _labelled(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Add ``label``: with the version where a table has several of that name."""
    shown = table[f"{kind}_label"].astype(str)
    several = table.groupby(f"{kind}_label")[f"{kind}_version"].transform("size") > table.groupby(
        [f"{kind}_label", f"{kind}_version"]
    )[f"{kind}_version"].transform("size")
    return table.assign(label=shown.where(~several, shown + " v" + table[f"{kind}_version"].astype(str)))


def text(found: Evaluated) -> list[str]:
    """Return the placement as lines."""
    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items())
    lines = [f"{found.entry.kind} {found.entry.name} on {found.suite}: trials {counts}"]
    lines += [f"  failed: {line}" for line in found.failed]
    attack = found.entry.kind == "attack"
    keys = list(LANE_KEYS) if attack else ["task"]
    for _, part in found.table.groupby(keys, sort=False, dropna=False):
        first = part.iloc[0]
        names = [first["lane"], first["target"], first["stage"]] if attack else [first["task"]]
        shown = " / ".join(map(str, names))
        lines.append(f"{shown} (demonstration)" if attack and first["demonstration"] else shown)
        for row in part.to_dict("records"):
            mark = ">" if row["own"] else " "
            lines.append(f"{mark} {_attack_line(row) if attack else _defense_line(row)}")
        lines += [_place(row, part) for row in part[part["own"]].to_dict("records") if attack]
    if not found.table["own"].any():
        lines.append(
            f"  on no board here: none of its {sum(found.counts.values())} rows has a lane or could be measured"
        )
    if not found.compared:
        lines.append("nothing to compare with: no row of the baselines is of these tasks, trials and season")
    if not attack:
        named = ", ".join(found.entry.adaptive) or "none"
        lines.append(
            f"to be ranked it has to face the attacks that it names in `adaptive` ({named}; `--suite defenses_quick` "
            "runs them), and they have to know it: whether they read the defense is not tested here but in review"
        )
    return [*lines, "claimed: measured by you and on no board; the project runs what is submitted itself"]


def _attack_line(row: dict[Any, Any]) -> str:
    if not row["covered"]:
        return f" -  {row['label']}: no result on any task"
    group = " -" if pd.isna(row["rank_group"]) else f"{int(row['rank_group']):>2}"
    ends = "" if pd.isna(row["edge_low"]) else f" [{row['edge_low']:.3g}, {row['edge_high']:.3g}]"
    return f"{group}  {row['label']}: edge {row['edge']:.3g}{ends}, {row['covered']} of {row['tasks']} tasks"


def _defense_line(row: dict[Any, Any]) -> str:
    why = row["unranked_because"]
    if pd.isna(row["worst"]):
        return f"{row['label']}: {why}"
    privacy = "-" if pd.isna(row["privacy"]) else f"{row['privacy']:.2f}"
    note = f"; not ranked: {why}" if isinstance(why, str) else ""
    return f"{row['label']}: privacy {privacy}, worst {row['worst']:.3g} by {row['worst_attack']}{note}"


def _place(row: dict[Any, Any], part: pd.DataFrame) -> str:
    if not row["covered"]:
        return "  it came to a result on no task here; see `needs`, and the rows' errors"
    if pd.isna(row["rank_group"]):
        half = 2 * row["covered"] < row["tasks"]
        return "  not ranked: " + ("fewer than half of the tasks" if half else f"fewer than {MIN_PAIRS} victims")
    group, last = int(row["rank_group"]), int(part["rank_group"].max())
    ties = part[(part["rank_group"] == group) & ~part["own"]]["label"].tolist()
    return f"  would be in rank group {group} of {last}" + (f", with {', '.join(ties)}" if ties else "")

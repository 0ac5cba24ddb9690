"""One page per attack and per defense, and the list of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from leakbench.board.columns import DEMONSTRATION_DATASETS
from leakbench.board.score import group_ids
from leakbench.site.citing import bibtex_of
from leakbench.site.data import Data, attack_page, defense_page, slug
from leakbench.site.page import Page
from leakbench.site.pages.boards import BOARDS, lane_anchor, lane_title
from leakbench.site.pages.defenses import TRAININGS
from leakbench.site.pages.tasks import cell_table
from leakbench.site.table import Column, Line, Table, Value, number, whole
from leakbench.sources import Kind

_SHOWN = ("version", "needs", "recovers", "reads", "inserts", "acts_on", "strength", "draws", "adaptive", "params")

_ELSEWHERE = "What attacks reach without a defense is on the boards, and on the pages of attacks and tasks."
_BARE = [(board.path, board.title) for board in BOARDS]


def pages(data: Data) -> Iterator[Page]:
    """Yield the list, every attack and every defense."""
    board = data.board
    yield _list(data)
    for name, cells in board.groupby("attack", sort=True):
        yield Page(attack_page(str(name)), str(name), context=_context(data, "attack", str(name), cells))
    for name, cells in board.groupby("defense", sort=True):
        if name == "none":
            context = {"kicker": "defense", "tables": [*_trainings(data, "none")], "links": _BARE, "empty": _ELSEWHERE}
            yield Page(defense_page("none"), "no defense", context=context)
        else:
            yield Page(defense_page(str(name)), str(name), context=_context(data, "defense", str(name), cells))


def _list(data: Data) -> Page:
    tables = []
    kinds: tuple[tuple[Kind, Callable[[str], str]], ...] = (("attack", attack_page), ("defense", defense_page))
    for kind, page in kinds:
        lines = []
        for name, cells in data.board.groupby(kind, sort=True):
            told = data.descriptions.get((kind, str(name)), {})
            values = [
                Value(str(name), href=page(str(name))),
                Value(str(told.get("summary", ""))),
                whole(cells["task_hash"].nunique(), page(str(name))),
                whole(len(cells), page(str(name))),
            ]
            lines.append(Line(values, slug(str(name))))
        columns = [Column(kind), Column("what it does"), Column("tasks", True), Column("cells", True)]
        tables.append(Table(f"{kind}s", f"{kind.capitalize()}s with rows", columns, lines))
    return Page("entries.html", "Attacks and defenses", context={"tables": tables})


def _context(data: Data, kind: Kind, name: str, cells: pd.DataFrame) -> dict[str, Any]:
    told = data.descriptions.get((kind, name))
    hashes = sorted(set(cells[f"{kind}_source_sha256"].dropna()))
    facts: list[tuple[str, str, str]] = [("source of the rows", ", ".join(h[:16] for h in hashes) or "–", "sha256")]
    intro, text, reference = [], "", ""
    if told:
        facts += [(key, _plain(told.get(key)), "") for key in _SHOWN if told.get(key) not in (None, (), [], {}, "")]
        intro, text = [str(told["summary"])], str(told["doc"]).partition("\n")[2].partition("\nReference:")[0].strip()
        reference = str(told.get("reference", ""))
        if hashes and told["source_sha256"] not in hashes:
            intro.append("The source at hand is newer than that of the rows: what it says of itself may differ.")
    code = _code(data, kind, name) if told else None
    if kind == "attack":
        tables = [*_by_lane(cells), *_defended(cells)]
    else:
        tables = [*_of_defense(cells), *_trainings(data, name)]
    return {
        "kicker": kind,
        "intro": intro,
        "text": text,
        "reference": reference,
        "bibtex": bibtex_of(kind, name, reference),
        "code": code,
        "facts": facts,
        "tables": tables,
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _code(data: Data, kind: Kind, name: str) -> str | None:
    repository = data.options.repository
    if repository is None or not repository.startswith("https://"):
        return None
    shas = data.rows.loc[data.rows[kind] == name, "git_sha"].dropna()
    return f"{repository.rstrip('/')}/blob/{shas.iloc[-1] if len(shas) else 'main'}/baselines/{kind}s/{name}.py"


def _by_lane(cells: pd.DataFrame) -> Iterator[Table]:
    own = cells[cells["defense"] == "none"]
    own = own.assign(demonstration=own["dataset"].isin(list(DEMONSTRATION_DATASETS)))
    keys = ("season", "benchmark_version", "lane", "target", "stage", "demonstration")
    for _, part in own.groupby(group_ids(own, keys), sort=False):
        line = part.iloc[0]
        if pd.isna(line["lane"]):
            anchor = slug(f"other-{line['season']}-{line['target']}-{line['stage']}-{line['demonstration']}")
            title = f"no lane, {line['target']}, stage {line['stage']}"
        else:
            anchor, title = lane_anchor(line), lane_title(line)
        yield cell_table(part, anchor, by="task", caption=f"Undefended: {title}")


def _defended(cells: pd.DataFrame) -> Iterator[Table]:
    own = cells[cells["defense"] != "none"]
    for (_, target), part in own.groupby(["defense_label", "target"], sort=True):
        label = part["defense_label"].iloc[0]
        yield cell_table(part, defended_anchor(label, str(target)), by="task", caption=f"Against {label}: {target}")


def defended_anchor(label: str, target: str) -> str:
    """Return where on an attack's page its cells against a defense are."""
    return "vs-" + slug(f"{label}-{target}")


def _of_defense(cells: pd.DataFrame) -> Iterator[Table]:
    for (label, target), part in cells.groupby(["defense_label", "target"], sort=True):
        caption = f"Every attack on {label}: {target}" if label != "none" else f"Every attack, undefended: {target}"
        yield cell_table(part, slug(f"{label}-{target}"), by="both", caption=caption)


def _trainings(data: Data, name: str) -> Iterator[Table]:
    """Yield the federated trainings with a defense, at the learning rate that it chose."""
    if data.trained is None or not (own := data.trained[data.trained["defense"] == name]).size:
        return
    lines = []
    for line in own.sort_values(["defense_label", "dataset", "partition", "seed"]).to_dict("records"):
        command = f"leakbench utility {line['suite'] or 'SUITE'}"
        values = [
            Value(line["defense_label"]), Value(line["dataset"]), Value(line["architecture"]), Value(line["partition"]),
            whole(line["seed"]), Value(f"{line['lr']:g}", line["lr"]), Value(line["status"]),
            number(100 * line["accuracy"], 1), number(line["drop"], 2), number(line["client_time_ratio"], 2),
            number(line["upload_ratio"], 3), Value(line["job_id"][:16]), Value(command, style="wide"),
            Value(str(line["error"] or line["utility_note"] or "")),
        ]  # fmt: skip
        lines.append(Line(values, line["job_id"]))
    columns = [
        Column("defense", choose=True), Column("dataset", choose=True), Column("net", choose=True),
        Column("partition", choose=True), Column("seed", True), Column("learning rate", True, note="chosen"),
        Column("status", choose=True), Column("accuracy", True, note="%, higher is better"),
        Column("accuracy lost", True, note="points, against the same seed undefended"),
        Column("client time", True, note="times undefended"), Column("upload", True, note="times undefended"),
        Column("job"), Column("made by"), Column("note"),
    ]  # fmt: skip
    caption = "Federated trainings from scratch with it, one line per seed"
    yield Table(TRAININGS, caption, columns, lines, compare=True)

"""One page per task: its definition, hash and version, and every attack on it, defense by defense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from leakbench.board.columns import TASK_KEYS
from leakbench.board.score import group_ids
from leakbench.metrics import METRICS, headline, metric_target
from leakbench.schema import ROW_FIELDS
from leakbench.site.data import Data, attack_page, cell_page, defense_page, task_page
from leakbench.site.page import Page
from leakbench.site.table import Column, Line, Table, Value, digits, interval, number, places, rank

_NAMES = [field.name for field in ROW_FIELDS]
DEFINITION = ROW_FIELDS[_NAMES.index("suite") : _NAMES.index("attack")]
"""The columns that define a task, with their meaning."""

_FEW = {
    "labels": ("count_exact_match", "presence_f1"),
    "inputs": ("ssim", "recovered"),
    "inference": ("auc", "tpr_at_1pct_fpr", "inference_bits"),
}


def pages(data: Data) -> Iterator[Page]:
    """Yield a page per task."""
    places_ = data.rows.drop_duplicates("task_hash").set_index("task_hash", drop=False)
    defenses = data.board
    for task_hash, cells in defenses.groupby("task_hash", sort=True):
        first = places_.loc[task_hash]
        facts = [(field.name, _text(first[field.name]), field.doc) for field in DEFINITION]
        tables = []
        parts = cells.groupby(group_ids(cells, (*TASK_KEYS, "defense_label")), sort=False)
        for i, (_, part) in enumerate(sorted(parts, key=lambda item: (item[1]["defense"].iloc[0] != "none", item[0]))):
            tables.append(cell_table(part, f"t{i}", by="attack"))
        yield Page(
            task_page(str(first["task"]), str(task_hash)),
            str(first["task"]),
            context={"facts": facts, "tables": tables, "kicker": "task"},
        )


def _text(value: Any) -> str:
    return "–" if pd.isna(value) else str(value)


def cell_table(part: pd.DataFrame, name: str, *, by: str, caption: str | None = None, compare: bool = True) -> Table:
    """Return cells as a table.

    Args:
        part: Lines of the board of one target.
        name: Of the table.
        by: ``attack`` for attacks on one task and defense, ``task`` for tasks of one attack, ``both`` for both.
        caption: What it shows.
        compare: Whether lines can be put side by side.
    """
    first = part.iloc[0]
    target = str(first["target"])
    spec, decimals = headline(target), places(target)
    few = _FEW[metric_target(target)]
    columns = [
        *([Column("attack")] if by != "task" else []),
        *([Column("task"), Column("dataset", choose=True)] if by != "attack" else []),
        *([Column("defense", choose=True)] if by == "task" else []),
        Column(spec.name.replace("_", " "), True, note=f"{'share' if spec.unit == '1' else spec.unit}, [95%]"),
        Column("floor" if target == "inputs" else "chance", True),
        Column("gain" if target == "inputs" else "advantage", True, note="[95%]"),
        Column("group", True, note="1 is best"),
        *(Column(key.replace("_", " "), True, note=_direction(key)) for key in few),
        Column("trials", True, note="succeeded of all"),
        Column("seconds", True, note="per trial"),
        Column("badge", choose=True),
    ]
    lines = []
    for line in part.to_dict("records"):
        here = cell_page(line["id"])
        edge = "gain" if target == "inputs" else "advantage"
        values = [
            *([Value(line["attack_label"], href=attack_page(line["attack"]))] if by != "task" else []),
            *(
                [
                    Value(line["task"], href=task_page(line["task"], line["task_hash"]), style="wide"),
                    Value(line["dataset"]),
                ]
                if by != "attack"
                else []
            ),
            *([Value(line["defense_label"], href=defense_page(line["defense"]))] if by == "task" else []),
            interval(line["mean"], line["ci_low"], line["ci_high"], decimals, here),
            number(line["reference"], decimals, here),
            interval(line[edge], line[f"{edge}_low"], line[f"{edge}_high"], decimals, here),
            rank(line, here),
            *(number(line[key], 2, here) for key in few),
            Value(_trials(line), float(line["ok"]), here),
            Value("–" if pd.isna(line["seconds"]) else f"{line['seconds']:.3g}", line["seconds"], here),
            Value(line["badge"], href=here),
        ]
        lines.append(Line(values, line["id"], 0 if pd.isna(line["rank_group"]) else int(line["rank_group"])))
    notes = []
    if by == "attack":
        if pd.notna(first["detectable"]):
            notes.append(
                f"Minimum detectable difference between two attacks here: {digits(first['detectable'], decimals)} "
                "(80% power, 5% level)."
            )
        notes += [f"Note on the defense: {note}." for note in part["defense_note"].dropna().unique()]
        if not part["ranked"].any():
            notes.append("Not a record: a development season, a demonstration dataset, or no lane.")
        defense = first["defense_label"]
        caption = "No defense" if first["defense"] == "none" else f"Against {defense}"
        caption += f" (season {first['season']}, weights {first['checkpoint']})"
    return Table(name, caption or "Cells", columns, lines, notes, compare)


def _direction(key: str) -> str:
    if key not in METRICS:
        return "higher is better"
    return "higher is better" if METRICS[key].higher_is_better else "lower is better"


def _trials(line: Any) -> str:
    return f"{line['ok']}/{line['n']}" if line["n"] else "not applicable" if line["not_applicable"] else "unavailable"

"""The board of defenses: on every task the worst attack, and what it leaves of the undefended leakage.

Where defended federations were trained, privacy against the accuracy that it costs stands above. A table is a function
from data to tables, listed in `TABLES`: a new one is a new entry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import pandas as pd

from leakbench.board.defenses import TABLE_KEYS, defenses
from leakbench.board.pareto import chosen
from leakbench.board.score import group_ids
from leakbench.errors import UserError
from leakbench.site.charts import MOST_SERIES, Point, curves
from leakbench.site.checking import LANE_TITLES
from leakbench.site.data import Data, cell_page, defense_page, slug, task_page
from leakbench.site.page import Page
from leakbench.site.table import Chart, Column, Line, Table, Value, interval, number, places, whole


def worst_case(data: Data) -> Iterator[Table]:
    """Yield a table per target: every defense on every task under the worst attack."""
    board = data.board
    found = defenses(data.rows)
    found = found[found["role"] == "defense"]
    cells = {
        (line["task_hash"], line["checkpoint"], line["season"], line["defense_label"], line["attack_label"]): line["id"]
        for line in board.to_dict("records")
    }
    for _, part in found.groupby(group_ids(found, ("target",)), sort=True):
        lines = []
        target = str(part["target"].iloc[0])
        for line in part.to_dict("records"):
            key = (line["task_hash"], line["checkpoint"], line["season"], line["defense_label"], line["worst_attack"])
            here = cell_page(cells[key]) if key in cells else None
            why = "" if pd.isna(line["unranked_because"]) else str(line["unranked_because"])
            values = [
                Value(line["defense_label"], href=defense_page(line["defense"])),
                Value(line["task"], href=task_page(line["task"], line["task_hash"]), style="wide"),
                Value(line["dataset"]),
                number(line["privacy"], 2, here),
                interval(line["worst"], line["ci_low"], line["ci_high"], places(target), here),
                number(line["floor"], places(target), here),
                number(line["undefended"], places(target), task_page(line["task"], line["task_hash"])),
                Value("–" if pd.isna(line["worst_attack"]) else line["worst_attack"], href=here),
                whole(line["attacks"], here),
                Value(why if len(why) <= 90 else f"{why[:89]}…", style="wide"),
            ]
            lines.append(Line(values, slug(f"{line['defense_label']} {line['task_hash'][:8]}")))
        columns = [
            Column("defense", choose=True), Column("task"), Column("dataset", choose=True),
            Column("privacy", True, note="0 undefended, 1 nothing leaks"),
            Column("worst attack reaches", True, note="lower is better, [95%]"),
            Column("floor" if target == "inputs" else "chance", True), Column("undefended", True),
            Column("worst attack", choose=True), Column("attacks", True), Column("not ranked because"),
        ]  # fmt: skip
        notes = [
            "Privacy is how far the worst attack falls from the undefended level towards chance or floor. A defense is "
            "left unranked, with the reason, where an attack on it failed or was not run."
        ]
        yield Table(
            f"worst-{target}", f"Defenses under the worst attack: {target}", columns, lines, notes, compare=True
        )


def privacy_utility(data: Data) -> Iterator[Table]:
    """Yield a table with its chart per lane, target and dataset on which defended federations were trained."""
    if data.trained is not None:
        from leakbench.board.defense_view import read

        yield from against_cost(read(data.folders)["settings"], set(data.trained["defense_label"]))


def against_cost(settings: pd.DataFrame, trained: Collection[str] = ()) -> Iterator[Table]:
    """Yield privacy against lost accuracy.

    Args:
        settings: What `leakbench.board.curves.settings_frame` returns.
        trained: Labels of the defenses whose pages list their trainings.
    """
    try:
        drawn = chosen(settings)
    except UserError:
        return  # attacked or trained, and none of them both
    for _, part in drawn.groupby("panel", sort=True):
        first = part.iloc[0]
        lane = "no lane" if pd.isna(first["lane"]) else LANE_TITLES.get(first["lane"], first["lane"])
        title = f"Privacy against accuracy: {lane}, {first['target']}, {first['dataset']}"
        series = [
            (
                str(own["curve"].iloc[0]),
                [
                    Point(
                        line["drop"], line["privacy"], line["privacy_low"], line["privacy_high"], line["defense_label"]
                    )
                    for line in own.sort_values("drop").to_dict("records")
                ],
            )
            for _, own in part.groupby("line", sort=True)
        ]
        name = slug("-".join(["cost", *(str(first[key])[:40] for key in TABLE_KEYS)]))
        axes = ("points of accuracy lost", "privacy")
        svg = curves(f"{name}-chart", title, axes, series[:MOST_SERIES], zero=True, origin=True, top=1.0)
        left = [label for label, _ in series[MOST_SERIES:]]
        text = "Privacy with its 95% interval against the accuracy that it costs: further up and left is better. "
        text += "Strengths of one defense are joined."
        text += f" Only in the table: {', '.join(left)}." if left else ""
        lines = []
        for line in part.to_dict("records"):
            here = defense_page(line["defense"])
            accuracy = f"{here}#{TRAININGS}" if line["defense_label"] in trained else None
            values = [
                Value(line["defense_label"], href=here),
                interval(line["privacy"], line["privacy_low"], line["privacy_high"], 2, here),
                interval(line["drop"], line["drop_low"], line["drop_high"], 2, accuracy),
                number(line["worst_task_privacy"], 2, here),
                Value("–" if pd.isna(line["worst_attack"]) else str(line["worst_attack"])),
                whole(line["tasks"], here),
                Value("" if pd.isna(line["unranked_because"]) else str(line["unranked_because"]), style="wide"),
            ]
            lines.append(Line(values, slug(str(line["defense_label"]))))
        columns = [
            Column("defense"), Column("privacy", True, note="1 nothing leaks, [95%]"),
            Column("accuracy lost", True, note="points, lower is better, [95%]"),
            Column("worst task", True, note="privacy there"), Column("worst attack there"), Column("tasks", True),
            Column("not ranked because"),
        ]  # fmt: skip
        yield Table(name, title, columns, lines, compare=True, charts=[Chart(svg, text)])


TRAININGS = "trainings"
"""Where on a defense's page its federated trainings are."""


TABLES: tuple[Callable[[Data], Iterator[Table]], ...] = (privacy_utility, worst_case)
"""What the page shows, in order."""


def pages(data: Data) -> Iterator[Page]:
    """Yield the board of defenses."""
    tables = [table for produce in TABLES for table in produce(data)]
    intro = ["A defense is as good as it is under the worst attack on it, with everything but its randomness known."]
    context = {"intro": intro, "tables": tables, "empty": "No rows of defended updates yet."}
    yield Page("defenses.html", "Defenses", context=context)

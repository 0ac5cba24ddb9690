"""The board of defenses: on every task the worst attack, and what it leaves of the undefended leakage.

A table is a module-level function from data to tables, listed in `TABLES`: a new one, such as privacy against the
accuracy it costs, is a new entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from leakbench.board.score import defense_worst_case, group_ids
from leakbench.site.data import Data, cell_page, defense_page, slug, task_page
from leakbench.site.page import Page
from leakbench.site.table import Column, Line, Table, Value, interval, number, places, whole


def worst_case(data: Data) -> Iterator[Table]:
    """Yield a table per target: every defense on every task under the worst attack."""
    board = data.board
    found = defense_worst_case(board)
    found = found[found["defense"] != "none"]
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
                Value(line["task"], href=task_page(line["task"], line["task_hash"])),
                Value(line["dataset"]),
                number(line["privacy"], 2, here),
                interval(line["worst"], line["ci_low"], line["ci_high"], places(target), here),
                number(line["reference"], places(target), here),
                number(line["undefended"], places(target), task_page(line["task"], line["task_hash"])),
                Value("–" if pd.isna(line["worst_attack"]) else line["worst_attack"], href=here),
                whole(line["attacks"], here),
                Value(why if len(why) <= 90 else f"{why[:89]}…"),
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


TABLES: tuple[Callable[[Data], Iterator[Table]], ...] = (worst_case,)
"""What the page shows, in order."""


def pages(data: Data) -> Iterator[Page]:
    """Yield the board of defenses."""
    tables = [table for produce in TABLES for table in produce(data)]
    intro = ["A defense is as good as it is under the worst attack on it, with everything but its randomness known."]
    context = {"intro": intro, "tables": tables, "empty": "No rows of defended updates yet."}
    yield Page("defenses.html", "Defenses", context=context)

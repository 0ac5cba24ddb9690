"""Attacks against defenses: mean over tasks of how far each attack gets, as a table whose places are shaded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from leakbench.site.data import Data, attack_page, defense_page, slug
from leakbench.site.page import Page
from leakbench.site.pages.entries import defended_anchor
from leakbench.site.table import Column, Line, Table, Value

SHADES = 9
"""Steps of shading."""


def pages(data: Data) -> Iterator[Page]:
    """Yield the heat map."""
    tables = list(_tables(data.board))
    intro = [
        "Every place is a mean over the tasks on which both were run, of the share of the way from chance (0) to "
        "everything (1); for images, of the gain over the floor in dB. Darker leaks more. A dash: never run together."
    ]
    context = {"intro": intro, "tables": tables, "empty": "No rows of defended updates yet."}
    yield Page("heatmap.html", "Attacks against defenses", "heatmap.html", context)


def _tables(board: pd.DataFrame) -> Iterator[Table]:
    board = board[board["n"] > 0]
    for target, part in board.groupby("target", sort=True):
        if part["defense"].nunique() < 2:
            continue
        edge = part["gain" if target == "inputs" else "advantage"]
        means = part.assign(edge=edge).groupby(["attack_label", "defense_label"])["edge"].mean().unstack()
        names = {kind: part.groupby(f"{kind}_label")[kind].first() for kind in ("attack", "defense")}
        order = means.max(axis=1).sort_values(ascending=False, kind="stable").index
        defenses = sorted(means.columns, key=lambda label: (names["defense"][label] != "none", label))
        top = float(np.nanmax(means.to_numpy())) or 1.0
        lines = []
        for attack in order:
            values = [Value(attack, href=attack_page(names["attack"][attack]))]
            for defense in defenses:
                value = means.loc[attack, defense]
                anchor = "" if names["defense"][defense] == "none" else f"#{defended_anchor(defense, str(target))}"
                if pd.isna(value):
                    values.append(Value("–"))
                    continue
                shade = int(np.clip(round(SHADES * value / top), 0, SHADES)) if top > 0 else 0
                page = f"{attack_page(names['attack'][attack])}{anchor}"
                values.append(Value(f"{value:z.{1 if target == 'inputs' else 2}f}", float(value), page, f"h{shade}"))
            lines.append(Line(values, slug(attack)))
        columns = [Column("attack"), *(Column("none" if d == "none" else d, True) for d in defenses)]
        links = {str(d): defense_page(names["defense"][d]) for d in defenses}
        notes = ["Columns are defenses: " + ", ".join(links)] if len(links) > 12 else []
        unit = "gain, dB" if target == "inputs" else "advantage"
        yield Table(f"heat-{target}", f"{target}: {unit}", columns, lines, notes, compare=False)

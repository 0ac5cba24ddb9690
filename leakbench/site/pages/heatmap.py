"""Attacks against defenses: mean over tasks of how far each attack gets, as a table whose places are shaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from leakbench.site.data import Data, attack_page, slug
from leakbench.site.page import Page
from leakbench.site.pages.entries import defended_anchor
from leakbench.site.table import Column, Line, Table, Value, digits, places

SHADES = 9
"""Steps of shading."""


def pages(data: Data) -> Iterator[Page]:
    """Yield the heat map."""
    tables = list(_tables(data.board, _suites(data.rows)))
    intro = [
        "Every place is a mean over tasks of the share of the way from chance (0) to everything (1), at least -1; for "
        "images, of the gain over the floor in dB. Below a defended mean is that of the same attack without a defense "
        "on the same tasks: compare these two, since other places are of other tasks. Darker leaks more, paler is of "
        "one task only. A dash: never run together."
    ]
    context = {"intro": intro, "tables": tables, "empty": "No rows of defended updates yet."}
    yield Page("heatmap.html", "Attacks against defenses", "heatmap.html", context)


def _paired(part: pd.DataFrame) -> pd.DataFrame:
    """Return cells without those of an attack on tasks on which it was not run undefended, if it was on others."""
    bare = part[part["defense"] == "none"]
    tasks = set(zip(bare["attack_label"], bare["task_hash"], strict=True))
    known = [pair in tasks for pair in zip(part["attack_label"], part["task_hash"], strict=True)]
    return part[pd.Series(known, index=part.index) | ~part["attack_label"].isin(bare["attack_label"])]


def _suites(rows: pd.DataFrame) -> dict[str, frozenset[str]]:
    """Return the tasks of every suite."""
    known = rows[["suite", "task_hash"]].drop_duplicates().astype(str)
    return {str(suite): frozenset(own) for suite, own in known.groupby("suite", sort=True)["task_hash"]}


def _tables(board: pd.DataFrame, suites: Mapping[str, frozenset[str]]) -> Iterator[Table]:
    for suite, tasks in suites.items():
        yield from _of_suite(board[(board["n"] > 0) & board["task_hash"].isin(tasks)], suite)


def _of_suite(board: pd.DataFrame, suite: str) -> Iterator[Table]:
    # Of one suite, stage and season only: means over unlike tasks would compare tasks and not defenses.
    for (target, season, stage), part in board.groupby(["target", "season", "stage"], sort=True, observed=True):
        if part["defense"].nunique() < 2:
            continue
        part = _paired(part).assign(edge=part["gain"] if target == "inputs" else part["advantage"].clip(lower=-1))
        by_task = part.groupby(["attack_label", "defense_label", "task_hash"])["edge"].mean()
        bare = part[part["defense"] == "none"].groupby(["attack_label", "task_hash"])["edge"].mean()
        groups = by_task.groupby(level=[0, 1])
        means, counts = groups.mean().unstack(), groups.size().unstack()
        names = {kind: part.groupby(f"{kind}_label")[kind].first() for kind in ("attack", "defense")}
        order = means.max(axis=1).sort_values(ascending=False, kind="stable").index
        defenses = sorted(means.columns, key=lambda label: (names["defense"][label] != "none", label))
        top = float(np.nanmax(means.to_numpy())) or 1.0
        lines, decimals = [], places(str(target))
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
                tasks = int(counts.loc[attack, defense])
                shade = -(-shade // 2) if tasks == 1 else shade
                extra, parts = f"({tasks} task{'s' if tasks > 1 else ''})", {"tasks": float(tasks)}
                if names["defense"][defense] != "none":
                    level = bare.reindex([(attack, task) for task in by_task[attack, defense].index]).mean()
                    extra = f"undefended {digits(level, decimals)} {extra}"
                    parts |= {"undefended": float(level)} if pd.notna(level) else {}
                values.append(Value(digits(value, decimals), float(value), page, f"h{shade}", extra, parts))
            lines.append(Line(values, slug(attack)))
        columns = [Column("attack"), *(Column("none" if d == "none" else d, True) for d in defenses)]
        unit = "gain, dB" if target == "inputs" else "advantage"
        caption = f"{target}, stage {stage}{f', suite {suite}' if suite else ''}: {unit} (season {season})"
        yield Table(slug(f"heat-{target}-{season}-{stage}-{suite}"), caption, columns, lines)

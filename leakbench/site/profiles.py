"""Performance profiles: of every attack of a lane, on what share of the tasks it comes how close to the best attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from leakbench.board.lanes import LaneTable
from leakbench.board.ranks import profiles
from leakbench.site.charts import MOST_SERIES, Point, curves
from leakbench.site.table import Chart

FEWEST = 3
"""Fewest tasks of a lane that are worth a profile."""

MARKS = 5
"""Marks on the line of an attack, at round parts of the greatest distance."""


def edges(board: pd.DataFrame, found: LaneTable) -> pd.DataFrame:
    """Return the edge of every attack on every task of a lane, as its table counts them.

    Args:
        board: A line per cell, as `leakbench.site.data.Data.board`.
        found: The lane's table.

    Returns:
        A line per task, a column per attack with its parameters, version and source, the best first; 0 (chance, the
        floor) where an attack did not run.
    """
    first = found.lines[0]
    own = board[(board["defense"] == "none") & (board["n"] > 0) & board["task_hash"].isin(found.tasks)]
    for key in ("season", "season_commitment", "benchmark_version"):
        own = own[own[key] == first[key]]
    edge = own["gain"] if first["target"] == "inputs" else own["advantage"].clip(lower=-1)
    keys = ["attack_label", "attack_version", "attack_source_sha256"]
    table = own.assign(edge=edge).pivot_table(index="task_hash", columns=keys, values="edge")
    named = [tuple(line[key] for key in keys) for line in found.lines]
    filled: pd.DataFrame = table[[key for key in dict.fromkeys(named) if key in table.columns]].fillna(0.0)
    return filled


def profile(name: str, board: pd.DataFrame, found: LaneTable, unit: str) -> Chart | None:
    """Return the profiles of the first attacks of a lane; None where there are too few tasks or attacks.

    Args:
        name: Unique in the page.
        board: See `edges`.
        found: The lane's table.
        unit: What edges are measured in.
    """
    scores = edges(board, found)
    lines = [line for line in found.lines if line["covered"]]
    if len(scores) < FEWEST or len(lines) < 2:
        return None
    keys = scores.columns.tolist()[:MOST_SERIES]
    gaps = scores.rsub(scores.max(axis=1), axis=0)[keys]
    widest = float(gaps.to_numpy().max())
    marks = np.linspace(0, widest, MARKS)
    within = np.unique(np.concatenate([gaps.to_numpy().ravel(), marks]))
    shares = profiles(scores, within.tolist())
    series = [(str(key[0]), _stairs(within, shares[key].to_numpy(), set(marks.tolist()))) for key in keys]
    text = f"distance from the best attack on the task, {unit}"
    svg = curves(f"{name}-profile", "Performance profiles", (text, "share of tasks"), series, zero=True)
    more = len(lines) - len(keys)
    caption = (
        f"Performance profiles over {len(scores)} tasks: the share of tasks on which an attack comes within a distance "
        "of the best attack on that task. Further up is better; at the left end, how often it is the best."
    )
    return Chart(svg, f"{caption} The {len(keys)} first attacks are drawn, {more} are not." if more else caption)


def _stairs(within: Any, shares: Any, marks: set[float]) -> list[Point]:
    points = []
    before = shares[0]
    for x, y in zip(within.tolist(), shares.tolist(), strict=True):
        if y != before:
            points.append(Point(x, before, mark=False))
        if x in marks or y != before:
            points.append(Point(x, y, label=f"within {x:.3g}", mark=x in marks))
        before = y
    return points

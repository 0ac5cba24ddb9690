"""What attacks reach against what they cost, lane by lane."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from leakbench.site.charts import MOST_SERIES, Point, curves
from leakbench.site.data import Data, attack_page, slug
from leakbench.site.page import Page
from leakbench.site.pages.boards import lane_anchor, lane_id, lane_title
from leakbench.site.table import Chart, Column, Line, Table, Value, interval, places


def pages(data: Data) -> Iterator[Page]:
    """Yield the page of costs."""
    costs = _costs(data.rows)
    tables = [_table(table.lines, costs, f"cost-{lane_id(table)}") for table in data.lane_tables]
    intro = [
        "Gradient evaluations and wall seconds per trial, beside the edge over chance or floor. Settings of one attack "
        "are joined: what more compute buys. Seconds are of the machine that the rows name."
    ]
    tables = [table for table in tables if table.lines]
    yield Page("compute.html", "Metric against compute", context={"intro": intro, "tables": tables})


def _costs(rows: pd.DataFrame) -> dict[tuple[str, ...], tuple[float, float]]:
    """Return mean evaluations and seconds by attack, parameters, lane, stage and dataset's kind."""
    few = rows.loc[
        (rows["defense"] == "none") & (rows["status"] == "ok"),
        [*_KEYS, "model_evaluations", "wall_seconds"],
    ]
    means = few.groupby(list(_KEYS), observed=True)[["model_evaluations", "wall_seconds"]].mean()
    return {
        tuple(map(str, key)): (float(a), float(b)) for key, (a, b) in zip(means.index, means.to_numpy(), strict=True)
    }


_KEYS = ("attack", "attack_params", "lane", "target", "stage", "season")


def _table(lines: list[dict[str, Any]], costs: dict[tuple[str, ...], tuple[float, float]], name: str) -> Table:
    first = lines[0]
    target = str(first["target"])
    shown: list[Line] = []
    by_cost: dict[str, dict[str, list[Point]]] = {"evaluations": {}, "seconds": {}}
    for line in lines:
        evaluations, seconds = costs.get(tuple(str(line[key]) for key in _KEYS), (math.nan, math.nan))
        if pd.isna(line["edge"]):
            continue
        behind = f"{attack_page(line['attack'])}#{lane_anchor(line)}"
        values = [
            Value(line["attack_label"], href=attack_page(line["attack"])),
            interval(line["edge"], line["edge_low"], line["edge_high"], places(target), behind),
            Value("–" if math.isnan(evaluations) else f"{evaluations:,.4g}", evaluations, behind),
            Value("–" if math.isnan(seconds) else f"{seconds:.3g}", seconds, behind),
        ]
        shown.append(Line(values, slug(line["attack_label"])))
        for kind, cost in (("evaluations", evaluations), ("seconds", seconds)):
            if not math.isnan(cost):
                point = Point(cost, line["edge"], line["edge_low"], line["edge_high"], line["attack_label"])
                by_cost[kind].setdefault(line["attack"], []).append(point)
    unit = "gain over the floor, dB" if target == "inputs" else "advantage over chance"
    # Attacks that read labels off the update need no gradients: what they cost is time.
    kind = "evaluations" if any(p.x > 0 for own in by_cost["evaluations"].values() for p in own) else "seconds"
    series = by_cost[kind]
    best = sorted(series.items(), key=lambda item: -max(p.y for p in item[1]))[:MOST_SERIES]
    drawn = [(key, sorted(points)) for key, points in best]
    charts = []
    if drawn:
        axis, text = _AXES[kind]
        svg = curves(
            f"{name}-chart",
            f"{lane_title(first)}: edge against {text}",
            (axis, unit),
            drawn,
            log=True,
            least=1.0 if kind == "evaluations" else min([p.x for _, own in drawn for p in own if p.x > 0], default=1.0),
            zero=True,
        )
        left = len(series) - len(drawn)
        more = f" The {MOST_SERIES} best attacks; {left} more are in the table." if left else ""
        charts.append(Chart(svg, f"Edge against {text}, with its 95% interval: further up and left is better.{more}"))
    columns = [
        Column("attack"),
        Column("edge", True, note=f"{unit}, [95%]"),
        Column("evaluations", True, note="gradients per trial"),
        Column("seconds", True, note="per trial"),
    ]
    return Table(name, lane_title(first), columns, shown, compare=True, charts=charts)


_AXES = {
    "evaluations": ("gradient evaluations per trial, logarithmic, none at 1", "gradient evaluations"),
    "seconds": ("seconds per trial, logarithmic", "seconds, since no attack here evaluates gradients"),
}
"""What is along x, and in words."""

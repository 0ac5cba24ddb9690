"""Which layers leak: the layer profile, and every measured number, kind by kind."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from leakbench.board.measures import ordered, variants
from leakbench.board.profile import MOST_LINES, PANELS, chosen
from leakbench.board.score import group_ids
from leakbench.errors import UserError
from leakbench.site.charts import Point, curves
from leakbench.site.data import Data, slug
from leakbench.site.page import Page
from leakbench.site.pages.measured import behind, measured_page
from leakbench.site.table import Chart, Column, Line, Table, Value, interval, whole

KINDS = {"lower_bound": "lower bound", "proxy": "proxy", "proved_bound": "proved bound"}
"""Kinds in words; they never share a table."""

SEVERAL = {"lower_bound": "lower bounds", "proxy": "proxies", "proved_bound": "proved bounds"}

MOST = 400
"""Most numbers of one table; measures.parquet has all."""


def pages(data: Data) -> Iterator[Page]:
    """Yield the page of layers, and one per kind with the numbers of whole updates."""
    tables = list(_profiles(data)) if data.measures else []
    others = list(_tables(data))
    for kind, table in others:
        context = {"links": [("localization.html", "Which layers leak")], "tables": [table], "kicker": "localization"}
        yield Page(kind_page(kind), f"Measured {SEVERAL[kind]}", context=context)
    intro = [
        "How much of the images, and of an attribute of theirs, is in which layer's update. Lower bounds are what "
        "attackers got, proxies local numbers that bound nothing, proved bounds what no attacker can exceed."
    ]
    links = [(kind_page(kind), table.caption) for kind, table in others]
    context = {
        "intro": intro,
        "links": links,
        "tables": tables,
        "empty": "Nothing measured yet; run: leakbench measure quick",
    }
    yield Page("localization.html", "Localization", context=context)


def _profiles(data: Data) -> Iterator[Table]:
    try:
        lines = chosen(data.measures)
    except UserError:
        return
    for _, own in lines.groupby(group_ids(lines, ("net", "panel")), sort=True):
        panel, net = PANELS[int(own["panel"].iloc[0])], str(own["net"].iloc[0])
        layers = own.sort_values("depth").drop_duplicates("layer")
        place = {layer: i for i, layer in enumerate(layers["layer"])}
        names = ordered(own, "series")[:MOST_LINES]
        series = []
        for name in names:
            part = own[own["series"] == name].sort_values("depth")
            whole_ = part["value"].clip(lower=0).sum() if panel.share else 1.0
            scale = 1 / whole_ if panel.share and whole_ > 0 else 1.0
            points = [
                Point(
                    place[line["layer"]],
                    line["value"] * scale,
                    line["low"] * scale,
                    line["high"] * scale,
                    line["layer"],
                )
                for line in part.to_dict("records")
            ]
            series.append((name, points))
        label = panel.label.replace("\n", " ")
        title = f"{net}: {label} ({panel.information} information, {KINDS[panel.kind]})"
        svg = curves(
            slug(f"profile-{title}"), title, ("layers from input to output", label), series, labels=list(place),
            zero=panel.neutral == 0,
        )  # fmt: skip
        neutral = "" if panel.neutral is None else f" Nothing leaks at {panel.neutral:g}."
        share = " Every line sums to 1." if panel.share else ""
        more = "" if len(names) == own["series"].nunique() else f" The first {MOST_LINES} tasks; the table has all."
        text = f"{label[0].upper()}{label[1:]}, layer by layer, with 95% intervals.{neutral}{share}{more}"
        yield _layer_table(own, slug(f"layers-{title}"), title, Chart(svg, text))


def _layer_table(own: pd.DataFrame, name: str, title: str, chart: Chart) -> Table:
    lines = []
    for line in own.sort_values(["series", "depth"]).to_dict("records"):
        here = behind(line)
        lines.append(
            Line(
                [
                    Value(line["layer"], float(line["depth"])),
                    Value(line["series"]),
                    interval(line["value"], line["low"], line["high"], 3, here),
                    whole(line["n"], here),
                    Value(line["task"], style="wide"),
                ],
                slug(f"{line['layer']} {line['series']} {measured_page(line)[-20:]}"),
            )
        )
    columns = [
        Column("layer"),
        Column("task, in short", choose=True),
        Column("value", True, note="[95%]"),
        Column("n", True),
        Column("task"),
    ]
    return Table(name, title, columns, lines, compare=True, charts=[chart])


def kind_page(kind: str) -> str:
    """Return where the numbers of one kind are."""
    return f"measured/{kind}.html"


def _tables(data: Data) -> Iterator[tuple[str, Table]]:
    for kind, table in data.measures.items():
        whole_updates = table[table["depth"].isna()]
        if whole_updates.empty:
            continue
        lines = []
        labels = pd.concat([variants(own) for _, own in whole_updates.groupby("net")])
        for line, label in zip(whole_updates.to_dict("records")[:MOST], labels.loc[whole_updates.index], strict=False):
            values = [
                Value(line["quantity"]),
                Value(line["net"]),
                Value(label),
                interval(line["value"], line["low"], line["high"], 3, behind(line)),
                Value(str(line["unit"])),
                whole(line["n"], behind(line)),
                Value(f"{line['measure_label']} v{line['measure_version']}"),
            ]
            lines.append(Line(values, slug(f"{line['quantity']} {line['net']} {label} {line['measure_label']}")))
        columns = [
            Column("quantity", choose=True), Column("net", choose=True), Column("task, in short"),
            Column("value", True, note="[95%]"), Column("unit"), Column("n", True), Column("measure", choose=True),
        ]  # fmt: skip
        notes = (
            [f"{len(whole_updates) - MOST} more numbers are in measures.parquet."] if len(whole_updates) > MOST else []
        )
        caption = f"Whole updates: {SEVERAL[kind]}"
        yield kind, Table(f"kind-{kind}", caption, columns, lines, notes, compare=True)

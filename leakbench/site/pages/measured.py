"""One page per measure of a task and defense: every value of every trial and layer, and what reproduces them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from leakbench.board.measures import MEASURE_KEYS, WHERE_KEYS, named
from leakbench.board.score import group_ids, plain
from leakbench.site.data import Data, cell_id, short_label, task_page
from leakbench.site.page import Page
from leakbench.site.table import Column, Line, Table, Value, whole

KEYS = ("net", *WHERE_KEYS, *MEASURE_KEYS)
"""What the values of one page share."""

_DIGITS = 4


def measured_page(line: Any) -> str:
    """Return where the rows behind a number of `leakbench.board.measures.tables` are."""
    identity = cell_id([plain(line[key]) for key in KEYS])
    return f"measured/{identity[:2]}/{identity}.html"


def quantity_anchor(quantity: str) -> str:
    """Return where on such a page the values of a quantity are."""
    return f"q-{quantity}"


def behind(line: Any) -> str:
    """Return where the rows behind a number are, with the anchor of its quantity."""
    return f"{measured_page(line)}#{quantity_anchor(line['quantity'])}"


def pages(data: Data) -> Iterator[Page]:
    """Yield a page per measure, task and defense that gave a value."""
    if data.measured is None:
        return
    rows = named(data.measured)
    rows = rows[rows["status"] == "ok"]
    for _, part in rows.groupby(group_ids(rows, KEYS), sort=False):
        first = {key: plain(part[key].iloc[0]) for key in KEYS}
        against = "" if first["defense"] == "none" else f" vs {first['defense_label']}"
        job = str(part["job_id"].iloc[0])
        run = ["leakbench", "measure", str(part["suite"].iloc[0]) or "SUITE"]
        run += ["--measure", short_label(str(first["measure"]), str(first["measure_params"]))]
        if first["defense"] != "none":
            run += ["--defense", short_label(str(first["defense"]), str(first["defense_params"]))]
        task = str(first["task"])
        context = {
            "first": {**first, "against": against},
            "task": task_page(task, str(first["task_hash"])) if first["task_hash"] in data.task_hashes else None,
            "example": job[:SHORT] + data.rows_option(job),
            "command": "\n".join(data.typed(job, "measures") or [shlex.join(run)]),
            "tables": [_jobs(part, data), *_values(part)],
        }
        yield Page(measured_page(first), f"{first['measure_label']} on {task}{against}", "measured.html", context)


SHORT = 16
"""Digits of a job's id that name it among the jobs of a site."""


def _jobs(part: pd.DataFrame, data: Data) -> Table:
    columns = ["job_id", "block_start", "block_stop", "device", "host_kind", "leakbench_version", "git_sha"]
    firsts = part.drop_duplicates("job_id").sort_values("block_start")
    lines = [
        Line(
            [
                Value(f"leakbench reproduce {job[:SHORT]}{data.rows_option(job)}"),
                *(whole(start), whole(stop - 1)),
                *map(Value, map(str, rest)),
            ],
            job,
        )
        for job, start, stop, *rest in firsts[columns].itertuples(index=False, name=None)
    ]
    titles = [Column("command"), Column("first trial", True), Column("last trial", True)]
    titles += [Column("device"), Column("host"), Column("leakbench"), Column("commit")]
    return Table("jobs", "What they were measured by: each command runs one job again", titles, lines)


def _values(part: pd.DataFrame) -> Iterator[Table]:
    """Yield a table per quantity: a line per trial, a column per layer; fitted values have a line per layer."""
    for quantity, own in part.groupby("quantity", sort=True):
        layers = own[["layer", "depth"]].drop_duplicates().sort_values("depth", na_position="first")["layer"].tolist()
        unit, name = str(own["unit"].iloc[0]), quantity_anchor(str(quantity))
        title = f"{quantity} ({unit})" if unit not in ("", "1") else str(quantity)
        fitted = own[own["trial"].isna()]
        trials = own[own["trial"].notna()]
        if len(trials):
            yield _by_trial(trials, layers, name, title)
        if len(fitted):
            yield _fitted(fitted, f"{name}-fitted" if len(trials) else name, title)


def _by_trial(trials: pd.DataFrame, layers: list[str], name: str, title: str) -> Table:
    wide = trials.pivot_table(index=["draw", "trial"], columns="layer", values="value", sort=False)
    wide = wide.reindex(columns=layers).sort_index()
    jobs = trials.drop_duplicates(["draw", "trial"]).set_index(["draw", "trial"])["job_id"]
    lines = [
        Line([
            Value(f"{int(trial)}", float(trial)), whole(draw), Value(f"{jobs[(draw, trial)][:SHORT]}:{int(trial)}"),
            *(_value(value) for value in values),
        ], f"t{int(trial)}-{int(draw)}")
        for (draw, trial), values in zip(wide.index, wide.to_numpy(np.float64), strict=True)
    ]  # fmt: skip
    columns = [Column("trial", True), Column("draw", True), Column("row"), *(Column(layer, True) for layer in layers)]
    return Table(name, f"{title}: every trial, layer by layer", columns, lines)


def _fitted(fitted: pd.DataFrame, name: str, title: str) -> Table:
    lines = [
        Line(
            [
                Value(str(line["layer"])),
                *(_value(line[key]) for key in ("value", "low", "high")),
                whole(line["n"]),
                Value(f"{line['job_id'][:SHORT]}"),
            ],
            str(i),
        )
        for i, line in enumerate(fitted.sort_values("depth", na_position="first").to_dict("records"))
    ]
    columns = [Column("layer"), Column("value", True), Column("low", True), Column("high", True)]
    return Table(name, f"{title}: fitted over trials", [*columns, Column("n", True), Column("job")], lines)


def _value(value: Any) -> Value:
    return Value("–") if pd.isna(value) else Value(f"{value:.{_DIGITS}g}", float(value))

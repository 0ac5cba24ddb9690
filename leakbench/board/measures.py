"""From rows of measures to tables, one per kind: each number's mean or fitted value with its interval, layer by layer.

Lower bounds, proxies and proved bounds are numbers of different meaning, so no table holds two kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.columns import DEFENSE_KEYS
from leakbench.board.score import group_ids, named_weights, plain
from leakbench.board.stats import ENDS, resamples, widening
from leakbench.measures.catalogue import MeasureKind
from leakbench.stage import stage_order
from leakbench.tasks import Architecture

KINDS: tuple[MeasureKind, ...] = get_args(MeasureKind)
"""Every kind, which is a table of its own."""

WHERE_KEYS = (
    *("season", "season_commitment", "benchmark_version", "lane", "task", "task_version", "task_hash", "target"),
    *("attribute", "dataset", "dataset_fingerprint", "architecture", "stage", "batch_size", "checkpoint"),
    *("model_draws", *DEFENSE_KEYS, "defense_label"),
)
"""Of whose updates a line tells. ``checkpoint`` is as on the board of attacks."""

MEASURE_KEYS = ("measure", "measure_version", "measure_params", "measure_label")
LAYER_KEYS = ("quantity", "unit", "layer", "depth", "layer_parameters")

VALUE_COLUMNS = {
    "value": "mean over trials, or the fitted value",
    "low": "lower end of its 95% interval: bootstrap over draw and trial, or that of the fit; null: none",
    "high": "upper end",
    "n": "trials, or observations behind a fitted value",
    "fitted": "whether it is one value fitted over trials",
}
"""The columns that follow the keys."""

MISSING_COLUMNS = {
    "status": "not_applicable, unavailable, or what failed",
    "jobs": "jobs with that status and reason, of which no other job has the trials",
    "trials": "their trials",
    "error": "the reason",
}
"""What is told of measures without a value, after `WHERE_KEYS` and `MEASURE_KEYS`."""

_BUDGETS = ("budget_model_evaluations", "budget_wall_seconds")  # of attacks

Floats = NDArray[np.float64]


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of measures with the columns ``checkpoint`` and ``net``."""
    keys = [key for key in (*WHERE_KEYS, *MEASURE_KEYS) if key not in ("checkpoint", "dataset_fingerprint")]
    return named_weights(rows, group_ids(rows, tuple(keys))).assign(net=nets(rows))


def nets(rows: pd.DataFrame) -> pd.Series[str]:
    """Return dataset and architecture with its parameters, as task ids begin."""
    parts = rows[["architecture", "architecture_init", "architecture_params"]]
    labels = {
        key: Architecture(name=key[0], init=key[1], params=json.loads(key[2])).label
        for key in parts.drop_duplicates().itertuples(index=False)
    }
    every = [labels[key] for key in parts.itertuples(index=False)]
    return rows["dataset"].str.rsplit("/", n=1).str[-1] + "-" + pd.Series(every, index=rows.index, dtype=object)


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return a table per kind: a line per task, defense, measure, quantity and layer.

    Args:
        rows: As `leakbench.results.load_measures` gives them.

    Returns:
        By kind: ``net``, `WHERE_KEYS`, `MEASURE_KEYS`, `LAYER_KEYS` and `VALUE_COLUMNS`; by task, defense and measure,
        quantities by name, the whole update first and then layers from input to output. Kinds without a line have an
        empty table.
    """
    rows = named(rows)
    ok = rows[rows["status"] == "ok"]
    columns = ["net", *WHERE_KEYS, *MEASURE_KEYS, *LAYER_KEYS, *VALUE_COLUMNS]
    found: dict[str, pd.DataFrame] = {}
    for kind in KINDS:
        lines = [line for part in _cells(ok[ok["kind"] == kind]) for line in _lines(part)]
        table = pd.DataFrame(lines, columns=columns)
        order = ["net", *WHERE_KEYS, *MEASURE_KEYS, "quantity", "_all", "depth", "layer"]
        table = table.assign(_all=table["depth"].notna()).sort_values(order, kind="stable", na_position="first")
        found[kind] = table.drop(columns="_all").reset_index(drop=True)
    return found


def _cells(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    for _, part in rows.groupby(group_ids(rows, ("net", *WHERE_KEYS, *MEASURE_KEYS))):
        yield part


def _lines(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the lines of one task, defense and measure."""
    keys = {key: plain(part[key].iloc[0]) for key in ("net", *WHERE_KEYS, *MEASURE_KEYS)}
    layers = group_ids(part, LAYER_KEYS)
    firsts = part[list(LAYER_KEYS)].assign(_line=layers).drop_duplicates("_line").to_dict("records")
    own: dict[Any, dict[str, Any]] = {line["_line"]: {key: plain(line[key]) for key in LAYER_KEYS} for line in firsts}
    fitted = part["trial"].isna()
    fits = part.loc[fitted, ["value", "low", "high", "n"]].to_dict("records")
    for number, row in zip(layers[fitted], fits, strict=True):
        fit = {"value": row["value"], "low": row["low"], "high": row["high"], "n": plain(row["n"]), "fitted": True}
        yield keys | own[number] | fit
    by_trial = part[~fitted].assign(_line=layers[~fitted])
    by_trial = by_trial.pivot_table(index=["draw", "trial"], columns="_line", values="value")
    for columns, values in _common(by_trial):
        low, high = intervals(values)
        for i, number in enumerate(columns):
            mean = {"value": float(values[:, i].mean()), "low": low[i], "high": high[i], "n": len(values)}
            yield keys | own[number] | mean | {"fitted": False}


def _common(by_trial: pd.DataFrame) -> Iterator[tuple[list[Any], Floats]]:
    """Yield the columns that are known on the same trials, and their values (n, columns)."""
    together: dict[bytes, list[Any]] = {}
    for column in by_trial.columns:
        together.setdefault(by_trial[column].notna().to_numpy().tobytes(), []).append(column)
    for columns in together.values():
        yield columns, by_trial[columns].dropna().to_numpy(np.float64)


def intervals(values: Floats) -> tuple[Floats, Floats]:
    """Return the ends of each column's bootstrap interval of the mean, NaN below two rows.

    Args:
        values: (n, Q), one row per cluster: the columns are resampled together.
    """
    if len(values) < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    means = np.concatenate([drawn @ values for drawn in resamples(len(values))]) / len(values)
    middle, wider = values.mean(axis=0), widening(len(values))
    low, high = np.quantile(means, ENDS, axis=0)
    return middle - wider * (middle - low), middle + wider * (high - middle)


def missing(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what was asked and has no value, with the reasons; see `MISSING_COLUMNS`."""
    rows = named(rows)
    lines = []
    for _, part in rows.groupby(group_ids(rows, (*(k for k in WHERE_KEYS if k != "checkpoint"), *MEASURE_KEYS))):
        blocks = part[["status", "error", "block_start", "block_stop"]].drop_duplicates()
        ok = blocks[blocks["status"] == "ok"]
        known = {t for a, b in zip(ok["block_start"], ok["block_stop"], strict=True) for t in range(a, b)}
        keys = {key: plain(part[key].iloc[0]) for key in ("net", *WHERE_KEYS, *MEASURE_KEYS)}
        for (status, error), jobs in blocks[blocks["status"] != "ok"].groupby(["status", "error"], dropna=False):
            left = [set(range(a, b)) - known for a, b in zip(jobs["block_start"], jobs["block_stop"], strict=True)]
            if trials := len(set().union(*left)):
                own = {"status": status, "jobs": sum(map(bool, left)), "trials": trials, "error": plain(error)}
                lines.append(keys | own)
    table = pd.DataFrame(lines, columns=["net", *WHERE_KEYS, *MEASURE_KEYS, *MISSING_COLUMNS])
    return table.sort_values([*table.columns], kind="stable").reset_index(drop=True)


def variants(table: pd.DataFrame) -> pd.Series[str]:
    """Return what tells each line's task and defense from the others of its net in the table, in few words.

    Of task ids the beginnings and endings that all share are left out; where ids and defenses agree, budget, draws,
    weights, hash and season follow, as far as they differ.

    Args:
        table: With ``net`` and as many of `WHERE_KEYS` as tell its lines apart.
    """
    keys = [key for key in (*WHERE_KEYS, *_BUDGETS) if key in table]
    where = table[keys].astype(object).where(table[keys].notna(), None)
    ids = [task.removeprefix(f"{net}-").split("-") for task, net in zip(table["task"], table["net"], strict=True)]
    begin, end = _shared(ids)
    short = ["-".join(words[begin : len(words) - end] or words[:2]) for words in ids]
    labels = pd.Series(short, index=table.index, dtype=object)
    if where["defense_label"].nunique() > 1 or (where["defense"] != "none").any():
        labels += where["defense_label"].map(lambda name: "" if name == "none" else f" vs {name}")
    identity = group_ids(where, tuple(keys))
    for key in (*_BUDGETS, "model_draws", "checkpoint", "task_hash", "defense_source_sha256", "season"):
        if key not in where:
            continue
        groups = [table["net"], labels]
        clash = (identity.groupby(groups).transform("nunique") > 1) & (
            where[key].map(str).groupby(groups).transform("nunique") > 1
        )
        labels = labels.mask(clash, labels + " " + where[key].map(lambda value: str(value)[:18]))
    return labels


def ordered(table: pd.DataFrame, column: str) -> list[str]:
    """Return the different values of a column by stage and batch size, undefended first."""
    firsts = table.drop_duplicates(column).to_dict("records")
    firsts.sort(
        key=lambda line: (
            *stage_order(line["stage"]),
            *(line["batch_size"], line["task"], line["defense"] != "none", line["defense_label"], line[column]),
        )
    )
    return [str(line[column]) for line in firsts]


def pattern(table: pd.DataFrame) -> str:
    """Return the task ids with a ``*`` for where they differ; of one task its id."""
    ids = [task.split("-") for task in table["task"].unique()]
    begin, end = _shared(ids)
    first = ids[0]
    return "-".join([*first[:begin], *["*"] * (len(ids) > 1), *first[len(first) - end :]])


def _shared(ids: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return how many words all have in common at the beginning, and after that at the end."""
    different = {tuple(words) for words in ids}
    shortest = min(map(len, different), default=0)
    begin = end = 0
    while begin < shortest and len({words[begin] for words in different}) == 1:
        begin += 1
    while end < shortest - begin and len({words[-1 - end] for words in different}) == 1:
        end += 1
    return begin, end

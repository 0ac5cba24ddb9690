"""Whether proxies tell how well attacks do: Spearman's rank correlation over the trials that both have.

A proxy bounds nothing, so that this is the test that it has to pass: trials in which it says that more leaks must be
those in which attacks recover more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from leakbench.board.columns import CELL_KEYS, DEFENSE_KEYS
from leakbench.board.measures import MEASURE_KEYS, nets
from leakbench.board.score import group_ids, plain, split_cells
from leakbench.board.stats import ENDS, MIN_PAIRS, resamples
from leakbench.measures.catalogue import MEASURES
from leakbench.metrics import METRICS
from leakbench.tasks import Protocol

GAIN = "psnr_gain"
"""PSNR over the floor of the same trial: of dark images a bad guess has a high PSNR too, whatever the update says."""

QUALITY = {
    "inputs": ("psnr", GAIN, "ssim", "mse", "lpips"),
    "labels": ("instance_recall",),
    "attribute": ("inference_bits",),
    "membership": ("inference_bits",),
}
"""Metrics of single trials that proxies are compared with, by target."""

UPDATE_KEYS = (
    *("season", "season_commitment", "benchmark_version", "dataset_fingerprint", "normalise"),
    *("architecture", "architecture_init", "architecture_params", "stage", "model_draws"),
    *("batch_size", "batch_sizes", "sampler", "sampler_alpha", "sampler_classes"),
    *("attribute", "attribute_value", "attribute_mix", "membership"),
    *Protocol.model_fields,
    *DEFENSE_KEYS,
)
"""Tasks that agree in these have the same victims and clients, trial by trial, whatever else is asked of them: see
`leakbench.data.sampling.draw_victims`. What the adversary knows changes no update."""

_TRIAL = ["draw", "trial", "checkpoint_sha256"]

CORRELATION_COLUMNS = {
    "metric": f"what the attack did in a trial; {GAIN} is PSNR less the floor of the same trial",
    "spearman": "rank correlation over trials; null: one of the two is the same in all trials",
    "low": f"lower end of its 95% interval, bootstrap over draw and trial; null below {MIN_PAIRS} trials",
    "high": "upper end",
    "n": "trials in which the attack succeeded and the proxy is known",
    "expected": "sign it has where the proxy tells more leakage from less; null: it does not claim to",
    "passes": "whether the interval is on the expected side of 0; null: no interval or nothing expected",
    "measured_on": "task whose updates were measured; they are those that were attacked",
}
"""The columns that follow the keys of task, attack, defense, measure, quantity and layer."""

Floats = NDArray[np.float64]


def correlations(rows: pd.DataFrame, measures: pd.DataFrame, *, layers: bool = True) -> pd.DataFrame:
    """Return a line per attacked task, attack, defense, metric, measure, proxy and layer.

    Trials with a planted model are left out: the proxy is of another.

    Args:
        rows: As `leakbench.results.load_rows` gives them.
        measures: As `leakbench.results.load_measures` gives them.
        layers: Whether single layers are wanted beside the whole update.

    Returns:
        ``net``, `CELL_KEYS`, ``attack_label``, ``defense_label``, `MEASURE_KEYS`, ``quantity``, ``layer``, ``depth``
        and `CORRELATION_COLUMNS`, sorted by all of them.
    """
    proxies = measures[(measures["kind"] == "proxy") & (measures["status"] == "ok") & measures["trial"].notna()]
    proxies = proxies if layers else proxies[proxies["depth"].isna()]
    same = ("season", "season_commitment", "benchmark_version", "dataset_fingerprint", "task_hash", "model_draws")
    known: dict[str, list[pd.DataFrame]] = {}
    for _, part in proxies.groupby(group_ids(proxies, (*same, *DEFENSE_KEYS, *MEASURE_KEYS))):
        known.setdefault(_update(part), []).append(part)
    rows = rows[(rows["status"] == "ok") & rows["planted_share"].isna() & rows["inserted"].isna()]
    lines: list[dict[str, Any]] = []
    rows = rows.dropna(subset="attack")
    gain = (rows["psnr"] - rows["psnr_floor"]).astype(float)
    for keys, cell in split_cells(rows.assign(net=nets(rows), **{GAIN: gain})):
        labels = {key: cell[key].iloc[0] for key in ("net", "attack_label", "defense_label")}
        for part in _nearest(known.get(_update(cell), []), keys["task_hash"]):
            own = {key: plain(part[key].iloc[0]) for key in MEASURE_KEYS} | {"measured_on": part["task"].iloc[0]}
            lines += [keys | labels | own | line for line in _lines(cell, part, keys)]
    columns = ["net", *CELL_KEYS, "attack_label", "defense_label", *MEASURE_KEYS, "quantity", "layer", "depth"]
    table = pd.DataFrame(lines, columns=[*columns, *CORRELATION_COLUMNS])
    table = table.assign(_all=table["depth"].notna()).sort_values(
        [*columns[:-2], "_all", "depth", "layer", "metric"], kind="stable", na_position="first"
    )
    return table.drop(columns="_all").reset_index(drop=True)


def _update(part: pd.DataFrame) -> str:
    """Return what the updates of these rows follow from, but for the trial."""
    first = part.iloc[0]
    membership = first["target"] == "membership"
    return repr([membership if key == "membership" else plain(first[key]) for key in UPDATE_KEYS])


def _nearest(parts: Sequence[pd.DataFrame], task_hash: str) -> Iterator[pd.DataFrame]:
    """Yield each measure's rows once: those of the task itself where there are such."""
    ordered = sorted(parts, key=lambda part: (part["task_hash"].iloc[0] != task_hash, part["task_hash"].iloc[0]))
    seen = set()
    for part in ordered:
        identity = repr([plain(part[key].iloc[0]) for key in MEASURE_KEYS])
        if identity not in seen:
            seen.add(identity)
            yield part


def _lines(cell: pd.DataFrame, part: pd.DataFrame, keys: dict[str, Any]) -> Iterator[dict[str, Any]]:
    metrics = [name for name in QUALITY[keys["target"]] if cell[name].notna().any()]
    quality = cell.set_index(_TRIAL)[metrics]
    layers = group_ids(part, ("quantity", "layer"))
    own = {n: rows.iloc[0] for n, rows in part.groupby(layers)}
    values = part.assign(_line=layers).pivot(index=_TRIAL, columns="_line", values="value")
    quantities = {quantity.name: quantity for quantity in MEASURES.get(part["measure"].iloc[0]).quantities}
    for metric in metrics:
        for numbers, known in _known(values, quality[metric].dropna().astype(float)):
            results = rank_correlations(known[:, 1:], known[:, 0])
            for number, (rho, low, high) in zip(numbers, results, strict=True):
                more = quantities[own[number]["quantity"]].more_leaks
                better = metric == GAIN or METRICS[metric].higher_is_better
                expected = None if more is None else 1 if more == better else -1
                told = expected is not None and not np.isnan(low)
                yield {
                    **{key: plain(own[number][key]) for key in ("quantity", "layer", "depth")},
                    "metric": metric,
                    "spearman": rho,
                    "low": low,
                    "high": high,
                    "n": len(known),
                    "expected": expected,
                    "passes": bool((low if expected == 1 else -high) > 0) if told else None,
                }


def _known(values: pd.DataFrame, quality: pd.Series[float]) -> Iterator[tuple[list[Any], Floats]]:
    """Yield columns that are known in the same trials of ``quality``, and (n, 1 + columns): quality and theirs."""
    together: dict[bytes, list[Any]] = {}
    both = values.join(quality.rename("_quality"), how="inner").sort_index()
    for column in values.columns:
        together.setdefault(both[column].notna().to_numpy().tobytes(), []).append(column)
    for columns in together.values():
        known = both[["_quality", *columns]].dropna()
        if len(known):
            yield columns, known.to_numpy(dtype=np.float64)


def rank_correlations(values: Floats, quality: Floats) -> list[tuple[float, float, float]]:
    """Return Spearman's rank correlation of each column with ``quality``, and its bootstrap interval.

    Resamples in which one of the two is constant are left out.

    Args:
        values: (n, Q), one row per cluster.
        quality: (n,).
    """
    count = len(quality)
    constant = [bool((column == column[0]).all()) or bool((quality == quality[0]).all()) for column in values.T]
    rho = [
        np.nan if same else float(spearmanr(column, quality).statistic)
        for column, same in zip(values.T, constant, strict=True)
    ]
    ends = np.full((2, len(rho)), np.nan)
    if count >= MIN_PAIRS and not all(constant):
        drawn = np.concatenate([_resampled(values, quality, weights) for weights in resamples(count)])
        for i in (i for i, same in enumerate(constant) if not same):
            ends[:, i] = np.nanquantile(drawn[:, i], ENDS)
    return [(value, float(low), float(high)) for value, low, high in zip(rho, *ends, strict=True)]


def _resampled(values: Floats, quality: Floats, weights: Floats) -> Floats:
    """Return the correlations (R, Q) of resamples in which rows occur as often as ``weights`` (R, n) says."""
    own = _centred_ranks(quality, weights)
    variance = (weights * own**2).sum(1)
    found = np.empty((len(weights), values.shape[1]))
    for i, column in enumerate(values.T):
        ranks = _centred_ranks(column, weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[:, i] = (weights * ranks * own).sum(1) / np.sqrt(variance * (weights * ranks**2).sum(1))
    return found


def _centred_ranks(values: Floats, weights: Floats) -> Floats:
    """Return (R, n): each value's mid-rank in every resample, less the mean rank."""
    ordered = np.sort(values)
    below = np.pad(np.cumsum(weights[:, np.argsort(values, kind="stable")], axis=1), ((0, 0), (1, 0)))
    first, last = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    ranks: Floats = (below[:, first] + below[:, last] - weights.sum(1, keepdims=True)) / 2
    return ranks

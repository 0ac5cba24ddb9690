"""Intervals and ties: the bootstrap over trials. Every draw depends on names only, so no cell moves another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.keys import PUBLIC_KEY, seed

CONFIDENCE = 0.95
"""Level of every interval."""

RESAMPLES = 2_000
"""Bootstrap resamples: the Monte Carlo error of an end is about a twentieth of the interval's width."""

MIN_PAIRS = 6
"""Fewest common trials on which two entries can differ: with five, an exact sign test cannot reach p < 0.05."""

_CHUNK = 4_000_000  # resampled indices held at a time, 32 MB

Z_SUM = 1.959964 + 0.841621
"""Normal quantiles of a two-sided 5% test with 80% power."""


class Interval(NamedTuple):
    """A mean with its bootstrap interval; the ends are NaN below two clusters, everything is NaN without values."""

    mean: float
    low: float
    high: float


def bootstrap(values: NDArray[np.float64], clusters: Sequence[Hashable], *names: object) -> Interval:
    """Return the mean with its percentile interval, resampling clusters.

    Args:
        values: (n,) one per row; a NaN makes the whole result NaN.
        clusters: n labels; rows of one cluster are drawn together.
        names: What the values belong to; they seed the resampling.
    """
    if len(values) == 0 or bool(np.isnan(values).any()):
        return Interval(np.nan, np.nan, np.nan)
    numbers: dict[Hashable, int] = {}
    codes = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    own = len(numbers) == len(codes)  # as a rule; then there is nothing to add up
    sums, sizes = values if own else np.bincount(codes, weights=values), np.bincount(codes).astype(np.float64)
    mean = float(values.mean())
    if len(sums) < 2:
        return Interval(mean, np.nan, np.nan)
    rng = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap", *names))
    step = max(1, _CHUNK // len(sums))
    means = []
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(len(sums), size=(min(step, RESAMPLES - start), len(sums)))
        means.append(sums.take(drawn).sum(axis=1) / (len(sums) if own else sizes[drawn].sum(axis=1)))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high))


def resamples(count: int, *names: object) -> Iterator[NDArray[np.float64]]:
    """Yield how often each cluster is drawn in a resample, (R, count) with R adding up to `RESAMPLES`.

    Those of the same names are the draws of `bootstrap`; here many numbers share them.

    Args:
        count: Clusters.
        names: What they belong to; they seed the resampling.
    """
    rng = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap", *names))
    step = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(count, size=(min(step, RESAMPLES - start), count))
        flat = (drawn + count * np.arange(len(drawn))[:, None]).ravel()
        yield np.bincount(flat, minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def stratified(parts: Sequence[tuple[float, NDArray[np.float64]]], *names: object) -> Interval:
    """Return a weighted sum of means with its percentile interval, resampling within each part.

    Args:
        parts: Weight, and (n,) values of one part; values of different parts are independent.
        names: What the values belong to; they seed the resampling.
    """
    rng = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap", *names))
    totals = np.zeros(RESAMPLES)
    for weight, values in parts:
        step = max(1, _CHUNK // len(values))
        for start in range(0, RESAMPLES, step):
            stop = min(start + step, RESAMPLES)
            totals[start:stop] += weight * values[rng.integers(len(values), size=(stop - start, len(values)))].mean(1)
    mean = sum(weight * float(values.mean()) for weight, values in parts)
    if any(len(values) < 2 for _, values in parts):
        return Interval(mean, np.nan, np.nan)
    low, high = np.quantile(totals, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high))


def paired(a: pd.Series[float], b: pd.Series[float]) -> pd.Series[float]:
    """Return a - b on their common trials; both are indexed by trial."""
    if a.index is b.index or a.index.equals(b.index):
        return a - b
    common = a.index.intersection(b.index)
    return a.loc[common] - b.loc[common]


def separable(a: pd.Series[float], b: pd.Series[float], *names: object) -> bool:
    """Whether the paired difference of two entries is not zero at the level of `CONFIDENCE`.

    Args:
        a: Values of one entry, indexed by trial.
        b: Values of the other.
        names: What is compared; they seed the resampling.
    """
    difference = paired(a, b)
    if len(difference) < MIN_PAIRS:
        return False
    interval = bootstrap(np.asarray(difference, dtype=np.float64), list(difference.index), "difference", *names)
    return interval.low > 0 or interval.high < 0


def rank_groups(entries: Sequence[tuple[str, pd.Series[float]]], *names: object) -> list[int]:
    """Return the rank group of every entry: 1 for the best and those that cannot be told from it, and so on.

    An entry that can be told from the leader of its group opens the next one and leads it.

    Args:
        entries: (name, values indexed by trial), best first.
        names: The table; they seed the resampling.
    """
    groups: list[int] = []
    leader = 0
    for i, (name, values) in enumerate(entries):
        if i and separable(entries[leader][1], values, *names, entries[leader][0], name):
            leader = i
        groups.append((groups[-1] + (leader == i)) if groups else 1)
    return groups


def detectable_difference(entries: Sequence[tuple[str, pd.Series[float]]]) -> float:
    """Return the difference to the first entry that these trials detect with 80% power at 5%: a median over entries."""
    differences = [paired(entries[0][1], values) for _, values in entries[1:]]
    detectable = [Z_SUM * float(d.std(ddof=1)) / np.sqrt(len(d)) for d in differences if len(d) > 1]
    return float(np.median(detectable)) if detectable else np.nan

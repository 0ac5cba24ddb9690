"""Intervals and ties: the bootstrap over trials, with the same draws for everything of as many clusters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from leakbench.keys import PUBLIC_KEY, seed

CONFIDENCE = 0.95
"""Level of every interval."""

ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
"""Quantiles at its ends."""

RESAMPLES = 2_000
"""Bootstrap resamples: the Monte Carlo error of an end is about a twentieth of the interval's width."""

MIN_PAIRS = 6
"""Fewest common trials on which two entries can differ: with five, an exact sign test cannot reach p < 0.05."""

_CHUNK = 2_000_000  # resampled numbers held at a time, 16 MB

Z_SUM = 1.959964 + 0.841621
"""Normal quantiles of a two-sided 5% test with 80% power."""


class Interval(NamedTuple):
    """A mean with its bootstrap interval; the ends are NaN below two clusters, everything is NaN without values."""

    mean: float
    low: float
    high: float


def bootstrap(values: NDArray[np.float64], clusters: Sequence[Hashable], *names: object) -> Interval:
    """Return the mean with its interval, resampling clusters.

    The percentile interval of few clusters is too narrow (of 4 normal values it holds the mean in 80% of cases, not
    95%), so a board's is widened about the mean as Student's t is against the normal distribution.

    Reference: Hesterberg 2015, arXiv 1411.5279 (narrowness bias of percentile intervals)

    Args:
        values: (n,) one per row; a NaN makes the whole result NaN.
        clusters: n labels; rows of one cluster are drawn together.
        names: Only for intervals that rows hold: they seed draws of their own, which are added up one by one, so that
            a row measured again is the same to the last bit; not widened. A board gives none: see `resamples`.
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
    if names:
        means = [sums.take(drawn).sum(axis=1) / sizes.take(drawn).sum(axis=1) for drawn in _draws(len(sums), *names)]
        return Interval(mean, *ends(np.concatenate(means)))
    means = [weights @ sums / (len(sums) if own else weights @ sizes) for weights in resamples(len(sums))]
    low, high = ends(np.concatenate(means))
    wider = widening(len(sums))
    return Interval(mean, mean - wider * (mean - low), mean + wider * (high - mean))


@lru_cache(maxsize=256)
def widening(count: int) -> float:
    """Return how much wider an interval from so many values has to be than its percentiles."""
    return float(stdtrit(count - 1, ENDS[1]) / ndtri(ENDS[1]) * np.sqrt(count / (count - 1)))


def ends(means: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the percentile interval of resampled values (R,)."""
    low, high = np.quantile(means, ENDS)
    return float(low), float(high)


def resamples(count: int, *independent: object) -> Iterator[NDArray[np.float64]]:
    """Yield how often each cluster is drawn in a resample, (R, count) with R adding up to `RESAMPLES`; read-only.

    The draws depend on nothing but the arguments. So a number's interval depends on its own rows only, and all numbers
    of as many clusters share their draws: an interval is as valid as with draws of its own, and what two share cancels
    in their difference.

    Args:
        count: Clusters.
        independent: Name of the draws. Numbers that are put together and are independent (parts of a sum, tasks and
            the victims within them) need draws of different names: those of no name would move together.
    """
    if RESAMPLES * count <= _CHUNK:
        yield _kept(count, *independent)
    else:
        yield from _weights(count, *independent)


def _draws(count: int, *names: object) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap", *names))
    step = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, step):
        yield rng.integers(count, size=(min(step, RESAMPLES - start), count))


def _weights(count: int, *names: object) -> Iterator[NDArray[np.float64]]:
    for drawn in _draws(count, *names):
        flat = (drawn + count * np.arange(len(drawn))[:, None]).ravel()
        yield np.bincount(flat, minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


@lru_cache(maxsize=8)
def _kept(count: int, *names: object) -> NDArray[np.float64]:
    (weights,) = _weights(count, *names)
    weights.setflags(write=False)
    return weights


def paired(a: pd.Series[float], b: pd.Series[float]) -> NDArray[np.float64]:
    """Return a - b on their common trials, (n,); both are indexed by trial, each of which occurs once."""
    if a.index is not b.index and not a.index.equals(b.index):
        common = a.index.intersection(b.index)
        a, b = a.loc[common], b.loc[common]
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def separable(a: pd.Series[float], b: pd.Series[float]) -> bool:
    """Whether the paired difference of two entries, indexed by trial, is not zero at the level of `CONFIDENCE`."""
    difference = paired(a, b)
    if len(difference) < MIN_PAIRS:
        return False
    interval = bootstrap(difference, range(len(difference)))
    return interval.low > 0 or interval.high < 0


def rank_groups(entries: Sequence[pd.Series[float]]) -> list[float]:
    """Return the rank group of every entry: 1 for the best and those that cannot be told from it, and so on.

    An entry that can be told from the leader of its group opens the next one and leads it. One of fewer than
    `MIN_PAIRS` trials is in none: NaN.

    Args:
        entries: Values of each, indexed by trial, best first.
    """
    groups: list[float] = []
    leader, group = None, 0
    for values in entries:
        if len(values) < MIN_PAIRS:
            groups.append(np.nan)
            continue
        if leader is None or separable(leader, values):
            leader, group = values, group + 1
        groups.append(float(group))
    return groups


def detectable_difference(entries: Sequence[pd.Series[float]]) -> float:
    """Return the difference to the first entry that these trials detect with 80% power at 5%: a median over entries."""
    differences = [paired(entries[0], values) for values in entries[1:]]
    detectable = [Z_SUM * float(d.std(ddof=1)) / np.sqrt(len(d)) for d in differences if len(d) > 1]
    return float(np.median(detectable)) if detectable else np.nan

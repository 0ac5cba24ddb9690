"""Statistics over the trials of attribute and membership inference, from stored claims and truths."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from leakbench.board.stats import ENDS, Interval, resamples

FALSE_POSITIVES = 0.01
"""The rate at which the true positives are told: below 100 negatives, that is none."""

STATISTICS = {
    "auc": "area under the ROC curve of the claimed probabilities; .5 is chance",
    "balanced_accuracy": "mean of the true positive and true negative rates at .5; a claim of .5 counts half",
    "tpr_at_1pct_fpr": "greatest true positive rate of a threshold with at most 1% false positives",
}
"""Every statistic and what it is."""

Floats = NDArray[np.float64]


def statistics(truth: NDArray[np.int64], scores: Floats, clusters: Sequence[Hashable]) -> dict[str, Interval]:
    """Return every statistic with its percentile interval, resampling clusters.

    Args:
        truth: (n,) 0 or 1.
        scores: (n,) claimed probabilities of 1.
        clusters: n labels; rows of one cluster are drawn together.

    Returns:
        By name; everything NaN where all truths are the same. Resamples with one truth only are left out.
    """
    none = Interval(np.nan, np.nan, np.nan)
    if len(set(truth.tolist())) < 2:
        return dict.fromkeys(STATISTICS, none)
    levels, position = np.unique(scores, return_inverse=True)
    _, codes = np.unique([repr(cluster) for cluster in clusters], return_inverse=True)
    whole = _of_counts(np.ones((1, len(truth))), truth, levels, position)
    count = int(codes.max()) + 1
    if count < 2:
        return {name: Interval(float(value[0]), np.nan, np.nan) for name, value in whole.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in STATISTICS}
    for weights in resamples(count):
        for name, values in _of_counts(weights[:, codes], truth, levels, position).items():
            drawn[name].append(values)
    bounds = {name: np.nanquantile(np.concatenate(values), ENDS) for name, values in drawn.items()}
    return {name: Interval(float(whole[name][0]), *map(float, bounds[name])) for name in STATISTICS}


def _of_counts(
    weights: Floats, truth: NDArray[np.int64], levels: Floats, position: NDArray[np.intp]
) -> dict[str, Floats]:
    """Return each statistic of R weightings (R, n) of the rows, (R,); NaN where a weighting has one truth only."""
    hits, alarms = (_by_level(weights[:, truth == bit], position[truth == bit], len(levels)) for bit in (1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        hits, alarms = (part / part.sum(1, keepdims=True) for part in (hits, alarms))
    # From the highest level down; the rates of claiming 1 at or above each level.
    tpr, fpr = (np.cumsum(part[:, ::-1], axis=1) for part in (hits, alarms))
    widths, low = alarms[:, ::-1], tpr - hits[:, ::-1]
    allowed = np.where(fpr <= FALSE_POSITIVES + 1e-12, tpr, 0).max(1)
    side = np.sign(levels - 0.5)
    return {
        "auc": (widths * (tpr + low) / 2).sum(1),
        "balanced_accuracy": (hits @ (1 + side) + alarms @ (1 - side)) / 4,
        "tpr_at_1pct_fpr": np.where(np.isnan(tpr[:, -1] + fpr[:, -1]), np.nan, allowed),
    }


def _by_level(weights: Floats, position: NDArray[np.intp], levels: int) -> Floats:
    """Sum the columns of (R, n) weights by the level of each, (R, levels)."""
    order = np.argsort(position, kind="stable")
    present, first = np.unique(position[order], return_index=True)
    totals = np.zeros((len(weights), levels))
    totals[:, present] = np.add.reduceat(weights[:, order], first, axis=1)
    return totals

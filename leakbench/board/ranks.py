"""What a table of entries can tell apart: intervals of ranks and of differences, and performance profiles.

Entries are compared on the same resamples, so what all of them share (an easy victim, a hard task) cancels. A resample
draws tasks with replacement, and within each the clusters (a model's draw and a victim, behind one update), the same
ones for all tasks of a stratum. A table of one task resamples clusters only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.stats import ENDS, MIN_PAIRS, RESAMPLES, Z_SUM, resamples

Floats = NDArray[np.float64]


def replicates(
    values: Floats,
    tasks: Sequence[str | int],
    clusters: Sequence[str | int],
    strata: Sequence[str | int],
) -> Floats:
    """Return the mean over tasks of every entry in every resample, (R, A); the mean of a task is that of its clusters.

    Args:
        values: (N, A), one line per task and cluster; those of the same task and cluster are averaged.
        tasks: N labels.
        clusters: N labels; tasks of one stratum share the draw of those with the same label.
        strata: N labels; each task lies in one stratum.

    Raises:
        ValueError: A task lies in several strata.
    """
    frame = pd.DataFrame(values)
    frame["stratum"], frame["task"], frame["cluster"] = (pd.Series(each) for each in (strata, tasks, clusters))
    if (frame.groupby("task")["stratum"].nunique() > 1).any():
        raise ValueError("a task lies in several strata")
    whole = frame.groupby(["stratum", "task", "cluster"]).mean()
    means = []
    for number, (_, stratum) in enumerate(whole.groupby(level="stratum")):
        places, labels = pd.factorize(stratum.index.get_level_values("cluster"), sort=True)
        drawn = _draws(len(labels), "stratum", number)
        for _, task in stratum.groupby(level="task"):
            own = drawn[:, places[stratum.index.get_indexer(task.index)]]
            total = own.sum(axis=1, keepdims=True)  # 0 where none of a smaller task's clusters was drawn
            mean = task.to_numpy(np.float64).mean(axis=0)
            means.append(np.where(total > 0, own @ task.to_numpy(np.float64) / np.maximum(total, 1), mean))
    summed: Floats = np.einsum("rt,tra->ra", _draws(len(means), "tasks"), np.stack(means))
    return summed / float(len(means))


def _draws(count: int, *independent: object) -> Floats:
    if count == 1:
        return np.ones((RESAMPLES, 1))
    return np.concatenate(list(resamples(count, *independent)))


def common(entries: Sequence[pd.Series[float]]) -> Floats | None:
    """Return `replicates` of entries on one task, on the trials that all have; None for fewer than `MIN_PAIRS`.

    Args:
        entries: Values of each, indexed by trial.
    """
    index = entries[0].index
    for other in entries[1:]:
        if other.index is not index and not other.index.equals(index):
            index = index.intersection(other.index)
    if len(index) < MIN_PAIRS:
        return None
    values = np.stack([(e if e.index is index else e.loc[index]).to_numpy(np.float64) for e in entries], axis=1)
    # As `replicates` of one task, whose clusters are lines already.
    return np.concatenate([drawn @ values for drawn in resamples(len(index), "stratum", 0)]) / len(index)


def rank_intervals(means: Floats) -> pd.DataFrame:
    """Return the 95% interval of every entry's rank (``low``, ``high``) and the share of resamples it is ``best`` in.

    Entries that are equal in a resample share its ranks: the interval holds the best and the worst of them.

    Args:
        means: (R, A) as `replicates` gives them; greater is better.
    """
    entries = np.ascontiguousarray(means.T)
    # Whom how many beat, and how many do as well: a sort of every resample takes four times as long.
    first = np.stack([1 + (entries > own).sum(axis=0, dtype=np.uint16) for own in entries])
    last = np.stack([(entries >= own).sum(axis=0, dtype=np.uint16) for own in entries])
    low = np.quantile(first, ENDS[0], axis=1, method="inverted_cdf")
    high = np.quantile(last, ENDS[1], axis=1, method="inverted_cdf")
    best = ((first == 1) / last).mean(axis=1)
    return pd.DataFrame({"low": low.astype(np.int64), "high": high.astype(np.int64), "best": best})


def differences(means: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95% interval of the difference of every two entries, (A, A) each: line minus column."""
    low, high = (np.zeros((means.shape[1], means.shape[1])) for _ in range(2))
    for a in range(means.shape[1]):
        low[a], high[a] = np.quantile(means[:, [a]] - means, ENDS, axis=0)
    return low, high


def groups(low: Floats) -> list[int]:
    """Return the rank group of every entry: 1 for the best and those that cannot be told from it, and so on.

    An entry that can be told from the leader of its group opens the next one and leads it.

    Args:
        low: (A, A) lower ends of differences as `differences` gives them, the best entry first.
    """
    found: list[int] = []
    leader = 0
    for entry in range(len(low)):
        if low[leader, entry] > 0:
            leader = entry
        found.append((found[-1] + (leader == entry)) if found else 1)
    return found


def detectable(means: Floats) -> float:
    """Return the difference to the first entry that the table detects with 80% power at 5%: a median over entries."""
    deviations = (means[:, [0]] - means[:, 1:]).std(axis=0)
    return Z_SUM * float(np.median(deviations)) if len(deviations) else np.nan


def profiles(scores: pd.DataFrame, within: Sequence[float]) -> pd.DataFrame:
    """Return, of each entry, the share of tasks on which it is no more than so much worse than the best entry.

    Dolan and More 2002 (doi 10.1007/s101070100263) divide by the best; ours subtract, since scores may be 0.

    Args:
        scores: A line per task, a column per entry; greater is better. NaN: the entry has none, and is never near.
        within: Distances, ascending.

    Returns:
        A line per distance, a column per entry.
    """
    gaps = scores.rsub(scores.max(axis=1), axis=0)
    lines: dict[Any, Any] = {distance: (gaps <= distance + 1e-12).mean() for distance in within}
    return pd.DataFrame(lines).T

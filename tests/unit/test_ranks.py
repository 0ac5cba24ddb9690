"""Intervals of ranks and differences, and profiles: cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from leakbench.board.ranks import common, detectable, differences, profiles, rank_intervals, replicates
from leakbench.board.stats import bootstrap

RNG = np.random.default_rng(0)
MONTE_CARLO = 4 * np.sqrt(0.25 / 2000)
"""Four standard errors of a share of the resamples."""


def one_task(values):
    values = np.asarray(values, dtype=float)
    count = len(values)
    return replicates(values, ["t"] * count, range(count), ["s"] * count)


def test_two_clusters_have_three_resamples_of_known_shares():
    # A is 0 or 4, B is 1: A's mean is 0, 2, 4 in a quarter, a half, a quarter of the resamples.
    means = one_task([[0, 1], [4, 1]])
    shares = [float((means[:, 0] == value).mean()) for value in (0, 2, 4)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=MONTE_CARLO)
    assert sum(shares) == 1
    ranks = rank_intervals(means)
    assert ranks["best"].tolist() == pytest.approx([0.75, 0.25], abs=MONTE_CARLO)
    assert ranks[["low", "high"]].to_numpy().tolist() == [[1, 2], [1, 2]]


def test_an_entry_that_is_always_better_has_one_rank_and_a_difference_without_spread():
    base = RNG.normal(size=30)
    means = one_task(np.stack([base + 2, base, base - 1], axis=1))
    assert rank_intervals(means)[["low", "high"]].to_numpy().tolist() == [[1, 1], [2, 2], [3, 3]]
    low, high = differences(means)
    assert low[0, 1] == pytest.approx(2)
    assert high[0, 2] == pytest.approx(3)
    assert detectable(means) == pytest.approx(0, abs=1e-12)


def test_equal_entries_share_their_ranks():
    base = RNG.normal(size=10)
    ranks = rank_intervals(one_task(np.stack([base + 1, base, base], axis=1)))
    assert ranks[["low", "high"]].to_numpy().tolist() == [[1, 1], [2, 3], [2, 3]]
    twins = rank_intervals(one_task(np.stack([base, base], axis=1)))
    assert twins["best"].tolist() == [0.5, 0.5]


def test_ranks_are_scipys():
    means = RNG.integers(0, 4, size=(50, 6)).astype(float)  # with ties
    first, last = (rankdata(-means, method=method, axis=1) for method in ("min", "max"))
    found = rank_intervals(means)
    assert found["low"].tolist() == np.quantile(first, 0.025, axis=0, method="inverted_cdf").tolist()
    assert found["high"].tolist() == np.quantile(last, 0.975, axis=0, method="inverted_cdf").tolist()
    np.testing.assert_allclose(found["best"], ((first == 1) / last).mean(axis=0), rtol=1e-12)


def test_what_all_entries_share_cancels():
    values = RNG.normal(size=(20, 3))
    hard = values + 100 * RNG.normal(size=(20, 1))
    plain, shared = one_task(values), one_task(hard)
    np.testing.assert_allclose(np.stack(differences(plain)), np.stack(differences(shared)), atol=1e-9)
    pd.testing.assert_frame_equal(rank_intervals(plain), rank_intervals(shared))


def test_differences_are_those_of_a_bootstrap_of_differences():
    values = RNG.normal(size=(40, 2))
    low, high = differences(one_task(values))
    alone = bootstrap(values[:, 0] - values[:, 1], range(40), "stratum", 0)  # the same draws
    assert (low[0, 1], high[0, 1]) == pytest.approx((alone.low, alone.high), abs=1e-12)
    assert (low[1, 0], high[1, 0]) == pytest.approx((-alone.high, -alone.low), abs=1e-12)


def test_tasks_are_resampled_too():
    # Within a task nothing varies; between the two, A leads by 1 and by 3: a resample's lead is 1, 2 or 3.
    values = np.array([[1.0, 0.0]] * 5 + [[3.0, 0.0]] * 5)
    means = replicates(values, ["a"] * 5 + ["b"] * 5, [*range(5)] * 2, ["s"] * 10)
    shares = [float(np.isclose(means[:, 0], lead).mean()) for lead in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=MONTE_CARLO)


def test_tasks_of_a_stratum_share_their_victims_and_others_do_not():
    victim = RNG.normal(size=50)
    values = np.concatenate([victim, -victim])[:, None]  # what one task gains by a draw, the other loses
    tasks, clusters = ["a"] * 50 + ["b"] * 50, [*range(50)] * 2
    together = replicates(values, tasks, clusters, ["s"] * 100)
    apart = replicates(values, tasks, clusters, ["s"] * 50 + ["r"] * 50)
    both = np.isclose(together, 0)  # wherever each task was drawn once
    assert both.mean() == pytest.approx(0.5, abs=MONTE_CARLO)
    assert np.isclose(apart, 0).mean() == 0


def test_tasks_weigh_the_same_however_many_clusters_they_have():
    values = np.array([[1.0]] * 2 + [[0.0]] * 98)
    means = replicates(values, ["a"] * 2 + ["b"] * 98, range(100), ["x"] * 2 + ["y"] * 98)
    assert means.mean() == pytest.approx(0.5, abs=2 * MONTE_CARLO)


def test_lines_of_one_task_and_cluster_count_once():
    twice = replicates(np.array([[1.0], [3.0], [8.0]]), ["t"] * 3, [0, 0, 1], ["s"] * 3)
    once = replicates(np.array([[2.0], [8.0]]), ["t"] * 2, [0, 1], ["s"] * 2)
    np.testing.assert_array_equal(twice, once)


def test_a_task_in_two_strata_is_refused():
    with pytest.raises(ValueError, match="several strata"):
        replicates(np.ones((2, 1)), ["t"] * 2, [0, 1], ["r", "s"])


def test_the_detectable_difference_is_that_of_a_paired_test():
    # Differences of a standard deviation of 1 over 400 pairs: (1.96 + .84) / 20.
    values = RNG.normal(size=(400, 2)) / np.sqrt(2)
    spread = (values[:, 0] - values[:, 1]).std()
    assert detectable(one_task(values)) == pytest.approx(2.80 * spread / 20, rel=0.06)


def test_entries_are_compared_on_the_trials_that_all_have():
    entries = [pd.Series(RNG.normal(size=n), index=range(n)) for n in (12, 10, 8)]
    means = common(entries)
    expected = one_task(np.stack([entry.to_numpy()[:8] for entry in entries], axis=1))
    np.testing.assert_allclose(means, expected, atol=1e-12)
    assert common([entry[:5] for entry in entries]) is None


def test_a_profile_worked_out_by_hand():
    scores = pd.DataFrame({"a": [1.0, 0.5, 0.0], "b": [0.9, 0.7, np.nan]}, index=["x", "y", "z"])
    found = profiles(scores, [0, 0.1, 0.2])
    assert found["a"].tolist() == pytest.approx([2 / 3, 2 / 3, 1])  # best on x and z; .2 behind on y
    assert found["b"].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])  # best on y; .1 behind on x; none on z

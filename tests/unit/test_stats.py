"""The bootstrap against SciPy's and plain draws; which draws are shared, and which must not be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from leakbench.board.stats import RESAMPLES, bootstrap, resamples
from leakbench.keys import PUBLIC_KEY, seed

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("count", [12, 200])
def test_intervals_are_scipys_up_to_chance(count):
    sums, sizes = RNG.exponential(size=count), RNG.integers(1, 5, size=count)
    clusters = np.repeat(np.arange(count), sizes).tolist()
    own = bootstrap(np.repeat(sums / sizes, sizes), clusters)
    plain = bootstrap(sums, range(count))
    for found, data, statistic in (
        (plain, (sums,), lambda x, axis: x.mean(axis)),
        (own, (sums, sizes), lambda x, n, axis: x.sum(axis) / n.sum(axis)),
    ):
        expected = scipy_stats.bootstrap(
            data, statistic, paired=True, vectorized=True, n_resamples=20_000, method="percentile", random_state=RNG
        ).confidence_interval
        width = expected.high - expected.low
        wider = scipy_stats.t.ppf(0.975, count - 1) / scipy_stats.norm.ppf(0.975) * np.sqrt(count / (count - 1))
        ends = (found.mean + wider * (end - found.mean) for end in (expected.low, expected.high))
        assert found[1:] == pytest.approx(tuple(ends), abs=0.08 * width)  # 2,000 resamples: 2% each


@pytest.mark.parametrize("count", [3, 4, 6, 8, 30])
def test_intervals_of_few_values_hold_the_mean_at_their_level(count):
    rng = np.random.default_rng(count)
    found = [bootstrap(rng.normal(1, 2, count), range(count)) for _ in range(400)]
    assert 0.91 < np.mean([interval.low <= 1 <= interval.high for interval in found]) < 0.985


def test_whatever_has_as_many_clusters_shares_its_draws_and_depends_on_nothing_else():
    values = RNG.normal(size=30)
    first = bootstrap(values, range(30))
    for count in range(2, 20):  # the draws are made anew
        bootstrap(values[:count], range(count))
    assert bootstrap(values, [f"victim {i}" for i in range(30)]) == first
    assert bootstrap(5 - 2 * values, range(30)) == pytest.approx(
        (5 - 2 * first.mean, 5 - 2 * first.high, 5 - 2 * first.low)
    )
    (weights,) = resamples(30)
    assert not weights.flags.writeable


def test_draws_in_parts_are_those_in_one_piece():
    count = 1_300
    drawn = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap")).integers(count, size=(RESAMPLES, count))
    parts = list(resamples(count))
    assert len(parts) > 1
    for i in (0, len(parts[0]), RESAMPLES - 1):
        np.testing.assert_array_equal(np.concatenate(parts)[i], np.bincount(drawn[i], minlength=count))


def test_draws_of_different_names_are_independent():
    values = RNG.normal(size=50)
    one, other = (np.concatenate([w @ values for w in resamples(50, "part", number)]) for number in (0, 1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(RESAMPLES)


@pytest.mark.parametrize("count", [17, 1_300])
def test_intervals_that_rows_hold_are_those_of_their_own_draws_to_the_last_bit(count):
    values = RNG.normal(size=count)
    drawn = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap", "bits", 1)).integers(count, size=(RESAMPLES, count))
    ends = np.quantile(values[drawn].sum(axis=1) / count, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    assert bootstrap(values, range(count), "bits", 1) == (values.mean(), *ends)

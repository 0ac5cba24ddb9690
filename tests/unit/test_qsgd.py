"""QSGD: its grid, its mean, its variance, and its probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.qsgd import QSGD
from update_blocks import context, flat, updates

from leakbench import UserError


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.floats(1e-20, 1e20), st.sampled_from([torch.float32, torch.float64]))
def test_values_are_on_the_grid_next_to_their_own(levels, scale, dtype):
    clean = updates(2, scale=scale, dtype=dtype)
    for name, value in QSGD(levels=levels).update(clean, context(2)).items():
        for before, after in zip(clean[name].flatten(1).double(), value.flatten(1).double(), strict=True):
            unit = before.norm() / levels
            steps, rounded = before / unit, after / unit
            torch.testing.assert_close(rounded, rounded.round(), rtol=1e-6, atol=1e-4)
            assert ((rounded - steps).abs() < 1 + 1e-4).all()
            assert (rounded.sign() * steps.sign() >= 0).all()
        assert value.dtype == dtype


@pytest.mark.parametrize("levels", [1, 4, 16])
def test_it_is_unbiased_and_its_variance_is_that_of_rounding_below_the_papers_bound(levels):
    trials, size = 4000, 50
    stream = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=stream, dtype=torch.float64)
    sent = QSGD(levels=levels).update({"v": vector.expand(trials, size)}, context(trials))["v"]
    unit = vector.norm() / levels
    share = (vector.abs() / unit) % 1
    variance = unit**2 * share * (1 - share)
    error = (variance / trials).sqrt()
    assert ((sent.mean(0) - vector).abs() < 5 * error + 1e-9).all()
    distortion = (sent - vector).square().sum(1)
    assert distortion.mean().item() == pytest.approx(
        variance.sum().item(), abs=5 * (distortion.std() / trials**0.5).item()
    )
    assert distortion.mean() <= min(size / levels**2, math.sqrt(size) / levels) * vector.norm() ** 2


def test_the_likelihood_is_how_often_it_is_sent():
    trials = 20000
    vector = torch.tensor([0.6, -0.75, 0.28], dtype=torch.float64)
    clean, defense = {"v": vector.expand(trials, 3)}, QSGD(levels=2)
    sent = defense.update(clean, context(trials))
    probability = defense.log_likelihood(sent, clean, context(trials)).exp()
    kinds, index, counts = sent["v"].unique(dim=0, return_inverse=True, return_counts=True)
    claimed = torch.stack([probability[index == k][0] for k in range(len(kinds))])
    assert claimed.sum().item() == pytest.approx(1)
    share = counts / trials
    assert ((share - claimed).abs() < 5 * (claimed * (1 - claimed) / trials).sqrt()).all()


def test_what_cannot_have_been_sent_is_less_likely_the_further_away_it_is():
    clean, other = updates(2), updates(2, seed=1)
    sent = QSGD(levels=16).update(clean, context(2))
    halfway = {n: (clean[n] + other[n]) / 2 for n in clean}
    scores = [QSGD(levels=16).log_likelihood(sent, found, None) for found in (clean, halfway, other)]
    assert (scores[0] > scores[1] + 10).all()
    assert (scores[1] > scores[2] + 10).all()
    assert scores[2].isfinite().all()


def test_fine_levels_change_little_a_diverged_update_stays_finite_and_nothing_nothing():
    clean = updates(2)
    near = flat(QSGD(levels=10**9).update(clean, context(2)))
    torch.testing.assert_close(near, flat(clean), rtol=0, atol=1e-6)
    assert flat(QSGD().update(updates(2, scale=1e300), context(2))).isfinite().all()
    nothing = {n: v * 0 for n, v in clean.items()}
    sent = QSGD().update(nothing, context(2))
    assert (flat(sent) == 0).all()
    assert torch.equal(QSGD().log_likelihood(sent, nothing, None), torch.zeros(2, dtype=torch.float64))


def test_fewer_levels_than_one_are_refused():
    with pytest.raises(UserError, match=r"levels: expected at least 1, got 0; write"):
        QSGD(levels=0)

"""Laplace noise against scipy's and torch's Laplace distribution."""

from __future__ import annotations

import pytest
import torch
from leakbench_baselines.defenses.laplace_noise import LaplaceNoise
from scipy import stats
from torch.distributions import Laplace
from update_blocks import context, flat, updates

from leakbench import UserError

TRIALS = 6


def rms(value):
    return value.square().flatten(1).mean(1).sqrt().view(-1, *(1,) * (value.dim() - 1))


@pytest.mark.parametrize("relative", [False, True])
def test_noise_has_the_laplace_law_and_twice_the_square_of_its_scale_as_variance(relative):
    clean = updates(TRIALS, scale=3.0)
    sent = LaplaceNoise(scale=0.2, relative=relative).update(clean, context(TRIALS))
    unit = {n: 0.2 * (rms(v) if relative else torch.ones(())) for n, v in clean.items()}
    noise = flat({n: (sent[n] - clean[n]) / unit[n] for n in clean}).flatten()
    assert stats.kstest(noise.numpy(), stats.laplace.cdf).pvalue > 1e-3
    # The variance of a squared Laplace draw is 24 - 4, so six standard errors:
    assert noise.square().mean().item() == pytest.approx(2, abs=6 * (20 / len(noise)) ** 0.5)
    assert noise.mean().item() == pytest.approx(0, abs=6 * (2 / len(noise)) ** 0.5)


@pytest.mark.parametrize("relative", [False, True])
def test_the_likelihood_is_torchs(relative):
    defense, clean = LaplaceNoise(scale=0.3, relative=relative), updates(TRIALS)
    sent = defense.update(clean, context(TRIALS))
    expected = sum(
        Laplace(v, 0.3 * (rms(v) if relative else torch.ones(()))).log_prob(sent[n]).flatten(1).sum(1)
        for n, v in clean.items()
    )
    torch.testing.assert_close(defense.log_likelihood(sent, clean, context(TRIALS)), expected)
    other = updates(TRIALS, seed=1)
    assert (defense.log_likelihood(sent, clean, None) > defense.log_likelihood(sent, other, None)).all()


def test_the_noise_is_the_same_in_direction_at_every_strength_and_another_in_every_round():
    clean = {n: v * 0 for n, v in updates(TRIALS).items()}
    weak, strong = (flat(LaplaceNoise(scale=s).update(clean, context(TRIALS))) for s in (0.1, 0.4))
    torch.testing.assert_close(4 * weak, strong)
    other = flat(LaplaceNoise(scale=0.1).update(clean, context(TRIALS, seed=1)))
    assert torch.corrcoef(torch.stack([weak.flatten(), other.flatten()]))[0, 1].abs() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_nothing_changes(dtype):
    clean = updates(2, dtype=dtype)
    sent = LaplaceNoise(scale=0.0).update(clean, context(2))
    assert all(torch.equal(sent[n], v) for n, v in clean.items())
    assert all(v.dtype == dtype for v in LaplaceNoise().update(clean, context(2)).values())


def test_what_has_no_noise_has_no_likelihood_and_a_negative_scale_is_refused():
    with pytest.raises(UserError, match="no likelihood"):
        LaplaceNoise(scale=0.0).log_likelihood(updates(2), updates(2), context(2))
    with pytest.raises(UserError, match=r"scale: expected at least 0, got -1; write"):
        LaplaceNoise(scale=-1)

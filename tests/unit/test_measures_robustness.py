"""Reconstruction robustness against published closed forms, independent integration, and an attacker who meets it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dp_sgd import DPSGD
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from measure_subjects import subject
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.datasets import load_digits

from leakbench import NotApplicable, UserError
from leakbench.accounting import gdp_delta, gdp_epsilon
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.measures.robustness import (
    f_dp_accuracy,
    gaussian_gamma,
    poisson_gamma,
    robustness,
    sampled_gamma,
    zcdp_gamma,
)
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, Protocol

FULL_BATCH = [(0.1, 1, 1, 0.3891), (0.1, 10, 100, 0.3891), (0.01, 5, 25, 0.0924), (1 / 8, 27, 100, 0.2177)]
SAMPLED = [(0.1, 0.7, 50, 0.1), (0.5, 2, 10, 0.3), (0.01, 1.0, 100, 0.05), (0.1, 1, 1, 0.01)]


@pytest.mark.parametrize(("kappa", "noise", "steps", "expected"), FULL_BATCH)
def test_full_batches_have_their_closed_form(kappa, noise, steps, expected):
    assert gaussian_gamma(kappa, math.sqrt(steps) / noise) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("kappa", "mu", "loose", "tight"), [(0.1, 1, 0.5186, 0.3891), (0.01, 1, 0.1261, 0.0924), (0.01, 2, 0.5854, 0.3721)]
)
def test_zcdp_is_looser(kappa, mu, loose, tight):
    assert zcdp_gamma(kappa, mu**2 / 2) == pytest.approx(loose, abs=1e-4)
    assert gaussian_gamma(kappa, mu) == pytest.approx(tight, abs=1e-4)


@pytest.mark.parametrize(("kappa", "noise", "steps", "expected"), FULL_BATCH)
def test_both_numerical_ways_give_the_closed_form(kappa, noise, steps, expected):
    exact = gaussian_gamma(kappa, math.sqrt(steps) / noise)
    assert 0 <= poisson_gamma(kappa, noise, steps, 1) - exact < 1e-6
    assert sampled_gamma(kappa, noise, steps, 1, samples=200_000) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("kappa", "noise", "steps", "rate"), SAMPLED)
def test_both_ways_agree_under_sampling(kappa, noise, steps, rate):
    assert sampled_gamma(kappa, noise, steps, rate, samples=200_000) == pytest.approx(
        poisson_gamma(kappa, noise, steps, rate), abs=5e-3
    )


def test_a_published_setting_under_sampling():
    """kappa .1, q .01, noise 1, 1000 steps: .192 by Monte Carlo with 5e4 samples, so within 5e-3."""
    assert poisson_gamma(0.1, 1, 1000, 0.01) == pytest.approx(0.192, abs=5e-3)


def test_one_sampled_step_is_the_neyman_pearson_test():
    kappa, noise, rate = 0.1, 0.8, 0.3
    x = norm.isf(kappa, scale=noise)  # the loss rises with x
    expected = (1 - rate) * kappa + rate * norm.sf((x - 1) / noise)
    assert poisson_gamma(kappa, noise, 1, rate) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("noise", "steps", "rate"), [(0.05, 1, 1), (0.05, 100, 0.001), (1, 5000, 1), (500, 3, 0.5)])
def test_extreme_settings_stay_numbers(noise, steps, rate):
    exact = gaussian_gamma(0.1, math.sqrt(steps) / noise)
    assert 0.1 - 1e-6 <= poisson_gamma(0.1, noise, steps, rate) <= exact + 1e-6


@settings(deadline=None, max_examples=10)
@given(st.floats(0.01, 0.9), st.floats(0.6, 20), st.integers(1, 500), st.floats(0.001, 1))
def test_sampling_helps_and_no_bound_is_below_the_blind_guess(kappa, noise, steps, rate):
    found = poisson_gamma(kappa, noise, steps, rate)
    assert kappa - 1e-6 <= found <= gaussian_gamma(kappa, math.sqrt(steps) / noise) + 1e-6


@pytest.mark.parametrize(("mu", "epsilon"), [(0.3, 0.1), (1.0, 1.5), (3.0, 2.0), (12.0, 60.0)])
def test_delta_is_the_integral_of_what_exceeds(mu, epsilon):
    def exceeds(x):
        return max(0.0, norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x))

    crossing = epsilon / mu + mu / 2
    expected, _ = quad(exceeds, crossing, max(crossing, mu) + 12, epsabs=1e-13)
    assert gdp_delta(mu, epsilon) == pytest.approx(expected, abs=1e-9)
    assert gdp_epsilon(mu, gdp_delta(mu, epsilon)) == pytest.approx(epsilon, rel=1e-6)


def test_epsilon_at_both_ends():
    assert gdp_epsilon(0.0, 1e-5) == 0
    assert gdp_epsilon(1e-6, 1e-5) == 0
    with pytest.raises(UserError, match="got 0; write delta=1e-5"):
        gdp_epsilon(1.0, 0)
    assert gdp_delta(200.0, gdp_epsilon(200.0, 1e-5)) == pytest.approx(1e-5, rel=1e-3)


def test_the_best_accuracy_is_that_of_a_threshold():
    for mu in (0.0, 0.5, 2.0):
        threshold = max((norm.cdf(c) + norm.sf(c, loc=mu)) / 2 for c in np.linspace(-5, 5, 2001))
        assert f_dp_accuracy(mu) == pytest.approx(threshold, abs=1e-6)


def test_the_measure_reads_the_declared_mechanism():
    own = subject(parts=[DPSGD(clip=0.3, noise_multiplier=2)], batch=4, protocol=Protocol(rounds=4))
    found = {name: profile.values for name, profile in robustness(own, kappa=0.2).items()}
    assert {tuple(value.shape) for value in found.values()} == {(2, 1)}
    values = {name: float(value[0]) for name, value in found.items()}
    # Four rounds, noise of twice the clipping bound: mu is 1 from the center, 2 between the ends, 4 times that in all.
    assert values["rero_gamma_example"] == pytest.approx(gaussian_gamma(0.2, 1))
    assert values["rero_gamma_update"] == pytest.approx(gaussian_gamma(0.2, 4))
    assert values["membership_accuracy_bound"] == pytest.approx(norm.cdf(1))
    assert values["attribute_accuracy_bound"] == pytest.approx(norm.cdf(4))
    assert values["epsilon"] == pytest.approx(gdp_epsilon(2, 1e-5))
    clipped = robustness(subject(parts=[ClipL2(bound=3), GaussianNoise(std=6)]), kappa=0.2)
    assert float(clipped["rero_gamma_example"].values[0]) == pytest.approx(gaussian_gamma(0.2, 0.5))


@pytest.mark.parametrize("parts", [[], [GaussianNoise()], [ClipL2()], [DPSGD(noise_multiplier=0)]])
def test_without_noise_and_bound_there_is_no_bound(parts):
    with pytest.raises(NotApplicable, match="noise"):
        robustness(subject(parts=parts))


def test_a_kappa_that_is_no_probability_is_refused():
    with pytest.raises(UserError, match=r"expected a probability in \(0, 1\), got 1"):
        robustness(subject(parts=[DPSGD()]), kappa=1)


def success(candidates, labels, classes, noise, models, trials):
    """Play the prior-aware attack of Hayes et al. 2023: everything is known but which candidate is in the batch.

    Returns:
        Share of the trials in which the candidate is named.
    """
    net = Architecture(name="mlp", params={"depth": 0})
    rest, rest_labels = torch.tensor(load_digits().images[500:503])[:, None] / 16, torch.tensor([0, 1, 1])
    truth = torch.arange(trials) % len(candidates)
    scores = torch.zeros(trials, len(candidates), dtype=torch.float64)
    for seed in range(models):
        model = build_model(net, (1, 8, 8), classes, seeds=[seed]).to(dtype=torch.float64)

        def send(multiplier, picks, model=model, seed=seed):
            own = candidates[picks][:, None], labels[picks][:, None]
            inputs = torch.cat([own[0], rest.expand(len(picks), -1, -1, -1, -1)], 1)
            chain = DefenseChain([DPSGD(clip=0.1, noise_multiplier=multiplier)])
            streams = TrialRandom((torch.arange(4 * len(picks)) + 10**6 * seed).view(torch.uint8).view(-1, 32))
            sent = Client(Protocol(reduction="sum"), 4, chain).update(
                model, inputs, torch.cat([own[1], rest_labels.expand(len(picks), -1)], 1), random=streams
            )
            return torch.cat([value.flatten(1) for value in sent.values()], 1)

        clean = send(0, torch.arange(len(candidates)))
        scores += send(noise, truth) @ clean.T - clean.square().sum(1) / 2
    return float((scores.argmax(1) == truth).double().mean())


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_two_opposite_candidates_meet_the_bound(mu):
    """T8: with two classes and no hidden layer the two labels pull in opposite directions, to the clipping bound."""
    image = torch.tensor(load_digits().images[:1])[:, None] / 16
    found = success(image.expand(2, -1, -1, -1), torch.tensor([0, 1]), 2, math.sqrt(2) / mu, 2, 4000)
    gamma = gaussian_gamma(0.5, mu)
    error = math.sqrt(gamma * (1 - gamma) / 4000)
    assert abs(found - gamma) <= 3 * error


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_eight_digits_stay_below_the_bound_and_come_near(mu):
    """T8: candidates of a real task, exact match, kappa 1/8."""
    data = load_digits()
    found = success(
        torch.tensor(data.images[:8])[:, None] / 16, torch.tensor(data.target[:8]), 10, math.sqrt(2) / mu, 2, 4000
    )
    gamma = gaussian_gamma(1 / 8, mu)
    error = math.sqrt(gamma * (1 - gamma) / 4000)
    assert 0.8 * gamma <= found <= gamma + 3 * error

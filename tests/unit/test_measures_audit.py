"""Audits against published values, exact tails, and mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dp_sgd import DPSGD
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from measure_subjects import subject as plain_subject
from scipy.stats import binomtest, norm

from leakbench import NotApplicable
from leakbench.accounting import gdp_delta
from leakbench.measures.audit import (
    coins_and_scores,
    empirical_epsilon,
    gdp_run_epsilon,
    multi_run_epsilon,
    one_run_epsilon,
)
from leakbench.measures.robustness import f_dp_accuracy, robustness
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, Protocol

pytestmark = pytest.mark.usefixtures("one_thread")


def subject(*args, trials=2, **options):
    """Return a subject whose trials have streams of their own, however many they are."""
    seeds = torch.arange(4 * trials).view(torch.uint8).view(trials, 32)
    return plain_subject(*args, trials=trials, random=TrialRandom(seeds), **options)


def value(profiles, name):
    return float(profiles[name].values[0])


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "expected"),
    [
        (1000, 100, 100, 1e-5, 3.465),
        (1000, 100, 95, 1e-5, 2.165),
        (1000, 1000, 600, 1e-5, 0.297),
        (1000, 100, 100, 0, 3.493),
        (100, 100, 75, 0, 0.702),
    ],
)
def test_one_run_has_its_known_values(canaries, guesses, correct, delta, expected):
    """T5."""
    assert one_run_epsilon(canaries, guesses, correct, delta) == pytest.approx(expected, abs=1e-3)


def test_all_right_has_a_closed_form_and_none_right_proves_nothing():
    for guesses in (20, 100, 5000):
        chance = 0.05 ** (1 / guesses)
        expected = math.log(chance / (1 - chance))
        assert one_run_epsilon(guesses, guesses, guesses, 0) == pytest.approx(expected, rel=1e-6)
    assert one_run_epsilon(10, 10, 0, 1e-5) == 0
    assert one_run_epsilon(10, 10, 5, 1e-5) == 0


def test_one_run_is_refuted_too_high_at_most_as_often_as_stated():
    """Randomised response is exactly epsilon-DP: its guesses are right with probability e^eps / (1 + e^eps)."""
    rng, epsilon = np.random.default_rng(0), 1.5
    right = rng.binomial(200, 1 / (1 + math.exp(-epsilon)), size=2000)
    limits = {v: one_run_epsilon(200, 200, int(v), 0) for v in set(right)}
    share = np.mean([limits[v] > epsilon for v in right])
    assert 0.02 < share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_multi_run_is_the_ratio_of_its_limits():
    hit = binomtest(90, 100).proportion_ci(0.95, method="exact").low
    alarm = binomtest(4, 100).proportion_ci(0.95, method="exact").high
    assert multi_run_epsilon(90, 100, 4, 100, 1e-5) == pytest.approx(math.log((hit - 1e-5) / alarm))
    # Few misses count as much as few alarms.
    assert multi_run_epsilon(96, 100, 10, 100, 1e-5) == pytest.approx(multi_run_epsilon(90, 100, 4, 100, 1e-5))
    mu = norm.isf(alarm) - norm.isf(hit)
    assert gdp_delta(mu, gdp_run_epsilon(90, 100, 4, 100, 1e-5)) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("runs", [(0, 0, 0, 0), (0, 10, 0, 10), (10, 10, 10, 10), (0, 10, 10, 10), (5, 10, 5, 10)])
def test_rates_that_say_nothing_prove_nothing(runs):
    assert multi_run_epsilon(*runs, 1e-5) == 0
    assert gdp_run_epsilon(*runs, 1e-5) == 0


def other_examples(batch, trials=60):
    auxiliary = subject(trials=trials, batch=batch)
    auxiliary.images = torch.rand(auxiliary.images.shape, generator=torch.Generator().manual_seed(9)).double()
    auxiliary.labels = (auxiliary.labels + 1) % 5
    return auxiliary


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("protocol", [Protocol(), Protocol(sends="delta", lr=0.3, reduction="sum")])
def test_of_dp_sgd_no_more_is_found_than_is_proved(noise, protocol):
    parts = [DPSGD(clip=0.5, noise_multiplier=noise)]
    own = subject(trials=60, batch=6, parts=parts, protocol=protocol, auxiliary=other_examples(6))
    found, proved = empirical_epsilon(own), robustness(own)
    epsilon = float(proved["epsilon"].values[0])
    for name in ("one_run_epsilon", "multi_run_epsilon", "gdp_run_epsilon"):
        assert 0 <= value(found, name) <= epsilon
    assert float(found["audit_accuracy"].low[0]) <= float(proved["membership_accuracy_bound"].values[0])
    if noise < 1:
        assert value(found, "one_run_epsilon") > 1


def test_a_promise_that_is_not_kept_is_caught():
    class Broken(DPSGD):
        """Adds a twentieth of the noise it declares."""

        def step(self, grads, ctx):
            quiet = DPSGD(clip=self.clip, noise_multiplier=self.noise_multiplier / 20)
            return quiet.step(grads, ctx)

    own = subject(trials=60, batch=6, parts=[Broken(clip=0.5, noise_multiplier=3)], auxiliary=other_examples(6))
    assert value(empirical_epsilon(own), "one_run_epsilon") > float(robustness(own)["epsilon"].values[0])


def test_two_opposite_examples_show_all_that_the_mechanism_allows():
    """With two classes and no hidden layer, an image's two labels pull in opposite directions to the clipping bound."""
    trials, noise = 1500, 1.0
    model = build_model(Architecture(name="mlp", params={"depth": 0}), (1, 4, 4), 2, seeds=[0]).to(dtype=torch.float64)
    own = subject(trials=trials, batch=1, parts=[DPSGD(clip=0.01, noise_multiplier=noise)], model=model)
    own.labels = torch.zeros_like(own.labels)
    own.auxiliary = subject(trials=trials, batch=1, model=model)
    own.auxiliary.images, own.auxiliary.labels = own.images, torch.ones_like(own.labels)
    found = empirical_epsilon(own, guesses=1.0)
    best = f_dp_accuracy(2 / noise)
    assert value(found, "audit_accuracy") == pytest.approx(best, abs=3 * math.sqrt(best * (1 - best) / trials))
    epsilon = float(robustness(own)["epsilon"].values[0])
    assert 0.8 * epsilon < value(found, "gdp_run_epsilon") <= epsilon


@pytest.mark.parametrize(
    "protocol",
    [Protocol(), Protocol(clients=3, secure_aggregation=True, weighting="examples"), Protocol(sends="weights", lr=0.2)],
)
def test_without_a_defense_every_coin_is_read(protocol):
    own = subject(trials=20, batch=4, protocol=protocol, auxiliary=other_examples(4, 7))
    own.auxiliary.images = torch.rand(7, *own.images.shape[1:], generator=torch.Generator().manual_seed(2)).double()
    own.auxiliary.labels = own.labels[:7].roll(1, 0)
    included, scores = coins_and_scores(own, own.auxiliary)
    assert 0.3 < included.double().mean() < 0.7
    torch.testing.assert_close(scores, 2 * included.double() - 1, rtol=0, atol=1e-4)
    found = empirical_epsilon(own, guesses=1.0, delta=1e-9)
    assert value(found, "one_run_epsilon") == pytest.approx(
        one_run_epsilon(included.numel(), included.numel(), included.numel(), 1e-9)
    )
    assert value(found, "audit_accuracy") == 1


def test_noise_that_drowns_the_update_leaves_nothing():
    parts = [ClipL2(bound=0.01), GaussianNoise(std=100)]
    found = empirical_epsilon(subject(trials=60, batch=6, parts=parts, auxiliary=other_examples(6)))
    assert value(found, "one_run_epsilon") < 0.1
    assert float(found["audit_accuracy"].low[0]) < 0.55


def test_what_it_cannot_audit_it_says():
    with pytest.raises(NotApplicable, match="auxiliary"):
        empirical_epsilon(subject())
    own = subject("resnet20", protocol=Protocol(batch_norm="train"), auxiliary=subject("resnet20"))
    with pytest.raises(NotApplicable, match="batch_norm: eval"):
        empirical_epsilon(own)

"""Epsilon against Opacus, against closed forms, and against what clients do."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dp_sgd import DPSGD
from leakbench_baselines.defenses.fed_cdp import FedCDP
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.local_steps import LocalSteps
from leakbench_baselines.defenses.mixup import Mixup
from opacus.accountants import create_accountant
from scipy.stats import norm

from leakbench import UserError
from leakbench.accounting import account, chain_epsilon, chain_mu, epsilon, gdp_delta, gdp_epsilon
from leakbench.chain import DefenseChain
from leakbench.tasks import Protocol

DELTA = 1e-5
SETTINGS = [(1.0, 0.01, 1000), (0.6, 0.05, 100), (4.0, 1.0, 50)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
@pytest.mark.parametrize(("noise", "rate", "steps"), SETTINGS)
def test_epsilon_is_that_of_opacus_stepped_as_its_engine_does(accountant, noise, rate, steps):
    opacus = create_accountant(accountant)
    for _ in range(steps):
        opacus.step(noise_multiplier=noise, sample_rate=rate)
    if (accountant, rate) == ("prv", 1.0):
        assert 0 <= opacus.get_epsilon(DELTA) - epsilon(noise, rate, steps, DELTA) <= 0.02
    else:
        assert epsilon(noise, rate, steps, DELTA, accountant) == pytest.approx(opacus.get_epsilon(DELTA), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 50), (0.2, 1), (0.05, 1), (0.5, 20)])
def test_the_numerical_accountant_meets_the_closed_form_where_next_to_nothing_is_sampled(noise, steps):
    # n Gaussian mechanisms of mu = 1 / z compose to one of sqrt(n) / z exactly; a rate of 1 - 1e-9 is still PRV's.
    exact, how = account(noise, 1.0, steps, DELTA)
    assert how == "exact"
    assert exact == gdp_epsilon(steps**0.5 / noise, DELTA)
    numerical, how = account(noise, 1 - 1e-9, steps, DELTA)
    assert how == "prv"
    assert exact <= numerical <= exact + 0.02
    assert epsilon(noise, 1.0, steps, DELTA, "rdp") > exact
    assert epsilon(200.0, 1.0, steps * 40_000, DELTA, "rdp") > gdp_epsilon(steps**0.5, DELTA)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "how"),
    [
        (0.05, 1.0, 1000, "exact"),
        (1e-9, 1.0, 1, "exact"),
        (0.1, 1.0, 80, "exact"),
        (0.3, 0.001, 100_000, "prv"),
        (0.05, 0.01, 1000, "rdp"),
        (1e-9, 0.01, 1, "rdp"),
        (10.0, 0.5, 10**6, "rdp"),
        (1e6, 0.5, 1000, "rdp"),
    ],
)
def test_little_noise_and_many_steps_have_an_epsilon_between_bounds(noise, rate, steps, how):
    found, used = account(noise, rate, steps, DELTA)
    assert used == how
    # Sampling and one step less take from what is spent; Renyi's bound is looser by its conversion.
    every = gdp_epsilon(steps**0.5 / noise, DELTA)
    assert found <= max(every * 1.01, every + 1)
    assert found <= epsilon(noise, rate, steps, DELTA, "rdp")
    assert found >= one_step(noise, rate) - 1e-9


def one_step(noise, rate):
    """Return epsilon of one sampled step, exactly: delta is q delta' at exp(epsilon) = 1 + q (exp(epsilon') - 1)."""
    alone = gdp_epsilon(1 / noise, DELTA / rate)
    return math.log1p(rate * math.expm1(alone)) if alone < 700 else alone + math.log(rate)


@pytest.mark.parametrize(("noise", "rate"), [(0.05, 0.01), (0.2, 0.5), (1.0, 0.01), (3.0, 0.9)])
def test_one_sampled_step_meets_its_closed_form(noise, rate):
    found, used = account(noise, rate, 1, DELTA)
    assert used == "prv"
    assert one_step(noise, rate) <= found <= one_step(noise, rate) + 0.02
    assert found < epsilon(noise, rate, 1, DELTA, "rdp")


def test_the_renyi_bound_of_much_loss_is_near_its_mean():
    # 1e6 steps of sampled loss with KL = E log((1 - q) + q r) under P; epsilon exceeds the mean by few deviations.
    noise, rate, steps = 1.0, 0.5, 10**6
    x = torch.linspace(-12, 13, 200_001, dtype=torch.float64)
    base, moved = (torch.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (0, 1))
    mixed = (1 - rate) * base + rate * moved
    kl = torch.trapezoid(mixed * (mixed / base).log(), x).item()
    found = epsilon(noise, rate, steps, DELTA, "rdp")
    assert kl * steps < found < 1.05 * kl * steps


@pytest.mark.parametrize("mu", [1e3, 1e5, 0.99e6, 1.01e6, 1e9, 1e100])
def test_gdp_epsilon_of_a_large_mu_is_its_expansion(mu):
    # delta is ndtr(mu / 2 - epsilon / mu) but for a term of order 1 / mu.
    cut = -norm.ppf(DELTA)
    assert gdp_epsilon(mu, DELTA) == pytest.approx(mu * mu / 2 + mu * cut, abs=mu * 1e-2, rel=1e-11)
    assert gdp_epsilon(mu, DELTA) <= (mu * mu / 2 + mu * cut) * (1 + 1e-15)
    if mu <= 1e5:
        assert gdp_delta(mu, gdp_epsilon(mu, DELTA)) == pytest.approx(DELTA, rel=1e-4)


@pytest.mark.parametrize(("mu", "delta"), [(0.1, 1e-5), (1.0, 1e-5), (1.0, 0.1), (6.0, 1e-8), (40.0, 1e-5)])
def test_gdp_epsilon_is_where_the_best_test_gains_delta(mu, delta):
    # Of N(0, 1) and N(mu, 1) the most powerful event at epsilon is x > c with likelihood ratio exp(epsilon).
    eps = gdp_epsilon(mu, delta)
    cut = eps / mu + mu / 2
    power, level = norm.sf(cut - mu), math.exp(eps + norm.logsf(cut))
    assert power - level == pytest.approx(delta, rel=1e-6)
    points = torch.linspace(-10, 50, 2001, dtype=torch.float64).numpy()
    assert (norm.sf(points - mu) - math.exp(min(eps, 700)) * norm.sf(points)).max() <= delta * (1 + 1e-6) or eps > 700


def test_gdp_epsilon_at_the_ends():
    assert gdp_epsilon(0.0, DELTA) == 0
    assert gdp_epsilon(math.inf, DELTA) == math.inf
    total_variation = 2 * norm.cdf(0.25) - 1
    assert gdp_epsilon(0.5, total_variation * 1.001) == 0
    assert gdp_epsilon(0.5, total_variation * 0.999) > 0


def test_no_step_promises_everything():
    assert epsilon(1.0, 0.5, 0, DELTA) == 0


def mu(parts, protocol=None, layers=None):
    return chain_mu(DefenseChain(parts), protocol or Protocol(), 8, layers=layers)


@pytest.mark.parametrize(
    ("protocol", "times"),
    [
        (Protocol(), 1),
        (Protocol(reduction="sum", rounds=5), 5),
        (Protocol(sends="delta", lr=0.3), 1),
        (Protocol(sends="delta", local_steps=6, batches="same"), 6),
        (Protocol(sends="weights", local_steps=6, rounds=3), 3),
        (Protocol(sends="delta", local_steps=6, batches="epochs", batches_per_epoch=2, rounds=2, momentum=0.9), 6),
    ],
)
def test_dp_sgd_promises_two_over_z_for_every_step_that_has_the_example(protocol, times):
    assert mu([DPSGD(clip=0.7, noise_multiplier=4)], protocol) == pytest.approx(2 / 4 * times**0.5)


def test_epsilon_of_a_chain_is_that_of_opacus_for_the_same_sensitivity():
    # Replacing moves the sum by 2 C where adding moves it by C: half the noise multiplier, nothing sampled.
    chain = DefenseChain([DPSGD(noise_multiplier=8)])
    protocol = Protocol(sends="delta", local_steps=10, batches="same", rounds=4)
    found = chain_epsilon(chain, protocol, 8, DELTA)
    assert found == pytest.approx(epsilon(4.0, 1.0, 40, DELTA), abs=0.02)
    assert found <= epsilon(4.0, 1.0, 40, DELTA)


def test_fed_cdp_pays_for_each_layer():
    assert mu([FedCDP(clip=4, noise_multiplier=3)], layers=5) == pytest.approx(2 * 5**0.5 / 3)
    assert mu([FedCDP(clip=4, noise_multiplier=3)]) is None


def test_noise_on_a_clipped_update():
    parts = [ClipL2(bound=0.5), GaussianNoise(std=0.25)]
    assert mu(parts) == pytest.approx(4)
    assert mu(parts, Protocol(sends="delta", local_steps=3, rounds=4)) == pytest.approx(8)


def test_what_follows_noisy_steps_takes_nothing_away():
    protocol = Protocol(sends="delta", local_steps=4, batches="same")
    assert mu([DPSGD(noise_multiplier=2), ClipL2(bound=0.1)], protocol) == pytest.approx(2)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [GaussianNoise(std=1.0)],
        [DPSGD(noise_multiplier=0)],
        [ClipL2(bound=1.0)],
        [DPSGD(), Mixup()],
        [LocalSteps(steps=2), DPSGD()],
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_unbounded_sensitivity_or_no_noise_has_no_epsilon(parts, steps):
    protocol = Protocol(sends="delta", local_steps=steps, batches="same")
    assert chain_epsilon(DefenseChain(parts), protocol, 8, DELTA) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1.0, 0.1, 1, DELTA), "noise_multiplier"),
        ((0.0, 0.1, 1, DELTA), "noise_multiplier"),
        ((math.inf, 0.1, 1, DELTA), "noise_multiplier"),
        ((math.nan, 0.1, 1, DELTA), "noise_multiplier"),
        ((1e-200, 0.1, 1, DELTA), "noise_multiplier"),
        ((1e200, 0.1, 1, DELTA, "rdp"), "noise_multiplier"),
        ((1.0, math.nan, 1, DELTA), "sample_rate"),
        ((1.0, 0.1, 10**400, DELTA), "steps"),
        ((1.0, 0.1, 1, math.nan), "delta"),
        ((1.0, 0.0, 1, DELTA), "sample_rate"),
        ((1.0, 0.1, -1, DELTA), "steps"),
        ((1.0, 0.1, 1, 0.0), "delta"),
        ((1.0, 0.1, 1, DELTA, "zcdp"), "accountant"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        epsilon(*arguments)
    with pytest.raises(UserError, match="mu"):
        gdp_epsilon(-1, DELTA)


def test_the_module_imports_no_torch():
    code = "import sys, leakbench.accounting as a; a.gdp_epsilon(1, .1); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("options", "numbers", "said"),
    [
        ("--noise-multiplier 1", ["4.377", "9.997"], "closed form"),
        ("--noise-multiplier 1 --sample-rate 0.01 --steps 1000", ["1.838", "2269"], "prv accountant"),
        ("--noise-multiplier 1e-9 --sample-rate 0.01", ["5.005e+17", "2e+18"], "rdp accountant (out of prv's reach)"),
    ],
)
def test_the_command_prints_both_readings_and_the_accountant(leakbench, options, numbers, said):
    code, out, _ = leakbench("epsilon", *options.split())
    assert code == 0
    first, second = out.splitlines()
    assert [first.split()[0], second.split()[0]] == numbers
    assert first.endswith(said)


def test_the_command_refuses_in_one_line(leakbench):
    for noise in ("inf", "nan", "0", "1e-200"):
        code, _, err = leakbench("epsilon", "--noise-multiplier", noise, "--sample-rate", "0.5")
        assert code == 2
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1

"""Fisher information measures against closed forms, explicit Jacobians and attackers that are played out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.dp_sgd import DPSGD
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.topk import TopK
from measure_subjects import exact, subject
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits

from leakbench import NotApplicable
from leakbench.measures.fisher import (
    LARGEST,
    bayes_cramer_rao,
    cramer_rao,
    fisher,
    ledoit_wolf_precision,
    reference_fisher,
    unbiased_error,
    van_trees,
)
from leakbench.measures.subject import ALL
from leakbench.tasks import Protocol

pytestmark = pytest.mark.usefixtures("one_thread")

NOISE = [GaussianNoise(std=0.02)]
PROTOCOLS = {
    "gradient": Protocol(),
    "delta": Protocol(sends="delta", lr=0.3),
    "rounds": Protocol(rounds=3),
    "cohort": Protocol(clients=3, secure_aggregation=True, weighting="examples"),
}


def column(profile, layer=ALL):
    return profile.values[:, profile.layers.index(layer)]


@pytest.mark.parametrize(("d", "seed"), [(2, 0), (5, 1), (40, 2)])
def test_linear_regression_has_its_closed_form(d, seed):
    """T1: loss .5 (w.x - y)^2, g = r x, J = r I + x w^T with r = w.x - y."""
    w, x = torch.randn(2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r, std = w @ x - 0.7, 0.3
    jacobian = torch.autograd.functional.jacobian(lambda x: (w @ x - 0.7) * x, x)
    inverse = (torch.eye(d, dtype=torch.float64) - torch.outer(x, w) / (r + w @ x)) / r
    information = jacobian.T @ jacobian / std**2
    bound = float(unbiased_error(information[None]))
    assert bound == pytest.approx(float(std**2 / d * inverse.square().sum()), rel=1e-9)
    dfil = float(d * r**2 + 2 * r * (w @ x) + (x @ x) * (w @ w)) / (d * std**2)
    assert dfil == pytest.approx(float(information.trace()) / d, rel=1e-12)
    assert 1 / dfil <= bound


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_they_are_those_of_the_explicit_jacobian(protocol):
    own = subject(protocol=PROTOCOLS[protocol], parts=NOISE)
    rounds, weights = own.cohort.protocol.rounds, torch.tensor(own.cohort.weights, dtype=torch.float64)
    std = 0.02 * float((weights / weights.sum()).norm()) / rounds**0.5
    found, jacobian, d = fisher(own, probes=1000), exact(own), own.images[0].numel()
    for layer in own.layers:
        expected = jacobian[layer].square().sum((1, 2)) / (d * std**2)
        torch.testing.assert_close(column(found["dfil"], layer), expected, rtol=1e-5, atol=1e-9)
    whole = torch.linalg.svdvals(jacobian[ALL])
    torch.testing.assert_close(column(found["fil_eta"]), whole[:, 0] / std, rtol=1e-5, atol=0)
    torch.testing.assert_close(column(found["dfil"]), whole.square().mean(1) / std**2, rtol=1e-5, atol=0)
    torch.testing.assert_close(column(found["mse_bound_unbiased"]), std**2 / whole.square().mean(1), rtol=1e-5, atol=0)


def test_few_probes_are_within_their_stated_error():
    own = subject("lenet", parts=NOISE, trials=8)
    estimates, true = (column(fisher(own, probes=k)["dfil"]) for k in (32, 1000))
    error = estimates / true - 1
    assert 1e-4 < error.square().mean().sqrt() < math.sqrt(2 / 32)


def test_the_cramer_rao_bound_is_what_least_squares_reaches():
    own = subject(parts=NOISE, batch=1, trials=2)
    found = column(cramer_rao(own)["mse_bound_cramer_rao"])
    jacobian = exact(own)[ALL]
    noise = 0.02 * torch.randn(2, jacobian.shape[1], 4000, generator=torch.Generator().manual_seed(0)).double()
    errors = (torch.linalg.pinv(jacobian) @ noise).square().mean((1, 2))
    torch.testing.assert_close(errors, found, rtol=0.1, atol=0)
    trace = column(fisher(own, probes=1000)["mse_bound_unbiased"])
    assert (trace <= found).all()  # harmonic mean and arithmetic mean


def test_where_a_pixel_is_not_seen_no_unbiased_attacker_exists():
    information = torch.diag_embed(torch.tensor([[4.0, 1.0], [4.0, 0.0], [0.0, 0.0]]))
    assert unbiased_error(information).tolist() == [0.625, LARGEST, LARGEST]
    own = subject(parts=NOISE, batch=20)  # 320 pixels, 143 parameters
    with pytest.raises(NotApplicable, match="at most 256 pixels, got 320"):
        cramer_rao(own)
    assert (cramer_rao(own, exact=320)["mse_bound_cramer_rao"].values == LARGEST).all()


def test_clipping_hides_what_is_only_length():
    """Scaled to the bound, a gradient's change along itself is gone: J_clip = C / |g| (I - g g^T / |g|^2) J."""
    bare = subject(batch=1)
    own = subject(batch=1, parts=[DPSGD(clip=0.01, noise_multiplier=2)])
    g, jacobian = torch.cat(list(bare.by_layer(bare.update()).values()), 1), exact(bare)[ALL]
    unit = g / g.norm(dim=1, keepdim=True)
    across = jacobian - unit[:, :, None] * (unit[:, None] @ jacobian)
    expected = (across / g.norm(dim=1)[:, None, None]).square().sum((1, 2)) * 0.01**2 / (0.02**2 * 16)
    torch.testing.assert_close(column(fisher(own, probes=16)["dfil"]), expected, rtol=1e-5, atol=0)


def test_the_reference_is_relative_to_the_update_whatever_its_scale():
    one, other = (reference_fisher(subject(protocol=p)) for p in (Protocol(), Protocol(sends="delta", lr=0.01)))
    for name, profile in one.items():
        torch.testing.assert_close(profile.values, other[name].values, rtol=1e-6, atol=0)
    own = subject()
    update = torch.cat(list(own.by_layer(own.update()).values()), 1)
    std = 1e-3 * update.square().mean(1).sqrt()
    values = torch.linalg.svdvals(exact(own)[ALL])
    torch.testing.assert_close(column(one["reference_fil_eta"]), values[:, 0] / std, rtol=1e-5, atol=0)
    torch.testing.assert_close(column(one["reference_mse"]), std**2 / values.square().mean(1), rtol=1e-5, atol=0)


def test_an_update_of_nothing_gives_finite_numbers():
    own = subject(parts=NOISE)
    own.model = own.model.with_state(parameters={k: v * 0 for k, v in own.model.parameters.items()})
    for profile in (fisher(own) | reference_fisher(own)).values():
        assert profile.values.isfinite().all()


@pytest.mark.parametrize("parts", [[], [TopK(), *NOISE], [DPSGD(noise_multiplier=0)]])
def test_without_declared_noise_nothing_is_bounded(parts):
    for measure in (fisher, cramer_rao, bayes_cramer_rao):
        with pytest.raises(NotApplicable, match="declares no Gaussian noise"):
            measure(subject(parts=parts))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(1, 12), st.floats(0.01, 10), st.integers(0, 1000))
def test_no_linear_gaussian_attacker_beats_van_trees(d, p, std, seed):
    stream = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(p, d, generator=stream, dtype=torch.float64)
    root = torch.randn(d, d, generator=stream, dtype=torch.float64) + torch.eye(d)
    prior = torch.linalg.inv(root @ root.T)
    information = jacobian.T @ jacobian / std**2
    best = float(torch.linalg.inv(information + prior).trace()) / d  # the posterior mean, the best there is
    bound = van_trees(float(information.trace()) / d, float(prior.trace()) / d)
    assert bound <= best * (1 + 1e-9)
    even = torch.eye(d, dtype=torch.float64)
    assert van_trees(9.0, 0.5) == pytest.approx(float(torch.linalg.inv(9 * even + 0.5 * even).trace()) / d)


@pytest.mark.parametrize("count", [30, 400])
def test_the_prior_is_that_of_scikit_learn(count):
    images = torch.tensor(load_digits().data[:count]) / 16
    expected = LedoitWolf().fit(images.numpy()).get_precision().trace() / images.shape[1]
    assert ledoit_wolf_precision(images) == pytest.approx(expected, rel=1e-8)


def test_the_bound_for_all_attackers_joins_information_and_prior():
    auxiliary = subject(trials=100)
    # A uniform pixel has variance 1/12, so its Gaussian has information 12.
    auxiliary.images = torch.rand(auxiliary.images.shape, generator=torch.Generator().manual_seed(3)).double()
    own = subject(parts=NOISE, trials=6, auxiliary=auxiliary)
    both = bayes_cramer_rao(own, probes=1000)
    found = both["mse_bound_bayes"]
    dfil = column(fisher(own, probes=1000)["dfil"]).mean()
    prior = ledoit_wolf_precision(auxiliary.images[:, 0].flatten(1))
    assert prior == pytest.approx(12, rel=0.1)
    assert float(both["mse_bound_prior"].values) == pytest.approx(1 / prior)
    assert float(found.values) == pytest.approx(float(1 / (dfil + prior)), rel=1e-9)
    assert float(found.low) <= float(found.values) <= float(found.high) <= 1 / prior
    assert found.n == 6
    with pytest.raises(NotApplicable, match="auxiliary"):
        bayes_cramer_rao(subject(parts=NOISE))

"""SPEAR against known inputs: exact for a batch, and never worse than nothing on degenerate updates."""

from __future__ import annotations

import pytest
import torch
from leakbench_baselines.attacks.spear import Directions, Layer, Spear, zeros
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits

from leakbench import Knowledge, NotApplicable, Observation, UserError
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))

pytestmark = pytest.mark.usefixtures("one_thread")


def block(*, batch, trials=4, net="mlp", precision="float64", own_models=True, protocol=None, **params):
    """Return the knowledge, an observation by update, the update and the private inputs of one block of digits."""
    data = load_digits()
    images = (torch.tensor(data.images, dtype=getattr(torch, precision))[:, None] / 16 - 0.3) / 0.4
    labels = torch.tensor(data.target)
    picks = torch.stack(
        [torch.randperm(1500, generator=torch.Generator().manual_seed(t))[:batch] for t in range(trials)]
    )
    params = {"width": 200, "depth": 2} | params if net == "mlp" else params
    model = build_model(Architecture(name=net, params=params), SPEC.shape, 10, seeds=range(trials if own_models else 1))
    model = model.to(dtype=images.dtype)
    protocol = protocol or Protocol(precision=precision)
    facts = Facts(
        granted=ThreatModel().granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=True,
        num_classes=10,
        batch_size=batch,
        inputs_per_client=batch,
    )
    random = TrialRandom(torch.arange(trials * 32).reshape(trials, 32).to(torch.uint8))
    knowledge = {"facts": facts, "random": random, "model": model}
    update = Client(protocol, batch).update(model, images[picks], labels[picks], random=random)
    return knowledge, lambda sent: Observation(Seen([sent]), **knowledge), update, images[picks]


DEGENERATE = {
    "zeros": torch.zeros_like,
    "constant": torch.ones_like,
    "tiny": lambda value: value * 1e-300,
    "huge": lambda value: value * 1e300,
    "noise": lambda value: torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value),
}


def expect_valid_inputs(attack, spoil, batch):
    """Demand finite inputs within bounds from an update of which every tensor is spoilt."""
    _, observe, update, _ = block(batch=batch, trials=2, width=20)
    observation = observe({name: spoil(value) for name, value in update.items()})
    recovery = attack.run(observation)
    low, high = observation.bounds
    assert recovery.inputs.shape == (2, batch, *SPEC.shape)
    assert ((recovery.inputs >= low) & (recovery.inputs <= high)).all()
    assert recovery.visible_loss.isfinite().all()


def decibels(found, truth):
    """Return PSNR (T,) of the best assignment, images in pixel values, capped at 120 dB per image."""
    found, truth = (v.double().flatten(2) * 0.4 for v in (found, truth))
    means = []
    for a, b in zip(found, truth, strict=True):
        cost = torch.cdist(b, a).square().numpy() / a.shape[1]
        error = torch.tensor(cost[linear_sum_assignment(cost)])
        means.append((-10 * error.clamp(min=1e-12).log10()).mean())
    return torch.stack(means)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_batches_of_a_dense_relu_layer_are_exact(batch, precision):
    _, observe, update, truth = block(batch=batch, precision=precision)
    recovery = Spear(samples=100_000).run(observe(update))
    exact = decibels(recovery.inputs, truth) > 90
    assert exact.sum() >= 3
    assert (recovery.visible_loss[exact] < 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "least"), [(16, 3), (20, 2)])
def test_large_batches_are_mostly_exact(batch, least):
    _, observe, update, truth = block(batch=batch, width=400)
    assert (decibels(Spear().run(observe(update)).inputs, truth) > 90).sum() >= least


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_local_steps_on_one_input_batch_need_no_learning_rate(sends):
    protocol = Protocol(sends=sends, local_steps=1, lr=0.05, precision="float64")
    _, observe, update, truth = block(batch=4, protocol=protocol, own_models=False)
    assert (decibels(Spear(samples=100_000).run(observe(update)).inputs, truth) > 90).sum() >= 3


def test_any_positive_scale_of_the_update_gives_the_same_inputs():
    attack, found = Spear(samples=100_000), []
    for scale in (1.0, 2.0**-30):
        _, observe, update, truth = block(batch=3)
        found.append(attack.run(observe({name: scale * value for name, value in update.items()})).inputs)
    assert torch.equal(*found)
    assert (decibels(found[1], truth) > 90).sum() >= 3


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spoil", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_updates_give_finite_inputs_within_bounds(spoil, batch):
    expect_valid_inputs(Spear(samples=500), spoil, batch)


@pytest.mark.parametrize(
    ("net", "batch", "params"),
    [
        ("lenet_zhu", 2, {}),
        ("mlp", 2, {"activation": "sigmoid"}),
        ("mlp", 2, {"activation": "leaky_relu"}),
        ("mlp", 2, {"depth": 0}),
        ("mlp", 26, {}),
    ],
)
def test_what_it_cannot_invert_is_declined(net, batch, params):
    knowledge, _, _, _ = block(batch=batch, net=net, trials=1, **params)
    with pytest.raises(NotApplicable):
        Spear().prepare(Knowledge(**knowledge))


def test_a_dense_relu_layer_is_accepted():
    knowledge, _, _, _ = block(batch=25, trials=2)
    assert Spear().prepare(Knowledge(**knowledge)) == {}


def planted(rows=300, rank=5):
    """Return orthonormal L (m, b) and the matrix L Q, half zero."""
    generator = torch.Generator().manual_seed(3)
    sparse = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    sparse *= torch.rand(rows, rank, generator=generator) < 0.5
    sparse = sparse[sparse.abs().sum(1) > 0]
    return torch.linalg.qr(sparse).Q, sparse


def test_directions_found_are_the_sparse_ones():
    left, sparse = planted()
    found = Directions(left, 0.1, 1e-13)
    found.draw(2000, torch.Generator().manual_seed(0))
    columns = torch.nn.functional.normalize(left @ found.basis().T, dim=0)
    likeness = (columns.T @ torch.nn.functional.normalize(sparse, dim=0)).abs()
    assert likeness.amax(0).min() > 1 - 1e-9
    assert torch.equal(found.counts, found.counts.sort(descending=True).values)


def test_missing_directions_are_filled_up_to_a_basis():
    left, _ = planted()
    found = Directions(left, 0.1, 1e-13)
    found.draw(2000, torch.Generator().manual_seed(0))
    full = found.completed(found.basis()[:3])
    assert full.shape == (5, 5)
    assert torch.linalg.matrix_rank(full) == 5


def test_scales_follow_from_the_bias_gradient():
    generator = torch.Generator().manual_seed(1)
    at_output = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    inputs = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    left, mix = torch.linalg.qr(at_output)
    layer = Layer(left, mix @ inputs, at_output.sum(1), torch.zeros(40, 7).double(), torch.zeros(40).double(), 1e-13)
    directions = torch.tensor([2.0, -3.0, 0.5])[:, None].double() * mix.T
    torch.testing.assert_close(layer.invert(directions)[0], inputs)


def test_zeros_are_told_from_small_values_by_their_rounding():
    values = torch.tensor([1.0, -2.0, 3e-4, 1e-16, -2e-16, 0.0, 1e-16], dtype=torch.float64)
    assert zeros(values, 1e-13).tolist() == [False, False, False, True, True, True, True]


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"tau": 0}, {"tau": 1.5}, {"max_batch": 0}])
def test_senseless_parameters_are_refused(wrong):
    with pytest.raises(UserError):
        Spear(**wrong)

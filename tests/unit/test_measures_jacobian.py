"""The products of `Jacobian` against differences of a plain training loop and of defended clients."""

from __future__ import annotations

import plain_client as plain
import pytest
import torch
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dropout import Dropout
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.topk import TopK
from measure_subjects import C, Explicit, differences, exact, net, subject
from torch.nn.functional import hardsigmoid

from leakbench import Defense
from leakbench.errors import NotApplicable
from leakbench.federation.inputs import normalised
from leakbench.measures.jacobian import Jacobian, linearised, trials_at_once
from leakbench.measures.subject import ALL
from leakbench.tasks import Protocol

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = Protocol(sends="delta", local_steps=3, lr=0.3, momentum=0.5, weight_decay=0.01)
PROTOCOLS = {
    "gradient": Protocol(),
    "local steps": STEPS,
    "weights": STEPS.model_copy(update={"sends": "weights"}),
    "same batch": Protocol(sends="delta", local_steps=2, batches="same", lr=0.3),
    "epochs": Protocol(sends="delta", local_steps=4, batches="epochs", batches_per_epoch=2, lr=0.2),
    "cohort": Protocol(clients=3, secure_aggregation=True, weighting="examples"),
    "cohort with local steps": Protocol(clients=3, secure_aggregation=True, sends="delta", local_steps=2, lr=0.3),
    "batch norm in train mode": Protocol(batch_norm="train"),
}
DEFENSES = {
    "clip_l2": lambda: ClipL2(),
    "dropout": lambda: Dropout(),
    "gaussian_noise": lambda: GaussianNoise(std=0.1, relative=True),
    "topk": lambda: TopK(p=0.6),
}


def check(jacobian, expected, rtol=1e-6):
    """Compare J v of random v, J^T u of random u, and norms with explicit matrices (T, P_l, d) by layer."""
    stream = torch.Generator().manual_seed(5)
    v = torch.randn(jacobian.images.shape, generator=stream, dtype=torch.float64)
    scale = max(float(matrix.abs().max()) for matrix in expected.values())
    pushed = jacobian.jvp(v)
    assert tuple(pushed) == jacobian.layers
    u = {layer: torch.randn(value.shape, generator=stream, dtype=torch.float64) for layer, value in pushed.items()}
    pulled = torch.zeros_like(v.flatten(1))
    for i, (layer, value) in enumerate(pushed.items()):
        wanted = torch.einsum("tpd,td->tp", expected[layer], v.flatten(1))
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(jacobian.jvp(v, [layer])[layer], value)
        torch.testing.assert_close(jacobian.energy(v)[:, i], value.square().sum(1))
        own = torch.einsum("tpd,tp->td", expected[layer], u[layer])
        torch.testing.assert_close(jacobian.vjp({layer: u[layer]}).flatten(1), own, rtol=rtol, atol=rtol * scale * 9)
        pulled = pulled + own
    torch.testing.assert_close(jacobian.vjp(u).flatten(1), pulled, rtol=rtol, atol=rtol * scale * 9)
    whole = torch.einsum("tpi,tpj,tj->ti", expected[ALL], expected[ALL], v.flatten(1))
    torch.testing.assert_close(jacobian.gram(v).flatten(1), whole, rtol=rtol, atol=rtol * float(whole.abs().max()))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("name", ["gradient", "local steps", "weights", "same batch", "epochs"])
def test_it_is_that_of_a_plain_training_loop(name, draws):
    model, protocol = plain.make("mlp", draws), PROTOCOLS[name]
    whose = subject(model=model, protocol=protocol, draws=draws)

    def sent(images):
        inputs = normalised(images, whose.spec, True)
        found = plain.update(model, inputs, whose.labels, protocol, 2)
        return whose.by_layer(found if protocol.sends != "weights" else {k: -v for k, v in found.items()})

    expected = differences(sent, whose.images)
    check(Jacobian(whose), expected | {ALL: torch.cat(list(expected.values()), 1)})


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet20", "convnet"])
def test_it_is_right_on_every_kind_of_net(name, draws):
    whose = subject(name, batch=1, draws=draws)
    check(Jacobian(whose), exact(whose), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mlp", "cohort"),
        ("mlp", "cohort with local steps"),
        ("lenet", "cohort with local steps"),
        ("convnet", "batch norm in train mode"),
        ("resnet20", "batch norm in train mode"),
    ],
)
def test_it_goes_through_cohorts_and_batch_statistics(model, name):
    whose = subject(model, PROTOCOLS[name], batch=2 if "batch" in name else 1, trials=1)
    check(Jacobian(whose), exact(whose), rtol=1e-5)


@pytest.mark.parametrize("protocol", ["gradient", "local steps"])
@pytest.mark.parametrize("defense", DEFENSES)
def test_it_goes_through_a_defense_whose_draws_stay(defense, protocol):
    whose = subject("mlp", PROTOCOLS[protocol], [DEFENSES[defense]()])
    check(Jacobian(whose), exact(whose))


class Nothing(Defense):
    """Sends zeros."""

    def update(self, update, ctx):
        return {name: torch.zeros_like(value) for name, value in update.items()}


class First(Defense):
    """Sends the first tensor and zeros."""

    def update(self, update, ctx):
        return {n: value if i == 0 else torch.zeros_like(value) for i, (n, value) in enumerate(update.items())}


def test_what_does_not_depend_on_the_images_has_a_jacobian_of_zero():
    jacobian = Jacobian(subject(parts=[Nothing()]))
    v = torch.ones_like(jacobian.images)
    assert not any(bool(value.any()) for value in jacobian.jvp(v).values())
    assert not jacobian.energy(v).any()
    assert not jacobian.vjp({k: torch.ones(2, size) for k, size in jacobian.sizes.items()}).any()
    whose = subject(parts=[First()])
    check(Jacobian(whose), exact(whose))


def test_a_net_without_second_derivatives_is_refused_in_words():
    def sent(images):
        weight = torch.ones_like(images).requires_grad_()
        (gradient,) = torch.autograd.grad(hardsigmoid(images * weight).sum(), weight, create_graph=True)
        return {"gate": gradient}

    jacobian = Jacobian(Explicit(sent, torch.rand(2, 5, dtype=torch.float64)))
    with pytest.raises(NotApplicable, match="hardsigmoid"):
        jacobian.energy(torch.ones_like(jacobian.images))
    with pytest.raises(NotApplicable, match="hardsigmoid"):
        jacobian.vjp(jacobian.update)


def test_trials_are_linearised_in_parts_of_a_size_that_only_shapes_decide(monkeypatch):
    whose = subject("lenet", trials=5, draws=5)
    assert trials_at_once(whose) == trials_at_once(whose.part(0, 1)) > 5
    v = torch.rand_like(whose.images)
    together = Jacobian(whose).energy(v)
    monkeypatch.setattr("leakbench.measures.jacobian.trials_at_once", lambda _: 2)
    parts = list(linearised(whose))
    assert [part.trials for part in parts] == [2, 2, 1]
    apart = torch.cat([p.energy(v[f : f + p.trials]) for p, f in zip(parts, (0, 2, 4), strict=True)])
    torch.testing.assert_close(apart, together)


def test_more_weights_steps_or_examples_mean_fewer_trials_at_once():
    small = trials_at_once(subject("mlp", model=net("mlp")))
    assert small == 64
    big = plain.build_model(plain.Architecture(name="mlp", params={"width": 2000, "depth": 2}), (1, 4, 4), C, seeds=[0])
    one, steps = (trials_at_once(subject(model=big, protocol=p, dtype=torch.float32)) for p in (Protocol(), STEPS))
    assert 64 > one > steps >= 1

"""Defenses against a malicious server: transforms against PyTorch's, and what is refused."""

from __future__ import annotations

import pytest
import torch
from leakbench_baselines.defenses.consistency_check import ConsistencyCheck
from leakbench_baselines.defenses.detect_and_abort import DetectAndAbort
from leakbench_baselines.defenses.oasis import TRANSFORMS, Oasis
from plain_client import examples, make, random
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from leakbench import Defense, DefenseContext, UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client, Received
from leakbench.metrics.stealth import Thresholds
from leakbench.tasks import Protocol

SIZES = {"flip": 2, "major_rotation": 4, "minor_rotation": 4, "shearing": 3, "major_rotation+shearing": 6}
SIZES["+".join(TRANSFORMS)] = 10


def context(model, inputs, labels, **more):
    none = {"loss": None, "round": 0, "client": 0, "local_step": 0, "lr": 0.1}
    return DefenseContext(model=model, inputs=inputs, labels=labels, random=random(len(inputs)), **none, **more)


def enlarged(images, transforms):
    labels = torch.arange(images.shape[1]).expand(images.shape[:2])
    return Oasis(transforms=transforms).batch(images, labels, context(make(), images, labels))


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("transforms", "factor"), SIZES.items())
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_grows_by_its_transforms_and_labels_repeat(transforms, factor, size):
    images = pictures(2, size, 3, 8, 8)
    inputs, labels = enlarged(images, transforms)
    assert inputs.shape == (2, size * factor, 3, 8, 8)
    assert torch.equal(inputs[:, :size], images)
    assert torch.equal(labels, torch.arange(size).repeat(factor).expand(2, -1))
    blocks = inputs.unflatten(1, (factor, size))
    assert all(not torch.equal(blocks[:, i], blocks[:, j]) for i in range(factor) for j in range(i))


def test_quarter_turns_and_flips_are_exact():
    images = pictures(2, 3, 1, 5, 5)
    turned = enlarged(images, "major_rotation")[0].unflatten(1, (4, 3))
    for turns in range(4):
        torch.testing.assert_close(turned[:, turns], torch.rot90(images, turns, (3, 4)), rtol=0, atol=0)
    assert torch.equal(enlarged(images, "flip")[0][:, 3:], images.flip(4))


@pytest.mark.parametrize("shape", [(21, 21), (21, 35)])
def test_small_turns_agree_with_torchvision_inside_the_image(shape):
    images = pictures(2, 1, 3, *shape)
    turned = enlarged(images, "minor_rotation")[0]
    y, x = torch.meshgrid(*[torch.arange(s) - (s - 1) / 2 for s in shape], indexing="ij")
    inside = (x**2 + y**2).sqrt() < 8
    for index, angle in enumerate((15, 30, 45), start=1):
        expected = rotate(images[:, 0], -angle, InterpolationMode.BILINEAR)
        other = rotate(images[:, 0], angle, InterpolationMode.BILINEAR)
        gap, wrong = (float((turned[:, index] - e)[..., inside].abs().max()) for e in (expected, other))
        assert min(gap, wrong) < 1e-6
        assert max(gap, wrong) > 0.1


def test_a_shear_moves_rows_by_a_share_of_their_distance_from_the_center():
    images = torch.zeros(1, 1, 1, 21, 41, dtype=torch.float64)
    images[..., 20] = 1
    sheared = enlarged(images, "shearing")[0]
    column = torch.arange(41, dtype=torch.float64)
    for index, shear in enumerate((0.3, 0.6), start=1):
        center = (sheared[0, index, 0] * column).sum(1) - 20
        torch.testing.assert_close(center, -shear * (torch.arange(21).double() - 10), rtol=0, atol=1e-9)


@pytest.mark.parametrize("transforms", SIZES)
def test_transforms_do_not_depend_on_how_inputs_are_normalised(transforms):
    images = pictures(2, 2, 3, 9, 9)
    plain, _ = enlarged(images, transforms)
    normalised, _ = enlarged((images - 0.4) / 0.2, transforms)
    torch.testing.assert_close(normalised, (plain - 0.4) / 0.2)
    assert plain.amin() >= images.amin() - 1e-12
    assert plain.amax() <= images.amax() + 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_the_enlarged_batch(reduction):
    model = make("convnet")
    inputs, labels = examples(model, 3)
    client = Client(Protocol(precision="float64", reduction=reduction), 3, DefenseChain([Oasis()]))
    sent = client.update(model, inputs, labels, random=random())
    for t, (x, y) in enumerate(zip(inputs, labels, strict=True)):
        state = {k: v[0].clone().requires_grad_() for k, v in model.parameters.items()}
        every = torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(4)])
        logits, _, _ = model.call(state | {k: v[0] for k, v in model.buffers.items()}, every, train=False)
        loss = F.cross_entropy(logits, y.repeat(4), reduction=reduction)
        expected = torch.autograd.grad(loss, list(state.values()))
        for name, value in zip(state, expected, strict=True):
            torch.testing.assert_close(sent[name][t], value)


def test_soft_labels_repeat_too():
    images = pictures(2, 3, 1, 4, 4)
    soft = pictures(2, 3, 5, seed=1)
    _, labels = Oasis(transforms="flip").batch(images, soft, context(make(), images, soft))
    assert torch.equal(labels, torch.cat([soft, soft], 1))


@pytest.mark.parametrize("transforms", ["", "rotation", "flip+flip", "flip+"])
def test_unknown_transforms_are_named(transforms):
    with pytest.raises(UserError, match=r"expected some of .*, got .*; write oasis\("):
        Oasis(transforms=transforms)


def test_inputs_that_cannot_be_turned_are_refused():
    with pytest.raises(UserError, match="square"):
        enlarged(pictures(1, 2, 1, 4, 5), "major_rotation")
    with pytest.raises(UserError, match="images"):
        enlarged(pictures(1, 2, 7), "flip")


class Silent(Defense):
    """Takes part always."""


@pytest.mark.parametrize(("digests", "taken"), [((), True), (("a",), True), (("a", "a"), True), (("a", "b"), False)])
def test_clients_with_different_models_refuse(digests, taken):
    model = make()
    ctx = context(model, *examples(model, 2), digests=digests)
    for chain in ([ConsistencyCheck()], [Silent(), ConsistencyCheck()], [ConsistencyCheck(), Silent()]):
        assert DefenseChain(chain).accept(ctx).tolist() == [taken] * 3


def dead(model):
    """Zero the features of every input."""
    layer = "body.linear0"
    return model.with_state(
        parameters={
            f"{layer}.weight": torch.zeros_like(model.parameters[f"{layer}.weight"]),
            f"{layer}.bias": -torch.ones_like(model.parameters[f"{layer}.bias"]),
        }
    )


def test_a_client_refuses_a_dead_model_and_takes_an_honest_one():
    honest = make()
    protocol = Protocol(precision="float64")
    client = Client(protocol, 4, DefenseChain([DetectAndAbort()]))
    inputs, labels = examples(honest, 4)
    for model, taken in ((honest, True), (dead(honest), False)):
        received = Received(model=model, previous=honest)
        assert client.accepts(received, inputs, labels, random=random()).tolist() == [taken] * 3


def test_trials_are_refused_one_by_one():
    honest = make(draws=3)
    broken = dead(honest)
    mixed = honest.with_state(
        parameters={k: torch.stack([v[0], broken.parameters[k][1], v[2]]) for k, v in honest.parameters.items()}
    )
    ctx = context(mixed, *examples(honest, 4), previous=honest)
    assert DetectAndAbort().accept(ctx).tolist() == [True, False, True]


def test_thresholds_are_parameters():
    assert DetectAndAbort().params() == vars(Thresholds())
    honest = make()
    ctx = context(dead(honest), *examples(honest, 4), previous=honest)
    lenient = {"logit_spread": 0.0, "dead_gradient_share": 1.0, "head_gradient_rank": 0.0}
    assert DetectAndAbort(**lenient).accept(ctx).all()
    assert not DetectAndAbort(d_snr=1e-3).accept(context(honest, *examples(honest, 4), previous=honest)).any()
    with pytest.raises(UserError, match="parameter_distance: expected at least 0, got -1"):
        DetectAndAbort(parameter_distance=-1.0)

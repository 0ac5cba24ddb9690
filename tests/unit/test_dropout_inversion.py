"""The masks that dropout's gradients give away, and inputs through them."""

from __future__ import annotations

import pytest
import torch
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.dropout_inversion import (
    DropoutInversion,
    PixelsAndMasks,
    masked_gradients,
    read_masks,
)
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.defenses.dropout import Dropout
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError


class Spy(Dropout):
    """Keeps the masks: those of the first draws of its streams."""

    def step(self, grads, ctx):
        streams = type(ctx.random)(torch.tensor([list(seed) for seed in ctx.random._seeds], dtype=torch.uint8))
        features = ctx.model.parameters[f"{ctx.model.head}.weight"].shape[2]
        self.kept = streams.rand(ctx.inputs.shape[1], features) >= self.p
        return super().step(grads, ctx)


def head_gradient(kept, labels, features):
    """Return the gradient (T, C, d) of a last layer's weights whose probabilities are random."""
    stream = torch.Generator().manual_seed(1)
    errors = torch.rand(*labels.shape, 10, generator=stream, dtype=torch.float64).softmax(-1) - F.one_hot(labels, 10)
    return torch.einsum("tbc,tbd->tcd", errors, features * kept)


def drawn(batch, p, size=400, trials=5):
    stream = torch.Generator().manual_seed(0)
    kept = torch.rand(trials, batch, size, generator=stream, dtype=torch.float64) >= p
    return kept, 0.1 + torch.rand(trials, batch, size, generator=stream, dtype=torch.float64), stream


@pytest.mark.parametrize(("batch", "p"), [(1, 0.3), (1, 0.7), (2, 0.1), (4, 0.5), (6, 0.7)])
def test_the_masks_are_read_exactly(batch, p):
    kept, features, stream = drawn(batch, p)
    # Of unequal classes, so that every mask has one place; in any order.
    labels = torch.stack([torch.randperm(10, generator=stream)[:batch] for _ in range(5)])
    read, certain = read_masks(head_gradient(kept, labels, features), labels)
    assert certain.all()
    assert torch.equal(read, kept)


def test_the_mask_of_one_example_is_read_whatever_the_signs_of_its_features():
    kept, features, _ = drawn(1, 0.5)
    labels = torch.arange(5)[:, None]
    read, certain = read_masks(head_gradient(kept, labels, features - 0.6003), labels)
    assert certain.all()
    assert (read == kept).double().mean() > 0.995


def test_examples_of_one_class_are_told_apart_up_to_their_order():
    kept, features, _ = drawn(3, 0.5)
    labels = torch.tensor([[4, 1, 4]]).expand(5, 3)
    read, certain = read_masks(head_gradient(kept, labels, features), labels)
    assert certain.all()
    assert torch.equal(read[:, 1], kept[:, 1])
    for one, other in zip(read, kept, strict=True):
        assert torch.equal(one, other) or torch.equal(one[[2, 1, 0]], other)


@pytest.mark.parametrize(
    "why", ["noise", "noise on one", "features of both signs", "no dropout", "no corners", "zeros"]
)
def test_what_is_no_mask_is_not_certain(why):
    batch, p = {"no corners": (6, 0.1), "noise on one": (1, 0.5)}.get(why, (3, 0.5))
    kept, features, stream = drawn(batch, p)
    labels = torch.arange(batch).expand(5, batch)
    if why == "features of both signs":
        features = features - 0.6
    gradient = head_gradient(torch.ones_like(kept) if why == "no dropout" else kept, labels, features)
    if why.startswith("noise"):
        gradient = gradient + 0.05 * torch.randn(gradient.shape, generator=stream, dtype=torch.float64)
    _, certain = read_masks(gradient * (why != "zeros"), labels)
    assert not certain.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_with_the_true_masks_the_gradient_is_the_defenses(reduction):
    spy = Spy(p=0.4)
    seen, inputs, labels = observe(batch=3, defense=spy, known=True, reduction=reduction)
    found = masked_gradients(
        seen.model,
        inputs,
        labels,
        spy.kept.double() / 0.6,
        names=list(seen.update),
        train=False,
        mean=reduction == "mean",
    )
    for name, value in seen.update.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sends", ["gradient", "delta"])
def test_the_masks_of_a_client_are_read(sends):
    spy = Spy(p=0.4)
    seen, _, labels = observe(batch=2, defense=spy, known=True, sends=sends, dtype=torch.float32, own_models=True)
    read, certain = read_masks(seen.difference(seen.update)[f"{seen.model.head}.weight"], labels)
    distinct = labels[:, 0] != labels[:, 1]
    assert certain.all()
    assert distinct.any()
    assert torch.equal(read[distinct], spy.kept[distinct])


def test_inputs_are_found_through_dropout_where_plain_inversion_finds_none():
    seen, inputs, _ = observe(trials=1, defense=Dropout(p=0.7), known=True, dtype=torch.float32)
    plain, read, searched = (
        psnr(attack.run(seen).inputs, inputs).mean()
        for attack in (
            InvertingGradients(steps=100),
            DropoutInversion(steps=100),
            DropoutInversion(steps=100, masks="searched"),
        )
    )
    assert plain < 10
    assert read > 25
    assert searched > plain + 5


def test_searched_masks_start_at_their_rate_and_then_at_random_ones():
    seen, _, _ = observe(trials=3, batch=2, defense=Dropout(p=0.3), known=True)
    start = PixelsAndMasks(p=0.3, size=2000).start(seen, 3, 2)["kept"].view(3, 3, 2, 2000)
    assert (start[:, 0] == 0.7).all()
    assert ((start[:, 1:] == 0) | (start[:, 1:] == 1)).all()
    assert (start[:, 1:].mean(-1) - 0.7).abs().max() < 0.05
    assert not torch.equal(start[:, 1], start[:, 2])


@pytest.mark.parametrize("case", ["no dropout", "withheld", "none dropped"])
def test_without_dropout_it_is_inverting_gradients(case):
    defense = {"no dropout": GaussianNoise(std=1e-3), "withheld": Dropout(p=0.5), "none dropped": Dropout(p=0.0)}[case]
    seen, _, _ = observe(trials=2, batch=2, defense=defense, known=case != "withheld")
    assert torch.equal(DropoutInversion(steps=5).run(seen).inputs, InvertingGradients(steps=5).run(seen).inputs)


@pytest.mark.parametrize(
    ("params", "word"), [({"masks": "seen"}, "masks"), ({"mask_lr": 0.0}, "mask_lr"), ({"rate": -1.0}, "rate")]
)
def test_wrong_arguments_are_told(params, word):
    with pytest.raises(UserError, match=word):
        DropoutInversion(**params)

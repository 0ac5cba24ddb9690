"""GradDefense: sensitivities by a plain loop, slices of equal sensitivity, noise in as many as asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.graddefense import GradDefense
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from update_blocks import context, flat, streams, updates

from leakbench import DefenseContext, UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.tasks import Protocol


def moment(block, trials):
    return DefenseContext(
        model=block.model,
        inputs=block.inputs,
        labels=block.labels,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=0.1,
        random=streams(trials),
    )


@pytest.mark.parametrize("models", [1, 2])
def test_sensitivities_are_those_of_a_loop_over_tensors(models):
    block = digits_block(3, trials=2, models=models)
    found = GradDefense().sensitivity(moment(block, 2), list(block.model.parameters))
    for trial in range(2):
        weights = {n: v[trial % models].clone().requires_grad_() for n, v in block.model.parameters.items()}
        x = block.inputs[trial].clone().requires_grad_()
        loss = F.cross_entropy(functional_call(block.model.module, weights, (x,)), block.labels[trial])
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for place, grad in enumerate(grads):
            (slope,) = torch.autograd.grad(grad, x, torch.ones_like(grad), retain_graph=True)
            torch.testing.assert_close(found[trial, place], slope.flatten(1).norm(dim=1).mean())


def test_every_slice_is_equally_sensitive():
    grads = updates(2)
    sensitivity = torch.tensor([[4.0, 1.0, 2.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    places = GradDefense(slices=10).places(sensitivity, grads)
    each = [s[:, None].expand(2, p.shape[1]) / p.shape[1] for s, p in zip(sensitivity.T, places, strict=True)]
    place, weight = torch.cat(places, 1), torch.cat(each, 1)
    assert (place.diff(dim=1) >= 0).all()
    sums = torch.zeros(2, 10, dtype=torch.float64).scatter_add(1, place, weight)
    # A cut is off by less than one entry on either side.
    wanted = (sensitivity.sum(1, keepdim=True) / 10).expand(2, 10)
    torch.testing.assert_close(sums, wanted, atol=2 * weight.max().item(), rtol=0)


def test_without_any_sensitivity_slices_are_of_equal_size():
    grads = updates(1)
    places = torch.cat(GradDefense(slices=10).places(torch.zeros(1, 3), grads), 1)
    counts = places[0].bincount(minlength=10)
    assert counts.min() == counts.max() == places.shape[1] // 10


def sent(grads, sensitivity, **parameters):
    ctx = replace(context(len(sensitivity)), local_step=1)
    ctx.state["sensitivity"] = sensitivity
    return GradDefense(**parameters).step(grads, ctx)


@pytest.mark.parametrize("perturbed", [0, 3, 10])
def test_t16_noise_falls_into_whole_slices_and_nowhere_else(perturbed):
    grads, sensitivity = updates(20), torch.rand(20, 3, dtype=torch.float64) + 0.1
    found = sent(grads, sensitivity, scale=0.5, slices=10, perturbed=perturbed)
    noise = flat(found) - flat(grads)
    place = torch.cat(GradDefense(slices=10).places(sensitivity, grads), 1)
    hit = torch.zeros(20, 10).scatter_add(1, place, (noise != 0).float())
    size = torch.zeros(20, 10).scatter_add(1, place, torch.ones_like(noise).float())
    assert ((hit == 0) | (hit == size)).all()
    assert ((hit > 0).sum(1) == perturbed).all()
    if perturbed:
        assert len((hit > 0).unique(dim=0)) > 1 or perturbed == 10
        assert noise[noise != 0].std().item() == pytest.approx(0.5, rel=0.03)


def test_sensitivities_are_measured_once_a_round_and_slices_drawn_in_every_step():
    block = digits_block(2, architecture="mlp", width=8, depth=1, trials=2)
    seen = []

    class Spy(GradDefense):
        def sensitivity(self, ctx, names):
            seen.append(ctx.local_step)
            return super().sensitivity(ctx, names)

    client = Client(Protocol(sends="delta", local_steps=3, batches="same"), 2, DefenseChain([Spy(scale=1.0)]))
    client.update(block.model, block.inputs, block.labels, random=streams(2))
    assert seen == [0]
    ctx = context(4)
    ctx.state["sensitivity"] = torch.ones(4, 3)
    zero = {name: 0 * value for name, value in updates(4).items()}
    steps = [
        flat(GradDefense(scale=1.0).step(zero, replace(ctx, local_step=s, random=ctx.random.at(s)))) for s in (1, 2)
    ]
    assert not torch.equal(steps[0] != 0, steps[1] != 0)


def test_the_likelihood_forgives_noise_where_it_may_be_but_not_everywhere():
    grads = updates(4)
    noisy = sent(grads, torch.ones(4, 3), scale=0.01)
    everywhere = {name: value + 0.01 * torch.randn_like(value) for name, value in grads.items()}
    score = GradDefense(scale=0.01).log_likelihood
    assert (score(noisy, grads, context(4)) > score(everywhere, grads, context(4))).all()
    assert (score(noisy, grads, context(4)) > score(noisy, everywhere, context(4))).all()


def test_bad_parameters_are_told():
    for arguments in ({"scale": -1.0}, {"slices": 0}, {"perturbed": 11}, {"perturbed": -1}):
        with pytest.raises(UserError, match="graddefense: expected"):
            GradDefense(**arguments)

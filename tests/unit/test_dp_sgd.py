"""DP-SGD against a loop over examples written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.dp_sgd import DPSGD
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext
from leakbench.federation.client import Client
from leakbench.randomness import TrialRandom
from leakbench.tasks import Protocol

BATCH = 4


def send(block, defense, **protocol):
    client = Client(Protocol(precision="float64", **protocol), BATCH, DefenseChain([defense] if defense else []))
    return client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])


def by_hand(block, trial, clip):
    """Sum of one trial's clipped gradients, by the formula g / max(1, |g| / C), one example after the other."""
    model = block.model
    net = {n: v[trial if model.draws > 1 else 0].clone().requires_grad_() for n, v in model.parameters.items()}
    total = {n: torch.zeros_like(v) for n, v in net.items()}
    for x, y in zip(block.inputs[trial], block.labels[trial], strict=True):
        loss = F.cross_entropy(functional_call(model.module, net, (x[None],)), y[None])
        grads = dict(zip(net, torch.autograd.grad(loss, list(net.values())), strict=True))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        for name, grad in grads.items():
            total[name] += grad / max(1, norm / clip)
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip", [0.1, 2.0, 5.0])
def test_without_noise_it_sends_the_clipped_examples(reduction, clip):
    block = digits_block(BATCH)
    found = send(block, DPSGD(clip=clip, noise_multiplier=0), reduction=reduction)
    for trial in range(2):
        for name, total in by_hand(block, trial, clip).items():
            torch.testing.assert_close(found[name][trial], total / (BATCH if reduction == "mean" else 1))


def test_without_noise_and_bound_it_is_plain_sgd():
    block = digits_block(BATCH)
    for protocol in ({}, {"sends": "weights", "local_steps": 3, "batches": "same"}):
        plain, same = send(block, None, **protocol), send(block, DPSGD(clip=1e12, noise_multiplier=0), **protocol)
        for name, value in plain.items():
            torch.testing.assert_close(same[name], value)


@pytest.mark.parametrize(
    ("protocol", "factor"), [({}, 1 / BATCH), ({"reduction": "sum"}, 1), ({"sends": "delta"}, 0.1 / BATCH)]
)
def test_the_noise_is_z_times_c_on_the_sum(protocol, factor):
    block = digits_block(BATCH)
    clean = send(block, DPSGD(clip=0.3, noise_multiplier=0), **protocol)
    noise = torch.cat(
        [(v - clean[n]).flatten() for n, v in send(block, DPSGD(clip=0.3, noise_multiplier=2), **protocol).items()]
    )
    expected = 2 * 0.3 * factor
    assert noise.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(noise.mean().item()) < 4 * expected / math.sqrt(len(noise))


def test_every_local_step_draws_its_own_noise():
    block = digits_block(BATCH)
    one, two = DPSGD(clip=1e-9, noise_multiplier=1e9), {"sends": "delta", "batches": "same", "lr": 1e-9}
    single = send(block, one, **two)
    double = send(block, one, **two, local_steps=2)
    second = torch.cat([(double[n] - single[n]).flatten() for n in single])
    first = torch.cat([value.flatten() for value in single.values()])
    assert second.std().item() == pytest.approx(first.std().item(), rel=0.05)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(len(first))


def context(block, **fields):
    return DefenseContext(
        model=block.model,
        inputs=block.inputs,
        labels=block.labels,
        loss=None,
        round=0,
        client=0,
        local_step=fields.pop("local_step", 0),
        lr=0.1,
        random=TrialRandom(torch.zeros(len(block.labels), 32, dtype=torch.uint8)),
        **fields,
    )


@pytest.mark.parametrize("sends", ["gradient", "delta"])
def test_its_likelihood_is_that_of_independent_normals(sends):
    block = digits_block(BATCH)
    clean = send(block, DPSGD(clip=0.3, noise_multiplier=0), sends=sends)
    sent = send(block, DPSGD(clip=0.3, noise_multiplier=2), sends=sends)
    std = 2 * 0.3 / BATCH * (1 if sends == "gradient" else 0.1)
    expected = sum(torch.distributions.Normal(clean[n], std).log_prob(v).flatten(1).sum(1) for n, v in sent.items())
    found = DPSGD(clip=0.3, noise_multiplier=2).log_likelihood(sent, clean, context(block, sends=sends))
    torch.testing.assert_close(found, expected)


def test_without_noise_only_the_clean_update_scores_nothing_less():
    block = digits_block(BATCH)
    sent = send(block, DPSGD(clip=0.3, noise_multiplier=0))
    other = {n: 1.5 * v for n, v in sent.items()}
    defense, ctx = DPSGD(clip=0.3, noise_multiplier=0), context(block)
    assert (defense.log_likelihood(sent, sent, ctx) == 0).all()
    assert (defense.log_likelihood(sent, other, ctx) < -1).all()


def test_the_noises_of_several_steps_add_up():
    block = digits_block(BATCH)
    sent = send(block, DPSGD(clip=0.3, noise_multiplier=2), sends="delta")
    clean = send(block, DPSGD(clip=0.3, noise_multiplier=0), sends="delta")
    found = DPSGD(clip=0.3, noise_multiplier=2).log_likelihood(sent, clean, context(block, sends="delta", local_step=3))
    wider = DPSGD(clip=0.3, noise_multiplier=4).log_likelihood(sent, clean, context(block, sends="delta"))
    torch.testing.assert_close(found, wider)


def test_an_example_without_a_gradient_has_finite_derivatives():
    grads = {"w": torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)}
    clipped = DPSGD(clip=1.0).per_example(grads, None)["w"]
    (derivative,) = torch.autograd.grad(clipped.sum(), grads["w"])
    assert torch.equal(derivative, torch.ones_like(derivative))


def test_a_diverged_gradient_is_clipped_to_the_bound():
    clipped = DPSGD(clip=2.0).per_example({"w": torch.full((1, 1, 4), 1e30)}, None)["w"]
    torch.testing.assert_close(clipped, torch.ones(1, 1, 4))


@pytest.mark.parametrize("wrong", [{"clip": 0}, {"noise_multiplier": -1}])
def test_senseless_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=r"expected .* got .*; write dp_sgd"):
        DPSGD(**wrong)

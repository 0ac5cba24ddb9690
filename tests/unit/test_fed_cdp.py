"""Fed-CDP against a loop over examples and layers; what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.fed_cdp import FedCDP
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from update_blocks import context, flat, streams, updates

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.tasks import Protocol

BATCH = 3
NET = {"architecture": "mlp", "width": 12, "depth": 2}


def send(block, defense, inputs=None, round_index=0, seed=0, **protocol):
    client = Client(Protocol(precision="float64", **protocol), BATCH, DefenseChain([defense] if defense else []))
    inputs = block.inputs if inputs is None else inputs
    random = streams(len(inputs), seed)
    return client.update(block.model, inputs, block.labels, random=random, round_index=round_index)


def by_hand(block, trial, clip):
    """Return the sum of one trial's gradients, each layer of each example clipped by itself."""
    weights = {n: v[trial].clone().requires_grad_() for n, v in block.model.parameters.items()}
    total = {n: torch.zeros_like(v) for n, v in weights.items()}
    for x, y in zip(block.inputs[trial], block.labels[trial], strict=True):
        loss = F.cross_entropy(functional_call(block.model.module, weights, (x[None],)), y[None])
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        for layer in ("body.linear0", "body.linear1", "fc"):
            names = [f"{layer}.weight", f"{layer}.bias"]
            norm = math.sqrt(sum(grads[n].square().sum().item() for n in names))
            for n in names:
                total[n] += grads[n] * min(1, clip / norm)
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("round_index", "bound"), [(0, 0.4), (3, 0.1)])
def test_without_noise_every_layer_of_every_example_is_clipped(reduction, round_index, bound):
    block = digits_block(BATCH, trials=2, **NET)
    found = send(block, FedCDP(clip=0.4, noise_multiplier=0, decay=1.0), None, round_index, reduction=reduction)
    for trial in range(2):
        for name, total in by_hand(block, trial, bound).items():
            torch.testing.assert_close(found[name][trial], total / (BATCH if reduction == "mean" else 1))


def test_without_noise_and_bound_it_is_plain_sgd():
    block = digits_block(BATCH, trials=2, **NET)
    for protocol in ({}, {"sends": "weights", "local_steps": 3, "batches": "same"}):
        plain = send(block, None, **protocol)
        same = send(block, FedCDP(clip=1e12, noise_multiplier=0), **protocol)
        for name, value in plain.items():
            torch.testing.assert_close(same[name], value)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_noise_falls_with_the_bound_and_is_divided_by_the_batch(decay):
    block = digits_block(BATCH, trials=2, **NET)
    for round_index in (0, 4):
        clean = send(block, FedCDP(decay=decay, noise_multiplier=0), None, round_index)
        noise = flat(send(block, FedCDP(decay=decay, noise_multiplier=1.5), None, round_index)) - flat(clean)
        std = 1.5 * 4 / BATCH / (1 + decay * round_index)
        assert noise.std().item() == pytest.approx(std, rel=5 / (2 * noise.numel()) ** 0.5)


def test_every_local_step_draws_noise_of_its_own():
    # With a bound of next to nothing all that is sent is noise: of n steps n draws.
    block = digits_block(BATCH, trials=2, **NET)
    defense = FedCDP(clip=1e-9, noise_multiplier=1e9 * BATCH)
    sent = flat(send(block, defense, sends="delta", local_steps=4, batches="same", lr=0.5))
    assert sent.std().item() == pytest.approx(0.5 * 2, rel=0.05)


def test_its_mechanism_is_kept_and_reached_but_for_a_few_percent():
    block = digits_block(BATCH, trials=1, **NET)
    layers = len(block.model.layers)
    chain = DefenseChain([FedCDP(clip=0.5, noise_multiplier=0.7)])
    mechanism = chain.mechanism(Protocol(), BATCH, layers=layers)
    assert mechanism.std == pytest.approx(0.7 * 0.5 / BATCH)
    assert mechanism.example == pytest.approx(2 * 0.5 * 3**0.5 / BATCH)
    assert mechanism.update == pytest.approx(2 * 0.5 * 3**0.5)
    # Opposite gradients in all layers at once: the worst replacement, written down.
    defense = FedCDP(clip=0.5, noise_multiplier=0)
    ctx = context(1, model=block.model)
    grads = {n: torch.randn(1, BATCH, *v.shape[1:], dtype=torch.float64) for n, v in block.model.parameters.items()}
    other = {n: torch.cat([-v[:, :1], v[:, 1:]], 1) for n, v in grads.items()}
    moved = [flat({n: v.mean(1) for n, v in defense.per_example(g, ctx).items()}) for g in (grads, other)]
    assert (moved[0] - moved[1]).norm().item() == pytest.approx(mechanism.example)
    assert (moved[0] - moved[1]).norm() > 2 * 0.5 / BATCH * 1.7  # more than C alone would allow


def test_it_promises_nothing_where_layers_are_unknown_or_the_bound_moves():
    assert DefenseChain([FedCDP()]).mechanism(Protocol(), BATCH) is None
    assert DefenseChain([FedCDP(decay=0.1)]).mechanism(Protocol(), BATCH, layers=3) is None


def test_the_likelihood_is_the_density_of_the_noise():
    clean, ctx = updates(2), context(2, inputs=torch.zeros(2, 4, 1))
    sent = {name: value + 0.1 for name, value in clean.items()}
    std = 2.0 * 4 / 4
    normal = torch.distributions.Normal(flat(clean), std)
    torch.testing.assert_close(
        FedCDP(noise_multiplier=2.0).log_likelihood(sent, clean, ctx), normal.log_prob(flat(sent)).sum(1)
    )


def test_bad_parameters_are_told():
    for arguments in ({"clip": 0.0}, {"noise_multiplier": -1.0}, {"decay": -0.1}):
        with pytest.raises(UserError, match="fed_cdp: "):
            FedCDP(**arguments)

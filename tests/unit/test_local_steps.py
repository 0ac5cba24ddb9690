"""Local steps inside a defense against the client's own."""

from __future__ import annotations

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.local_steps import LocalSteps
from leakbench_baselines.defenses.soteria import Soteria
from update_blocks import streams

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.tasks import Protocol

BATCH = 3


def send(block, *defenses, create_graph=False, inputs=None, **protocol):
    client = Client(Protocol(precision="float64", lr=0.2, **protocol), BATCH, DefenseChain(defenses))
    inputs = block.inputs if inputs is None else inputs
    return client.update(block.model, inputs, block.labels, random=streams(len(inputs)), create_graph=create_graph)


@pytest.fixture(scope="module", params=[1, 2], ids=["shared", "own"])
def block(request):
    return digits_block(BATCH, architecture="mlp", width=12, depth=1, trials=2, models=request.param)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_they_are_the_clients_own_local_steps_on_one_batch(block, steps, reduction):
    own = send(block, sends="delta", local_steps=steps, batches="same", reduction=reduction)
    for protocol in ({"sends": "delta"}, {"sends": "gradient"}, {"sends": "weights"}):
        sent = send(block, LocalSteps(steps=steps), reduction=reduction, **protocol)
        for name, value in own.items():
            weights = block.model.parameters[name]
            want = {"delta": value, "gradient": value / 0.2, "weights": weights - value}[protocol["sends"]]
            torch.testing.assert_close(sent[name], want)


def test_they_multiply_the_protocols_own(block):
    own = send(block, sends="delta", local_steps=6, batches="same")
    sent = send(block, LocalSteps(steps=3), sends="delta", local_steps=2, batches="same")
    for name, value in own.items():
        torch.testing.assert_close(sent[name], value)


def test_a_simulation_is_differentiated_through_all_of_them(block):
    def total(inputs, graph):
        sent = send(block, LocalSteps(steps=3), inputs=inputs, create_graph=graph)
        return sum(value.square().sum() for value in sent.values())

    leaf = block.inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(leaf, True), leaf)
    direction = torch.randn_like(block.inputs)
    high, low = (total(block.inputs + sign * 1e-5 * direction, False) for sign in (1, -1))
    torch.testing.assert_close((slope * direction).sum(), (high - low) / 2e-5, rtol=1e-5, atol=1e-9)


def test_the_first_gradient_is_what_the_chain_made_of_it():
    block = digits_block(BATCH, trials=2)
    alone = send(block, Soteria(p=100), LocalSteps(steps=1))
    assert (alone["fc.weight"] == 0).all()
    more = send(block, Soteria(p=100), LocalSteps(steps=2))
    assert (more["fc.weight"] != 0).any()


def test_what_is_sent_can_be_clipped_afterwards(block):
    sent = send(block, LocalSteps(steps=4), ClipL2(bound=0.01))
    norms = torch.cat([value.flatten(1) for value in sent.values()], 1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.01))


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_a_number_of_steps_is_whole(steps):
    with pytest.raises(UserError, match="local_steps: steps"):
        LocalSteps(steps=steps)

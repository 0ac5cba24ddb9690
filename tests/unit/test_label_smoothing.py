"""Label smoothing against torch's own, and its laws."""

from __future__ import annotations

import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client


def send(block, *parts):
    client = Client(block.protocol, block.batch, DefenseChain(parts))
    return client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])


@pytest.mark.parametrize("models", [None, 1])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_the_gradient_is_that_of_the_smoothed_cross_entropy(alpha, models):
    block = digits_block(5, architecture="mlp", models=models)
    sent = send(block, LabelSmoothing(alpha=alpha))
    for t in range(len(block.labels)):
        state = {n: v[t % len(v)].detach().clone().requires_grad_() for n, v in block.model.parameters.items()}
        logits = functional_call(block.model.module, state, (block.inputs[t],))
        loss = F.cross_entropy(logits, block.labels[t], label_smoothing=alpha)
        for name, slope in zip(state, torch.autograd.grad(loss, list(state.values())), strict=True):
            torch.testing.assert_close(sent[name][t], slope)


def test_smoothing_twice_is_smoothing_once_more_strongly():
    block = digits_block(5)
    twice, once = (
        send(block, LabelSmoothing(alpha=0.2), LabelSmoothing(alpha=0.5)),
        send(block, LabelSmoothing(alpha=0.6)),
    )
    for name, value in twice.items():
        torch.testing.assert_close(value, once[name])


def test_each_row_sums_to_one_and_keeps_its_greatest_class():
    block = digits_block(6)
    kept = []

    class Spy(LabelSmoothing):
        def batch(self, inputs, labels, ctx):
            kept.append(super().batch(inputs, labels, ctx)[1])
            return inputs, kept[-1]

    send(block, Spy(alpha=0.3))
    torch.testing.assert_close(kept[0].sum(2), torch.ones(4, 6, dtype=torch.float64))
    assert torch.equal(kept[0].argmax(2), block.labels)
    assert kept[0].min() == pytest.approx(0.3 / CLASSES)


def test_without_smoothing_nothing_changes():
    block = digits_block(4)
    assert all(torch.equal(v, block.update()[n]) for n, v in send(block, LabelSmoothing(alpha=0.0)).items())


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_a_weight_outside_of_0_to_1_is_refused(alpha):
    with pytest.raises(UserError, match=r"alpha: expected .* got .* write"):
        LabelSmoothing(alpha=alpha)

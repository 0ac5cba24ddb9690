"""Noise on the inputs: its law, and what of it an update shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.input_noise import InputNoise
from scipy import stats
from update_blocks import context

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.tasks import Protocol


def send(block, *parts):
    client = Client(block.protocol, block.batch, DefenseChain(parts))
    return client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])


def test_inputs_get_independent_normal_noise_and_labels_stay():
    inputs, labels = torch.ones(3, 20, 1, 8, 8, dtype=torch.float64), torch.arange(60).view(3, 20)
    noisy, kept = InputNoise(std=0.3).batch(inputs, labels, context(3))
    assert kept is labels
    noise = ((noisy - inputs) / 0.3).flatten()
    assert noise.dtype == torch.float64
    assert stats.kstest(noise.numpy(), stats.norm.cdf).pvalue > 1e-3
    assert noise.std().item() == pytest.approx(1, abs=6 / (2 * len(noise)) ** 0.5)
    between = torch.corrcoef(((noisy - inputs) / 0.3).flatten(0, 1).flatten(1)) - torch.eye(60)
    assert between.abs().max() < 6 / 64**0.5


def test_an_exact_attack_recovers_the_noisy_input():
    # The quotient of the first layer's gradients is its input, exactly, where the batch is one example.
    block = digits_block(1, architecture="mlp", width=20)
    sent = send(block, InputNoise(std=0.2))
    weight, bias = (sent[f"body.linear0.{part}"] for part in ("weight", "bias"))
    row = bias.abs().argmax(1)
    trials = torch.arange(len(row))
    noise = weight[trials, row] / bias[trials, row, None] - block.inputs.flatten(1)
    assert stats.kstest((noise / 0.2).flatten().numpy(), stats.norm.cdf).pvalue > 1e-3


def test_every_local_step_has_noise_of_its_own():
    block = digits_block(2, protocol=Protocol(sends="delta", local_steps=3, batches="same"))
    seen = []

    class Spy(InputNoise):
        def batch(self, inputs, labels, ctx):
            seen.append(super().batch(inputs, labels, ctx)[0])
            return seen[-1], labels

    send(block, Spy())
    first, second, third = (s - block.inputs for s in seen)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_update_is_that_of_the_noisy_inputs_and_without_noise_that_of_the_inputs():
    block = digits_block(3)
    seen = []

    class Spy(InputNoise):
        def batch(self, inputs, labels, ctx):
            seen.append(super().batch(inputs, labels, ctx)[0])
            return seen[-1], labels

    sent, clean = send(block, Spy(std=0.5)), block.update()
    expected = replace(block, inputs=seen[0]).update()
    assert all(torch.equal(value, expected[name]) for name, value in sent.items())
    assert not any(torch.equal(value, clean[name]) for name, value in sent.items())
    assert all(torch.equal(value, clean[name]) for name, value in send(block, InputNoise(std=0.0)).items())


def test_a_negative_deviation_is_refused():
    with pytest.raises(UserError, match=r"std: expected at least 0, got -1; write"):
        InputNoise(std=-1)

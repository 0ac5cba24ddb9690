"""Removing the last bias: what is left of the net, and of the labels in its gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import CLASSES, SPEC, digits_block
from leakbench_baselines.defenses.no_last_bias import NoLastBias
from torch import nn

from leakbench import UserError
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture

ARCHITECTURES = [("mlp", {"width": 20}), ("lenet_zhu", {}), ("vgg", {"depth": 11})]


def nets(name, params, shape=SPEC.shape, seeds=(3,)):
    architecture = Architecture(name=name, params=params)
    build = lambda transform: build_model(architecture, shape, CLASSES, seeds=seeds, transform=transform)  # noqa: E731
    return build(None), build(NoLastBias().model)


@pytest.mark.parametrize(("name", "params"), ARCHITECTURES)
def test_only_the_last_bias_goes_and_all_other_weights_stay(name, params):
    plain, without = nets(name, params, shape=(1, 32, 32))
    bias = f"{plain.head}.bias"
    assert plain.parameters.keys() - without.parameters.keys() == {bias}
    assert without.parameters.keys() <= plain.parameters.keys()
    assert without.head == plain.head
    assert not without.has_head_bias
    assert all(torch.equal(value, plain.parameters[key]) for key, value in without.parameters.items())
    inputs = torch.rand(1, 4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    difference = plain.logits(inputs) - without.logits(inputs)
    torch.testing.assert_close(difference, plain.parameters[bias].expand_as(difference), rtol=1e-4, atol=1e-5)


def test_row_sums_still_give_away_every_label_of_a_net_with_relu():
    block = digits_block(1, architecture="mlp", width=20, trials=500, models=1)
    _, without = nets("mlp", {"width": 20})
    block = replace(block, model=without.to(dtype=torch.float64))
    assert without.nonnegative_features
    sent = Client(block.protocol, 1).update(block.model, block.inputs, block.labels, random=block.knowledge["random"])
    assert f"{without.head}.bias" not in sent
    sums = sent[f"{without.head}.weight"].sum(2)
    assert ((sums < 0).sum(1) == 1).all()
    assert torch.equal(sums.argmin(1), block.labels[:, 0])
    features = block.model.features(block.inputs).sum(2)
    residual = block.model.logits(block.inputs).softmax(2)[:, 0]
    residual[torch.arange(500), block.labels[:, 0]] -= 1
    torch.testing.assert_close(sums, residual * features)


def test_once_more_changes_nothing_and_a_net_without_a_linear_layer_is_refused():
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    once = NoLastBias().model(module)
    assert [name for name, _ in NoLastBias().model(once).named_parameters()] == ["0.weight", "0.bias", "2.weight"]
    with pytest.raises(UserError, match="expected a net that ends in a linear layer"):
        NoLastBias().model(nn.Conv2d(1, 1, 1))

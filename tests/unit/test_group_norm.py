"""GroupNorm instead of BatchNorm, against torch's functional form and the laws that BatchNorm breaks."""

from __future__ import annotations

import pytest
import torch
from label_blocks import CLASSES
from leakbench_baselines.defenses.group_norm import GroupNorm
from torch import nn
from torch.nn import functional as F  # noqa: N812
from update_blocks import streams

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture, Protocol

RESNET = Architecture(name="resnet20", params={})


def images(*batch, channels=3, size=32):
    return torch.rand(*batch, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(architecture=RESNET, shape=(3, 32, 32), defense=None):
    transform = DefenseChain([defense]).model if defense else None
    return build_model(architecture, shape, CLASSES, seeds=[5], transform=transform).to(dtype=torch.float64)


def test_only_the_running_statistics_go_and_weights_start_as_before():
    plain, grouped = net(), net(defense=GroupNorm())
    assert plain.has_batch_norm
    assert not grouped.has_batch_norm
    assert grouped.buffers == {}
    assert grouped.parameters.keys() == plain.parameters.keys()
    assert all(torch.equal(value, plain.parameters[name]) for name, value in grouped.parameters.items())


def test_an_examples_gradient_does_not_depend_on_its_batch():
    inputs, labels = images(1, 4), torch.tensor([[1, 5, 5, 9]])
    protocol = Protocol(batch_norm="train", precision="float64")

    def sent(model, part):
        return Client(protocol, len(range(4)[part])).update(model, inputs[:, part], labels[:, part], random=streams(1))

    for model, mixes in ((net(), True), (net(defense=GroupNorm()), False)):
        whole = sent(model, slice(0, 4))
        halves = sent(model, slice(0, 2)), sent(model, slice(2, 4))
        name = next(iter(whole))
        apart = (whole[name] - (halves[0][name] + halves[1][name]) / 2).norm() / whole[name].norm()
        assert (apart > 1e-3) == mixes
        assert mixes or apart < 1e-10


@pytest.mark.parametrize(
    ("groups", "channels", "expected"),
    [(32, 64, 32), (32, 48, 24), (32, 32, 16), (32, 12, 6), (32, 7, 1), (32, 1, 1), (4, 64, 4), (5, 64, 4), (1, 64, 1)],
)
def test_it_is_torchs_group_normalisation_with_the_batch_norms_scale(groups, channels, expected):
    layer = nn.BatchNorm2d(channels, eps=1e-3)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
        layer.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    changed = GroupNorm(groups=groups).model(nn.Sequential(layer))
    inputs = images(2, channels=channels, size=6).float()
    reference = F.group_norm(inputs, expected, layer.weight, layer.bias, eps=1e-3)
    torch.testing.assert_close(changed(inputs), reference)


def test_after_a_dense_layer_it_is_layer_normalisation():
    changed = GroupNorm().model(nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12)))
    inputs = torch.rand(3, 5)
    torch.testing.assert_close(changed(inputs), F.layer_norm(changed[0](inputs), (12,)))


def test_what_timm_puts_into_its_batch_norm_still_acts():
    norm_act = pytest.importorskip("timm.layers").BatchNormAct2d(8)
    changed = GroupNorm().model(nn.Sequential(norm_act))
    inputs = images(2, channels=8, size=4).float()
    torch.testing.assert_close(changed(inputs), F.relu(F.group_norm(inputs, 4)))


def test_a_net_without_batch_norm_stays_and_no_groups_are_refused():
    mlp = Architecture(name="mlp", params={"width": 12})
    plain, same = net(mlp), net(mlp, defense=GroupNorm())
    assert torch.equal(plain.logits(images(1, 2)), same.logits(images(1, 2)))
    with pytest.raises(UserError, match=r"groups: expected at least 1, got 0; write"):
        GroupNorm(groups=0)

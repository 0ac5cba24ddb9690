"""R-GAP: exact where a chain's equations determine the input, declined elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.attacks.r_gap import RGap
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from torch import nn
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, NotApplicable, Observation
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.tasks import Architecture, Protocol

EXACT = Protocol(precision="float64")

pytestmark = pytest.mark.usefixtures("one_thread")


def attack(block, update=None):
    observation = Observation(Seen([block.update() if update is None else update]), **block.knowledge)
    assert RGap().prepare(Knowledge(**block.knowledge)) == {}
    return RGap().run(observation).inputs


def on(block, change):
    """Return the block with ``change`` made to its module, with weights of that module."""
    net = Architecture(name="lenet_zhu")
    seeds = range(len(block.labels))
    model = build_model(net, (1, 8, 8), 10, seeds=seeds, transform=change).to(dtype=torch.float64)
    return replace(block, model=model, knowledge={**block.knowledge, "model": model})


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "leaky_relu", "relu"])
@pytest.mark.parametrize("net", ["mlp", "lenet_zhu"])
def test_a_chain_gives_its_input_exactly(net, activation, models):
    block = digits_block(1, architecture=net, trials=3, models=models, protocol=EXACT, activation=activation)
    assert (attack(block) - block.inputs).abs().max() < 1e-5


def test_kernels_strides_paddings_and_dilations_of_any_size():
    def change(module):
        module.body = nn.Sequential(
            nn.Conv2d(1, 6, (3, 2), stride=(1, 2), padding=(0, 1), bias=False),
            nn.LeakyReLU(0.3),
            nn.Conv2d(6, 9, 3, dilation=2, padding=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(9 * 6 * 5, 40, bias=False),
            nn.Sigmoid(),
        )
        module.fc = nn.Linear(40, 10)
        return module

    block = on(digits_block(1, trials=3, protocol=EXACT), change)
    assert (attack(block) - block.inputs).abs().max() < 1e-5


@pytest.mark.parametrize("defense", [LabelSmoothing(alpha=0.3), ClipL2(bound=0.001)])
def test_labels_and_scale_do_not_matter(defense):
    block = digits_block(1, trials=3, protocol=EXACT)
    client = Client(EXACT, 1, DefenseChain([defense]))
    update = client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])
    assert (attack(block, update) - block.inputs).abs().max() < 1e-5


def test_one_step_of_weights_is_a_gradient():
    protocol = Protocol(sends="weights", local_steps=1, lr=0.3, precision="float64")
    block = digits_block(1, trials=3, protocol=protocol)
    assert (attack(block) - block.inputs).abs().max() < 1e-4


def test_single_precision_is_enough():
    block = digits_block(1, trials=3, protocol=EXACT)
    rounded = {name: value.float().double() for name, value in block.update().items()}
    assert (attack(block, rounded) - block.inputs).abs().max() < 1e-2


def test_the_solution_is_that_of_a_plain_recursion():
    """Without weighting or scaling: what the equations say, by numpy's least squares on one dense system a layer."""
    block = digits_block(1, trials=1, protocol=EXACT, activation="tanh")
    state = {name: value[0] for name, value in block.model.parameters.items()}
    sent = {name: value[0] for name, value in block.update().items()}
    k, matrix = sent["fc.bias"], state["fc.weight"]
    y = k @ sent["fc.weight"] / (k @ k)
    for i, (stride, side) in enumerate([(2, 8), (2, 4), (1, 2)][::-1]):
        name, channels = f"body.conv{2 - i}", 1 if i == 2 else 12
        k = (matrix.T @ k) * (1 - y**2)
        unit = torch.eye(channels * side * side, dtype=torch.float64).view(-1, channels, side, side)
        matrix = F.conv2d(unit, state[f"{name}.weight"], stride=stride, padding=2).flatten(1).T
        out = torch.atanh(y) - state[f"{name}.bias"].repeat_interleave(len(y) // 12)
        shape = state[f"{name}.weight"].shape
        kernel = k.view(1, 12, *F.conv2d(unit[:1], state[f"{name}.weight"], stride=stride, padding=2).shape[2:])
        columns = [
            torch.nn.grad.conv2d_weight(one[None], shape, kernel, stride=stride, padding=2).flatten() for one in unit
        ]
        scale = k.norm()
        system = torch.cat([matrix, torch.stack(columns, 1) / scale])
        y = torch.linalg.lstsq(system, torch.cat([out, sent[f"{name}.weight"].flatten() / scale])[:, None]).solution[
            :, 0
        ]
    torch.testing.assert_close(attack(block).flatten(), y.clamp(0, 1), rtol=1e-6, atol=1e-6)


def test_equations_that_leave_something_open_give_their_smallest_solution():
    def change(module):
        module.body = nn.Sequential(nn.Conv2d(1, 2, 3, stride=3), nn.Tanh(), nn.Flatten())
        module.fc = nn.Linear(8, 10)
        return module

    block = on(digits_block(1, trials=3, protocol=EXACT), change)
    claimed = attack(block)
    assert (claimed[..., -2:] == 0).all()  # what the kernel never reaches
    error, size = (value.square().flatten(1).sum(1) for value in (claimed - block.inputs, block.inputs))
    assert (error < 0.9 * size).all()


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("spoil", [0.0, 1e-300, 1e300, float("inf"), float("nan"), None])
def test_degenerate_updates_give_finite_images(spoil, activation):
    block = digits_block(1, trials=2, protocol=EXACT, activation=activation)
    stream = torch.Generator().manual_seed(0)
    update = {
        name: torch.randn(value.shape, generator=stream).double() if spoil is None else spoil * value
        for name, value in block.update().items()
    }
    claimed = attack(block, update)
    assert claimed.isfinite().all()
    assert 0 <= claimed.min() <= claimed.max() <= 1


class Skip(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, x):
        return x + self.inner(x)


def skipping(module):
    module.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Skip(nn.Conv2d(4, 4, 3, padding=1)), nn.Flatten())
    module.fc = nn.Linear(256, 10)
    return module


def grouped(module):
    module.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    module.fc = nn.Linear(64, 10)
    return module


def pooled(module):
    module.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten())
    module.fc = nn.Linear(36, 10)
    return module


@pytest.mark.parametrize("change", [skipping, grouped, pooled])
def test_nets_that_are_no_chain_are_declined(change):
    block = on(digits_block(1, trials=2, protocol=EXACT), change)
    with pytest.raises(NotApplicable):
        RGap().prepare(Knowledge(**block.knowledge))


@pytest.mark.parametrize("net", [("resnet20", {}), ("lenet_zhu", {"activation": "softplus"})])
def test_layers_that_cannot_be_undone_are_declined(net):
    block = digits_block(1, architecture=net[0], models=1, **net[1])
    with pytest.raises(NotApplicable):
        RGap().prepare(Knowledge(**block.knowledge))

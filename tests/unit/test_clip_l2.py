"""L2 clipping against torch's own, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_blocks import digits_block
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client

SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (3, 6)}


def updates(scale=1.0, dtype=torch.float64):
    stream = torch.Generator().manual_seed(0)
    return {n: scale * torch.randn(4, *s, generator=stream, dtype=dtype) for n, s in SHAPES.items()}


def flat(update):
    return torch.cat([value.flatten(1) for value in update.values()], 1)


@pytest.mark.parametrize("bound", [0.5, 6.0, 7.0, 100.0])
def test_it_clips_as_torch_clips_gradients(bound):
    given, sent = updates(), ClipL2(bound=bound).update(updates(), None)
    for t in range(4):
        parameters = [torch.nn.Parameter(value[t]) for value in given.values()]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        torch.nn.utils.clip_grad_norm_(parameters, bound)
        for value, parameter in zip(sent.values(), parameters, strict=True):
            torch.testing.assert_close(value[t], parameter.grad, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_the_norm_is_bounded_and_the_direction_stays(bound, scale, dtype):
    given, sent = flat(updates(scale, dtype)), flat(ClipL2(bound=bound).update(updates(scale, dtype), None))
    assert (sent.double().norm(dim=1) <= bound * (1 + 1e-5)).all()
    torch.testing.assert_close(F.cosine_similarity(sent.double(), given.double()), torch.ones(4, dtype=torch.float64))
    within = given.double().norm(dim=1) <= bound * (1 - 1e-6)
    assert torch.equal(sent[within], given[within])


def test_per_layer_each_tensor_has_the_bound_for_itself():
    update = updates()
    sent = ClipL2(bound=0.7, per_layer=True).update(update, None)
    for name, value in sent.items():
        alone = ClipL2(bound=0.7).update({name: update[name]}, None)
        assert torch.equal(value, alone[name])
        torch.testing.assert_close(value.flatten(1).norm(dim=1), torch.full((4,), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("per_layer", [False, True])
def test_nothing_and_a_diverged_update_stay_finite(per_layer):
    defense = ClipL2(per_layer=per_layer)
    nothing = {n: v * 0 for n, v in updates().items()}
    assert all(torch.equal(v, nothing[n]) for n, v in defense.update(nothing, None).items())
    sent = flat(defense.update(updates(1e30, torch.float32), None))
    torch.testing.assert_close(sent.norm(dim=1), torch.full((4,), 3**0.5 if per_layer else 1.0))


def test_clipped_and_noised_is_the_clipped_update_plus_the_same_noise():
    block = digits_block(4)

    def send(*parts):
        client = Client(block.protocol, block.batch, DefenseChain(parts))
        return client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])

    clean, clipped = block.update(), send(ClipL2(bound=0.1))
    noised, both = send(GaussianNoise(std=0.1)), send(ClipL2(bound=0.1), GaussianNoise(std=0.1))
    for name, value in both.items():
        torch.testing.assert_close(value - clipped[name], noised[name] - clean[name])


def test_a_bound_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"bound: expected .* got 0; write"):
        ClipL2(bound=0)

"""CENSOR: at right angles, as long, and the draw with the least loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.censor import Censor, orthogonal
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from update_blocks import context, streams, updates

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.tasks import Protocol


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e12])
def test_t16_orthogonal_and_as_long_in_each_tensor_at_any_scale(scale, dtype):
    gradient, drawn = updates(5, scale, dtype), updates(5, 1.0, dtype, seed=7)
    for name, value in gradient.items():
        goal, found = value.flatten(1).double() / scale, orthogonal(drawn[name], value).flatten(1).double() / scale
        cosine = (goal * found).sum(1) / (goal.norm(dim=1) * found.norm(dim=1))
        assert cosine.abs().max() < 1e-6
        torch.testing.assert_close(found.norm(dim=1), goal.norm(dim=1), rtol=1e-5, atol=0)


def test_the_released_projection_is_not_orthogonal():
    gradient, drawn = updates(5, 1e-3)["a.weight"].flatten(1), updates(5, seed=7)["a.weight"].flatten(1)
    length = gradient.norm(dim=1, keepdim=True)
    released = drawn - (drawn * gradient).sum(1, keepdim=True) / length * gradient
    ours = orthogonal(drawn, gradient)
    cosines = [((v * gradient).sum(1) / (v.norm(dim=1) * length[:, 0])).abs().min() for v in (released, ours)]
    assert cosines[0] > 1e3 * cosines[1]


def test_zeros_and_single_entries_stay_finite():
    drawn = torch.ones(2, 1, dtype=torch.float64)
    assert (orthogonal(drawn, torch.full((2, 1), 3.0, dtype=torch.float64)) == 0).all()
    assert (orthogonal(torch.randn(2, 9), torch.zeros(2, 9)) == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_of_several_draws_the_one_after_whose_step_the_loss_is_least_is_sent(shared):
    block = digits_block(3, architecture="mlp", width=8, depth=1, trials=3, models=1 if shared else 3)

    def send(tries):
        chain = DefenseChain([Censor(tries=tries, lr=0.5)])
        client = Client(Protocol(precision="float64"), 3, chain)
        return client.update(block.model, block.inputs, block.labels, random=streams(3))

    def loss(trial, sent):
        weights = {n: v[0 if shared else trial] - 0.5 * sent[n][trial] for n, v in block.model.parameters.items()}
        logits = functional_call(block.model.module, weights, (block.inputs[trial],))
        return F.cross_entropy(logits, block.labels[trial]).item()

    # The first n draws are the same however many there are, so the least loss falls where a better one comes along.
    losses = torch.tensor([[loss(trial, send(tries)) for trial in range(3)] for tries in range(1, 7)])
    assert (losses.diff(dim=0) <= 0).all()
    assert (losses[-1] < losses[0]).sum() >= 2
    assert len(losses.unique(dim=0)) > 2


def test_t16_what_is_sent_differs_from_the_gradient():
    block = digits_block(3, trials=2)
    plain = Client(Protocol(), 3).update(block.model, block.inputs, block.labels, random=streams(2))
    chain = DefenseChain([Censor(tries=2)])
    sent = Client(Protocol(), 3, chain).update(block.model, block.inputs, block.labels, random=streams(2))
    for name, value in plain.items():
        goal, found = value.flatten(1), sent[name].flatten(1)
        assert ((goal * found).sum(1).abs() < 1e-6 * goal.square().sum(1)).all()
        torch.testing.assert_close(found.norm(dim=1), goal.norm(dim=1))


def test_the_likelihood_is_greatest_where_norms_agree_and_directions_do_not():
    clean = updates(3)
    sent = {name: orthogonal(updates(3, seed=4)[name], value) for name, value in clean.items()}
    ctx = replace(context(3))
    best = Censor().log_likelihood(sent, clean, ctx)
    assert best.abs().max() < 1e-9
    longer = {name: 2 * value for name, value in clean.items()}
    assert (Censor().log_likelihood(sent, longer, ctx) < -100).all()
    assert (Censor().log_likelihood(sent, sent, ctx) < -100).all()


def test_bad_parameters_are_told():
    for arguments in ({"tries": 0}, {"lr": 0.0}):
        with pytest.raises(UserError, match="censor: expected"):
            Censor(**arguments)

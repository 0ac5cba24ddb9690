"""Dropout against torch's own under the same masks, one trial at a time."""

from __future__ import annotations

import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.defenses.dropout import Dropout
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.randomness import TrialRandom
from leakbench.tasks import Protocol

BLOCKS = {
    "lenet": {"batch": 3},
    "mlp, shared": {"batch": 5, "architecture": "mlp", "models": 1},
    "more trials than a chunk": {"batch": 2, "architecture": "mlp", "trials": 18},
    "sum": {"batch": 3, "protocol": Protocol(reduction="sum")},
    "batch norm": {"batch": 4, "architecture": "resnet20", "protocol": Protocol(batch_norm="train"), "trials": 2},
    "batch norm, shared": {"batch": 4, "architecture": "resnet20", "trials": 2, "models": 1},
}


class Spy(Dropout):
    """Keeps the masks: those of the first draws of its streams."""

    def step(self, grads, ctx):
        streams = TrialRandom(torch.tensor([list(seed) for seed in ctx.random._seeds], dtype=torch.uint8))
        features = ctx.model.parameters[f"{ctx.model.head}.weight"].shape[2]
        self.kept = streams.rand(ctx.inputs.shape[1], features) >= self.p
        return super().step(grads, ctx)


def send(block, *parts, **options):
    client = Client(block.protocol, block.batch, DefenseChain(parts))
    seeds = torch.randint(0, 256, (len(block.labels), 32), generator=torch.manual_seed(0)).to(torch.uint8)
    return client.update(block.model, block.inputs, block.labels, random=TrialRandom(seeds), **options)


def plain_dropout(block, kept, p, t, labels):
    """One trial's gradient, with a hook that drops what the last layer is given."""
    model = block.model
    state = {n: v[t % len(v)].detach().clone() for n, v in (model.parameters | model.buffers).items()}
    leaves = [state[n].requires_grad_() for n in model.parameters]
    head = model.module.get_submodule(model.head)
    hook = head.register_forward_pre_hook(lambda _, given: (given[0] * kept[t] / (1 - p),))
    try:
        model.module.train(block.protocol.batch_norm == "train")
        logits = functional_call(model.module, state, (block.inputs[t],))
    finally:
        hook.remove()
    loss = F.cross_entropy(logits, labels[t], reduction=block.protocol.reduction)
    return dict(zip(model.parameters, torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS.keys())
def test_the_gradient_is_that_of_the_dropped_net(options, p):
    block, spy = digits_block(**options), Spy(p=p)
    sent = send(block, spy)
    assert abs(spy.kept.double().mean() - (1 - p)) < 0.1
    for t in range(len(block.labels)):
        for name, slope in plain_dropout(block, spy.kept, p, t, block.labels).items():
            torch.testing.assert_close(sent[name][t], slope)


def test_soft_labels_stay_soft():
    block, spy = digits_block(4), Spy()
    sent = send(block, LabelSmoothing(alpha=0.3), spy)
    soft = 0.7 * F.one_hot(block.labels, CLASSES).double() + 0.03
    for t in range(4):
        for name, slope in plain_dropout(block, spy.kept, 0.5, t, soft).items():
            torch.testing.assert_close(sent[name][t], slope)


def test_several_local_steps_drop_anew_each_time():
    protocol = Protocol(sends="delta", local_steps=3, lr=0.2, batches="same")
    block, drops = digits_block(3, architecture="mlp", protocol=protocol), []

    class Keeper(Spy):
        def step(self, grads, ctx):
            dropped = super().step(grads, ctx)
            drops.append((self.kept, dropped))
            return dropped

    sent = send(block, Keeper())
    assert not torch.equal(drops[0][0], drops[1][0])
    for name, value in sent.items():
        torch.testing.assert_close(value, 0.2 * sum(dropped[name] for _, dropped in drops))


def test_a_dropped_input_of_one_example_has_no_weight_gradient():
    block, spy = digits_block(1, architecture="mlp"), Spy()
    slope = send(block, spy)[f"{block.model.head}.weight"]
    assert (slope.abs().sum(1)[~spy.kept[:, 0]] == 0).all()


def test_the_mean_over_masks_is_the_gradient_of_a_linear_loss():
    """Inverted dropout leaves the logits unbiased, so that near uniform confidences the labels' part stays."""
    block = digits_block(1, architecture="mlp", trials=400, models=1)
    block.inputs.copy_(block.inputs[:1].expand_as(block.inputs))
    block.labels.fill_(3)
    name = f"{block.model.head}.weight"
    dropped, clean = send(block, Dropout(p=0.3))[name].mean(0), block.update()[name][0]
    assert F.cosine_similarity(dropped.flatten(), clean.flatten(), dim=0) > 0.99
    assert 0.9 < dropped.norm() / clean.norm() < 1.1


def test_what_is_dropped_at_a_small_p_is_dropped_at_a_greater_one():
    block, little, much = digits_block(4), Spy(p=0.2), Spy(p=0.6)
    send(block, little)
    send(block, much)
    assert (little.kept | ~much.kept).all()
    assert (little.kept & ~much.kept).any()


def test_p_of_zero_changes_nothing():
    block = digits_block(3)
    assert all(torch.equal(v, block.update()[n]) for n, v in send(block, Dropout(p=0.0)).items())


def test_an_attacker_can_differentiate_through_it():
    block = digits_block(2, architecture="mlp")
    block.inputs.requires_grad_()
    sent = send(block, Dropout(), create_graph=True)
    (slope,) = torch.autograd.grad(sum(v.square().sum() for v in sent.values()), block.inputs)
    assert slope.abs().sum() > 0


def test_a_net_that_changes_its_logits_is_refused():
    block = digits_block(2)
    block.model.head_is_last = False
    with pytest.raises(UserError, match=r"dropout: expected a net .* choose another"):
        send(block, Dropout())


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_probability_outside_of_0_to_1_is_refused(p):
    with pytest.raises(UserError, match=r"p: expected .* got .* write"):
        Dropout(p=p)

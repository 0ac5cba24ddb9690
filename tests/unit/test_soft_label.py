"""Soft-label recovery against the truth, and against a search by scipy for one trial at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.soft_label import SoftLabel, soft_labels
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from leakbench_baselines.defenses.mixup import Mixup
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.tasks import Protocol

NETS = {
    "lenet": {"architecture": "lenet_zhu"},
    "relu": {"architecture": "mlp"},
    "tanh": {"architecture": "mlp", "activation": "tanh"},
    "shared": {"architecture": "mlp", "models": 1},
}


class Spy(Defense):
    """Keeps the labels that the client trains on."""

    def batch(self, inputs, labels, ctx):
        self.soft = labels
        return inputs, labels


def defended(block, defense):
    """Return what the clients send, and the soft labels (T, C) of their only example."""
    spy = Spy()
    client = Client(block.protocol, block.batch, DefenseChain([defense, spy]))
    sent = client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])
    soft = spy.soft if spy.soft.dim() == 3 else F.one_hot(spy.soft, CLASSES)
    return sent, soft[:, 0].double()


def head(block, sent):
    name = block.model.head
    tensors = (sent[f"{name}.weight"], block.model.parameters[f"{name}.weight"], block.model.parameters[f"{name}.bias"])
    return [value.detach() for value in tensors]


def plain_soft_label(gradient, weight, bias, classes):
    """One trial as in the paper: the factor between features and gradient row at which the small entries agree."""
    row = gradient[np.abs(gradient.sum(1)).argmax()]
    a = np.abs(row).argmax()

    def label(factor):
        return softmax(weight @ (factor * row) + bias) - gradient[:, a] / (factor * row[a])

    def loss(log, sign):
        return np.sort(label(sign * np.exp(log)))[: len(bias) - classes].var()

    found = []
    logs = np.linspace(0, 7, 700)
    for sign in (-1, 1):
        heights = np.array([loss(log, sign) for log in logs])
        inner = [i for i in range(1, 699) if heights[i] <= min(heights[i - 1], heights[i + 1])]
        for i in sorted(inner, key=lambda i: heights[i])[:4]:
            result = minimize_scalar(
                loss, args=(sign,), bounds=(logs[i - 1], logs[i + 1]), method="bounded", options={"xatol": 1e-10}
            )
            found.append((result.fun, sign * np.exp(result.x)))
    return label(min(found)[1])


@pytest.mark.parametrize("defense", [LabelSmoothing(alpha=0.1), LabelSmoothing(alpha=0.4)], ids=repr)
@pytest.mark.parametrize("options", NETS.values(), ids=NETS.keys())
def test_a_smoothed_label_is_recovered(options, defense):
    block = digits_block(1, trials=16, **options)
    sent, truth = defended(block, defense)
    torch.testing.assert_close(soft_labels(*head(block, sent), 1), truth, rtol=0, atol=1e-6)
    assert torch.equal(block.run(SoftLabel(), sent), block.counts)


@pytest.mark.parametrize("options", NETS.values(), ids=NETS.keys())
def test_both_labels_and_the_mixing_coefficient_are_recovered(options):
    block = digits_block(2, trials=16, sampler="unique", **options)
    sent, truth = defended(block, Mixup())
    recovered = soft_labels(*head(block, sent), 2)
    torch.testing.assert_close(recovered, truth, rtol=0, atol=1e-6)
    assert ((recovered > 1e-3).sum(1) == 2).any()
    assert torch.equal(block.run(SoftLabel(classes=2), sent), block.counts)


@pytest.mark.parametrize("classes", [1, 2])
def test_a_net_that_is_confidently_wrong_hides_no_label(classes):
    """There the greatest row may be the predicted class's, whose factor is positive."""
    block = digits_block(classes, trials=16, sampler="unique", architecture="mlp")
    name = f"{block.model.head}.weight"
    wrong = block.model.with_state(parameters={name: 30 * block.model.parameters[name]})
    block = replace(block, model=wrong, knowledge={**block.knowledge, "model": wrong})
    sent, truth = defended(block, LabelSmoothing(alpha=0.4) if classes == 1 else Mixup())
    torch.testing.assert_close(soft_labels(*head(block, sent), classes), truth, rtol=0, atol=1e-6)


def test_a_mixture_of_one_label_counts_it_twice():
    block = digits_block(2, trials=32, sampler="iid", seed=1)
    assert (block.counts == 2).any()
    assert torch.equal(block.run(SoftLabel(classes=2), defended(block, Mixup())[0]), block.counts)


@pytest.mark.parametrize(("defense", "classes"), [(LabelSmoothing(), 1), (Mixup(), 2)], ids=repr)
def test_the_search_finds_what_scipy_finds_trial_by_trial(defense, classes):
    block = digits_block(classes, architecture="mlp", sampler="unique")
    gradient, weight, bias = head(block, defended(block, defense)[0])
    recovered = soft_labels(gradient, weight, bias, classes)
    for t in range(len(gradient)):
        plain = plain_soft_label(gradient[t].numpy(), weight[t].numpy(), bias[t].numpy(), classes)
        np.testing.assert_allclose(recovered[t], plain, atol=1e-6)


@pytest.mark.parametrize(
    "protocol", [Protocol(reduction="sum"), Protocol(sends="delta", lr=0.3), Protocol(sends="weights")]
)
def test_hard_labels_are_recovered_whatever_is_sent(protocol):
    block = digits_block(1, trials=16, protocol=protocol)
    assert torch.equal(block.run(SoftLabel()), block.counts)


@pytest.mark.parametrize("defense", [LabelSmoothing(), Mixup()], ids=repr)
def test_the_summed_loss_changes_nothing(defense):
    block = digits_block(defense.merges, trials=64, protocol=Protocol(reduction="sum"), sampler="unique")
    assert torch.equal(block.run(SoftLabel(classes=defense.merges), defended(block, defense)[0]), block.counts)


def test_several_small_steps_on_one_example_are_nearly_one():
    steps = Protocol(sends="delta", local_steps=4, lr=0.01, batches="same")
    block = digits_block(1, trials=16, protocol=steps)
    assert torch.equal(block.run(SoftLabel()), block.counts)


def test_float32_is_enough():
    block = digits_block(2, trials=16, sampler="unique")
    sent, truth = defended(block, Mixup())
    gradient, weight, bias = (value.float() for value in head(block, sent))
    torch.testing.assert_close(soft_labels(gradient, weight, bias, 2), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-300, 1.0, 1e30, 1e300])
def test_noise_gives_counts(scale, classes):
    block = digits_block(1)
    update = {
        n: scale * torch.randn(v.shape, generator=torch.manual_seed(0)).double() for n, v in block.update().items()
    }
    assert block.run(SoftLabel(classes=classes), update).sum(1).tolist() == [classes] * 4
    assert soft_labels(*head(block, update), classes).isfinite().all()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("classes", [1, 2])
def test_too_few_classes_give_a_label_nonetheless(count, classes):
    gradient, weight = torch.randn(2, 5, count, 7, generator=torch.manual_seed(0))
    assert soft_labels(gradient, weight, torch.zeros(1, count), classes).isfinite().all()


def test_other_numbers_of_classes_are_refused():
    with pytest.raises(UserError, match=r"classes: expected 1 or 2, got 3; write"):
        SoftLabel(classes=3)

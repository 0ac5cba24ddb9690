"""Mixup against a loop over pairs, and what a merging defense means for the planner."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from leakbench_baselines.defenses.mixup import Mixup
from scipy.stats import kstest
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, UserError
from leakbench.chain import DefenseChain
from leakbench.entries import resolve
from leakbench.federation.client import Client
from leakbench.federation.gradients import per_trial_gradients
from leakbench.grids import Cell
from leakbench.keys import DEVELOPMENT
from leakbench.runner.execute import Runner
from leakbench.runner.grant import granted_names
from leakbench.runner.plan import plan
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task


class Spy(Defense):
    """Keeps the batch that the client trains on."""

    def batch(self, inputs, labels, ctx):
        self.inputs, self.labels = inputs, labels
        return inputs, labels


def mixed(block, *parts):
    spy = Spy()
    client = Client(block.protocol, block.batch, DefenseChain([*parts, spy]))
    sent = client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])
    return sent, spy.inputs, spy.labels


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9])
def test_pairs_become_one_example_and_one_label_with_the_same_weight(batch):
    block = digits_block(batch, sampler="iid")
    sent, inputs, labels = mixed(block, Mixup())
    assert inputs.shape[1] == (batch + 1) // 2
    onehot = F.one_hot(block.labels, CLASSES).double()
    for t in range(4):
        for pair in range(batch // 2):
            first, second = block.inputs[t, 2 * pair], block.inputs[t, 2 * pair + 1]
            gap = first - second
            share = ((inputs[t, pair] - second) * gap).sum() / gap.square().sum()
            assert 0 <= share <= 1
            torch.testing.assert_close(inputs[t, pair], share * first + (1 - share) * second)
            expected = share * onehot[t, 2 * pair] + (1 - share) * onehot[t, 2 * pair + 1]
            torch.testing.assert_close(labels[t, pair], expected)
        if batch % 2:
            assert torch.equal(inputs[t, -1], block.inputs[t, -1])
            assert torch.equal(labels[t, -1], onehot[t, -1])
    gradient = per_trial_gradients(block.model, inputs, labels).tensors
    for name, value in sent.items():
        torch.testing.assert_close(value, gradient[name])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_weights_are_beta_distributed_and_differ_between_pairs_and_trials(alpha):
    block = digits_block(64, sampler="iid", trials=8)
    block.inputs.copy_((torch.arange(64) % 2 == 0).double()[None, :, None, None, None].expand_as(block.inputs))
    share = mixed(block, Mixup(alpha=alpha))[1][:, :, 0, 0, 0].flatten()
    assert kstest(share.numpy(), "beta", (alpha, alpha)).pvalue > 1e-3
    assert len(share.unique()) == 256


def test_soft_labels_are_mixed_too():
    block = digits_block(2, sampler="unique")
    _, _, plain = mixed(block, Mixup())
    _, _, smooth = mixed(block, LabelSmoothing(alpha=0.5), Mixup())
    torch.testing.assert_close(smooth, 0.5 * plain + 0.05)


def test_a_dirichlet_parameter_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"alpha: expected .* got 0; write"):
        Mixup(alpha=0)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "protocol", "expression", "single"),
    [
        (1, {}, "none", True),
        (2, {}, "none", False),
        (2, {}, "mixup", True),
        (2, {}, "gaussian_noise+mixup", True),
        (3, {}, "mixup", False),
        (4, {}, "mixup", False),
        (4, {}, "mixup+mixup", True),
        (1, {}, "mixup", True),
        (1, {"clients": 2, "secure_aggregation": True}, "mixup", False),
        (1, {"sends": "delta", "local_steps": 2}, "mixup", False),
        (2, {"sends": "delta", "local_steps": 2, "batches": "same"}, "mixup", True),
    ],
)
def test_a_single_example_is_one_that_the_client_trains_on(batch, protocol, expression, single):
    task = Task(
        dataset="digits",
        architecture=Architecture(name="mlp"),
        batch=BatchSpec(size=batch),
        protocol=Protocol(**protocol),
    )
    weights = SimpleNamespace(
        has_head_bias=True, nonnegative_features=True, head="fc", parameters={"fc.weight": torch.zeros(1, 10, 3)}
    )
    assert ("single_example" in granted_names(task, weights, resolve("defense", expression))) == single


def test_soft_labels_are_attacked_where_mixup_leaves_one_example(tmp_path):
    (attack,) = resolve("attack", "soft_label(classes=2)")

    def job(batch, defense):
        task = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=batch))
        return plan([Cell("", task, attack, resolve("defense", defense), 8)], DEVELOPMENT)[0]

    with Runner(tmp_path, season=DEVELOPMENT, isolation="process") as runner:
        pair, plain, two = (
            pd.read_parquet(runner.run(job(*cell)).path) for cell in [(2, "mixup"), (2, "none"), (4, "mixup")]
        )
    assert set(pair.status) == {"ok"}
    assert pair.instance_recall.mean() == 1
    assert set(plain.status) == set(two.status) == {"not_applicable"}

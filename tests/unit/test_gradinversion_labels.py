"""GradInversion's label rule against plain sorting, one trial at a time."""

from __future__ import annotations

import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.gradinversion_labels import GradInversionLabels

from leakbench import UserError
from leakbench.tasks import Protocol


def by_hand(rows, total, rule):
    """Counts of one trial from a weight gradient (C, d)."""
    lowest = [min(row) for row in rows.tolist()]
    if rule == "negative":
        return [int(low < 0) for low in lowest]
    named = sorted(range(len(lowest)), key=lambda c: lowest[c])[:total]
    return [int(c in named) for c in range(len(lowest))]


@pytest.mark.parametrize("rule", ["lowest", "negative"])
@pytest.mark.parametrize("batch", [1, 4, 8, 24])
@pytest.mark.parametrize("models", [1, 4])
def test_agrees_with_the_plain_loop_on_real_gradients(batch, models, rule):
    block = digits_block(batch, models=models)
    counts = block.run(GradInversionLabels(rule=rule))
    for t in range(len(counts)):
        assert counts[t].tolist() == by_hand(block.plain_head_gradient(t)[0], batch, rule)


@pytest.mark.parametrize("batch", [1, 4, 10, 24])
def test_names_as_many_classes_as_there_are_labels_or_all(batch):
    counts = digits_block(batch).run(GradInversionLabels())
    assert counts.max() == 1
    assert (counts.sum(1) == min(batch, CLASSES)).all()


@pytest.mark.parametrize("seed", range(3))
def test_single_labels_are_found_behind_non_negative_features(seed):
    for rule in ("lowest", "negative"):
        block = digits_block(1, trials=8, seed=seed)
        assert torch.equal(block.run(GradInversionLabels(rule=rule)), block.counts)


def test_unique_labels_are_found_behind_sparse_features():
    block = digits_block(4, architecture="mlp", trials=16, sampler="unique")
    assert block.recall(GradInversionLabels()) > 0.95


def test_absent_classes_are_negative_behind_tanh_alone():
    for architecture, activation in (("mlp", "relu"), ("lenet_zhu", "sigmoid"), ("mlp", "tanh")):
        block = digits_block(8, architecture=architecture, activation=activation, trials=8)
        named = block.run(GradInversionLabels(rule="negative"))
        assert (named[block.counts == 0] == (activation == "tanh")).all()


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_needs_no_learning_rate_over_several_steps(sends):
    block = digits_block(2, protocol=Protocol(sends=sends, local_steps=3, lr=0.05))
    update, head = block.update(), f"{block.model.head}.weight"
    summed = update[head] if sends == "delta" else block.model.parameters[head] - update[head]
    counts = block.run(GradInversionLabels())
    for t in range(len(counts)):
        assert counts[t].tolist() == by_hand(summed[t] / 0.05, 6, "lowest")


@pytest.mark.parametrize("rule", ["lowest", "negative"])
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-320, -1e300])
def test_degenerate_updates_give_counts(fill, rule):
    block = digits_block(4)
    update = {name: torch.full_like(value, fill) for name, value in block.update().items()}
    expected = by_hand(torch.full((CLASSES, 3), fill, dtype=torch.float64), 4, rule)
    assert block.run(GradInversionLabels(rule=rule), update).tolist() == [expected] * 4


def test_an_unknown_rule_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"expected 'lowest' or 'negative', got 'top'") as caught:
        GradInversionLabels(rule="top")
    assert "\n" not in str(caught.value)

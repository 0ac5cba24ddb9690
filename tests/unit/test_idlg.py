"""iDLG's sign rule against plain loops over one backward pass per trial."""

from __future__ import annotations

import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.idlg import IDLG

from leakbench.tasks import Protocol


def by_hand(rows, total):
    """Counts of one trial from a weight gradient (C, d), entry by entry."""
    sums = [sum(row) for row in rows.tolist()]
    if total == 1:
        return [int(c == sums.index(min(sums))) for c in range(len(sums))]
    return [int(s < 0) for s in sums]


@pytest.mark.parametrize("batch", [1, 4, 24])
@pytest.mark.parametrize("models", [1, 4])
def test_agrees_with_the_plain_loop_on_real_gradients(batch, models):
    block = digits_block(batch, models=models)
    counts = block.run(IDLG())
    for t in range(len(counts)):
        assert counts[t].tolist() == by_hand(block.plain_head_gradient(t)[0], batch)


@pytest.mark.parametrize("seed", range(4))
def test_a_single_label_is_found_behind_non_negative_features(seed):
    block = digits_block(1, trials=8, seed=seed)
    assert torch.equal(block.run(IDLG()), block.counts)


def test_signs_fail_behind_tanh():
    block = digits_block(1, trials=16, activation="tanh")
    assert block.recall(IDLG()) < 1
    counts = block.run(IDLG())
    for t in range(len(counts)):
        assert counts[t].tolist() == by_hand(block.plain_head_gradient(t)[0], 1)


def test_a_batch_names_nobody_twice_and_misses_no_single_label():
    block = digits_block(3, trials=16, sampler="unique")
    counts = block.run(IDLG())
    assert counts.max() == 1
    assert (counts[block.counts == 0] == 0).all()


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_needs_no_learning_rate_over_several_steps(sends):
    block = digits_block(2, protocol=Protocol(sends=sends, local_steps=3, lr=0.05))
    update, head = block.update(), f"{block.model.head}.weight"
    summed = update[head] if sends == "delta" else block.model.parameters[head] - update[head]
    counts = block.run(IDLG())
    for t in range(len(counts)):
        assert counts[t].tolist() == by_hand(summed[t] / 0.05, 6)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-320, -1e300])
def test_degenerate_updates_give_counts(batch, fill):
    block = digits_block(batch)
    update = {name: torch.full_like(value, fill) for name, value in block.update().items()}
    counts = block.run(IDLG(), update)
    expected = by_hand(torch.full((CLASSES, 3), fill, dtype=torch.float64), batch)
    assert counts.tolist() == [expected] * 4

"""RLG against linear programs, one trial and class at a time, and where the answer is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.rlg import RLG, certificates, class_columns, stands_apart
from scipy.optimize import linprog

from leakbench.tasks import Protocol


def singular_columns(rows, total):
    """The classes' columns (k, C) in the leading right singular vectors of one trial's gradient (C, d)."""
    _, _, right = np.linalg.svd(rows.T, full_matrices=False)
    return right[: min(total, np.linalg.matrix_rank(rows))]


def deepest(columns, label):
    """Least q_label.x over a box of x with q_j.x >= 0 for all other classes j: below 0 where a hyperplane separates."""
    others = np.delete(columns, label, axis=1)
    found = linprog(columns[:, label], A_ub=-others.T, b_ub=np.zeros(others.shape[1]), bounds=(-1, 1))
    assert found.success
    return found.fun


def satisfiable(columns, label):
    """Whether some x has q_label.x = -1 and q_j.x >= -0.01 for all others, the released code's acceptance."""
    others = np.delete(columns, label, axis=1)
    free = (None, None)
    limits = np.full(others.shape[1], 1e-2 * (1 + 1e-6))
    own = columns[None, :, label]
    return linprog(np.zeros(len(columns)), A_ub=-others.T, b_ub=limits, A_eq=own, b_eq=[-1], bounds=free).status == 0


def check(rows, total, counts):
    """Assert that a class that clearly separates is named, one beyond the slack is not; return how many are clear."""
    columns = singular_columns(rows, total)
    clear = 0
    for c, named in enumerate(counts):
        surely = deepest(columns, c) < -1e-2 * len(columns) ** 0.5 - 1e-6  # |x| <= sqrt(k) in the box
        possibly = satisfiable(columns, c)
        assert surely <= named <= possibly
        clear += surely == possibly
    return clear


def softmax_gradient(seed, *, classes, features, labels, spread=0.3):
    """Weight gradient (1, C, d) of a batch with random features of either sign, by the closed form."""
    stream = torch.Generator().manual_seed(seed)
    p = (spread * torch.randn(len(labels), classes, generator=stream, dtype=torch.float64)).softmax(-1)
    errors = p - torch.nn.functional.one_hot(labels, classes)
    return (errors.T @ torch.randn(len(labels), features, generator=stream, dtype=torch.float64))[None]


def decide(rows, total):
    """Classes that stand apart (T, C) by both parts of the attack, and by the second alone."""
    columns = class_columns(rows, total)
    apart, not_apart = certificates(columns)
    assert not (apart & not_apart).any()
    slow = torch.tensor([[stands_apart(q, c) for c in range(rows.shape[1])] for q in columns.numpy()])
    return torch.where(apart | not_apart, apart, slow), slow


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("batch", [1, 4, 8, 24])
@pytest.mark.parametrize("models", [1, 4])
def test_agrees_with_linear_programs_on_real_gradients(batch, models, activation):
    block = digits_block(batch, models=models, activation=activation)
    counts = block.run(RLG())
    clear = [check(block.plain_head_gradient(t)[0].numpy(), batch, counts[t].tolist()) for t in range(len(counts))]
    assert sum(clear) >= 0.95 * counts.numel()


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_agrees_with_linear_programs_over_several_steps(sends):
    block = digits_block(2, protocol=Protocol(sends=sends, local_steps=3, lr=0.05))
    update, head = block.update(), f"{block.model.head}.weight"
    moved = update[head] if sends == "delta" else block.model.parameters[head] - update[head]
    counts = block.run(RLG())
    clear = [check(moved[t].numpy(), 6, counts[t].tolist()) for t in range(len(counts))]
    assert sum(clear) >= 0.95 * counts.numel()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), classes=st.integers(12, 40), batch=st.integers(1, 10))
def test_the_set_is_exact_while_examples_are_few(seed, classes, batch):
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randperm(classes, generator=stream)[:batch]
    rows = softmax_gradient(seed, classes=classes, features=64, labels=labels)
    present = torch.zeros(1, classes, dtype=torch.bool).index_fill(1, labels, True)
    both, slow = decide(rows, batch)
    assert torch.equal(both, present)
    assert torch.equal(slow, present)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 40),
    spread=st.sampled_from([0.3, 3.0]),
    noise=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_every_answer_is_borne_out_by_linear_programs(seed, batch, spread, noise):
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(16, (batch,), generator=stream)
    rows = softmax_gradient(seed, classes=16, features=20, labels=labels, spread=spread)
    rows = rows + noise * rows.std() * torch.randn(rows.shape, generator=stream, dtype=torch.float64)
    for answer in decide(rows, batch):
        check(rows[0].numpy(), batch, answer[0].tolist())


@pytest.mark.parametrize(
    ("angle", "expected"), [(0.1, True), (0.02, True), (0.005, False), (0.0, False), (-0.5, False)]
)
def test_a_class_stands_apart_by_its_distance_from_the_quadrant_of_two_others(angle, expected):
    columns = np.array([[1, 0, np.cos(angle)], [0, 1, -np.sin(angle)]])
    assert stands_apart(columns, 2) == expected


def test_certificates_decide_most_classes_of_an_untrained_net():
    labels = torch.arange(24)
    rows = torch.cat([softmax_gradient(s, classes=100, features=84, labels=labels, spread=0.05) for s in range(4)])
    apart, not_apart = certificates(class_columns(rows, 24))
    assert (apart | not_apart).double().mean() > 0.95


def test_columns_are_the_leading_singular_vectors_up_to_the_number_of_labels():
    stream = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 10, 6, generator=stream, dtype=torch.float64)
    rows[1] = rows[1, :, :2] @ torch.randn(2, 6, generator=stream, dtype=torch.float64)  # rank 2
    columns = class_columns(rows, 4)
    for t, kept in enumerate([4, 2, 4]):
        expected = singular_columns(rows[t].numpy(), 4)
        assert len(expected) == kept
        projector = columns[t].T @ columns[t]
        np.testing.assert_allclose(projector.numpy(), expected.T @ expected, atol=1e-12)


def test_batches_as_wide_as_the_classes_hide_who_is_there():
    block = digits_block(64, trials=8, sampler="iid")
    assert (block.run(RLG()) == 1).all()  # rank C - 1: every class is a vertex of a simplex


def test_batches_wider_than_the_features_hide_nearly_all():
    labels = torch.arange(100).repeat(4)
    rows = softmax_gradient(3, classes=100, features=84, labels=labels)
    both, _ = decide(rows, len(labels))
    assert both.sum() < 20


def test_repeats_are_not_counted():
    assert digits_block(8, trials=4).run(RLG()).max() == 1


@pytest.mark.parametrize("batch", [1, 4, 24])
@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("kind", ["constant", "noise", "signs"])
def test_degenerate_updates_give_counts(kind, scale, batch):
    block = digits_block(batch)
    stream = torch.Generator().manual_seed(0)

    def spoil(value):
        noise = torch.randn(value.shape, generator=stream, dtype=value.dtype)
        return scale * {"constant": torch.ones_like(value), "noise": noise, "signs": noise.sign()}[kind]

    counts = block.run(RLG(), {name: spoil(value) for name, value in block.update().items()})
    assert counts.shape == (4, CLASSES)
    assert ((counts == 0) | (counts == 1)).all()
    if scale == 0:
        assert (counts == 0).all()

"""LLG and LLG+ against a plain loop written from the paper's released algorithm, one trial and one label at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.llg import LLG, extract_counts
from leakbench_baselines.attacks.llg_plus import LLGPlus
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge
from leakbench.tasks import Protocol

ROUNDS = 2


pytestmark = pytest.mark.usefixtures("one_thread")


def extract(g, m, s, total, *, plus):
    """The extraction step for one trial: a list of labels from a list of class signals."""
    output = []
    negative = [i for i in range(len(g)) if g[i] < 0]
    if plus:
        negative.sort(key=lambda i: g[i])
    g = [g[i] - s[i] for i in range(len(g))]
    for i in negative:
        if plus and len(output) == total:
            break
        output.append(i)
        g[i] = g[i] - m
    while len(output) < total:
        j = min(range(len(g)), key=lambda i: g[i])
        output.append(j)
        g[j] = g[j] - m
    return sorted(output)


def impact(g, total):
    return (1 / total) * sum(x for x in g if x < 0) * (1 + 1 / len(g))


def as_labels(counts):
    return [label for label, count in enumerate(counts.tolist()) for _ in range(count)]


def check_extraction(g, m, offset, total, *, capped):
    counts = extract_counts(g, m, total, offset=offset, capped=capped)
    for t in range(len(g)):
        s = [0.0] * g.shape[1] if offset is None else offset[t].tolist()
        assert as_labels(counts[t]) == extract(g[t].tolist(), m[t].item(), s, total, plus=capped)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    trials=st.integers(1, 5),
    classes=st.integers(2, 12),
    total=st.integers(1, 40),
    shift=st.floats(-1.5, 1.5),
    plus=st.booleans(),
)
def test_extraction_is_the_released_algorithm_trial_by_trial(seed, trials, classes, total, shift, plus):
    stream = torch.Generator().manual_seed(seed)
    g = torch.randn(trials, classes, generator=stream, dtype=torch.float64) + shift
    offset = torch.rand(trials, classes, generator=stream, dtype=torch.float64) if plus else None
    m = -torch.rand(trials, generator=stream, dtype=torch.float64) - 1e-3
    check_extraction(g, m, offset, total, capped=plus)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    classes=st.integers(2, 12),
    total=st.integers(1, 60),
    spread=st.sampled_from([1, 4, 30]),
    capped=st.booleans(),
)
def test_ties_go_to_the_lowest_class_as_in_the_loop(seed, classes, total, spread, capped):
    stream = torch.Generator().manual_seed(seed)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=stream).double()

    g, offset = whole(-spread, 2 * spread, 5, classes), whole(0, spread, 5, classes)
    check_extraction(g, whole(-4, 2, 5), offset, total, capped=capped)  # an impact of 0 or above starves all but one


@pytest.mark.parametrize("total", [1, 100, 4096])
@pytest.mark.parametrize("capped", [False, True])
def test_extraction_of_many_labels_is_the_loop(total, capped):
    stream = torch.Generator().manual_seed(total)
    g = torch.randint(-50, 2000, (3, 100), generator=stream).double()
    m = -torch.tensor([1.0, 7.0, 120.0], dtype=torch.float64)
    check_extraction(g, m, torch.randint(0, 50, (3, 100), generator=stream).double(), total, capped=capped)


@settings(max_examples=60, deadline=None)
@given(
    value=st.sampled_from([0.0, 1.0, -1.0, 1e-320, -1e-320, 1e300, -1e300, float("inf"), -float("inf"), float("nan")]),
    step=st.sampled_from([0.0, -1e-320, -1.0, -1e300, -float("inf"), float("nan")]),
    total=st.integers(1, 300),
)
def test_extraction_outputs_all_labels_whatever_the_signals(value, step, total):
    g = torch.tensor([[value] * 6, [value, 1.0, -2.0, 3.0, -value, value]], dtype=torch.float64)
    counts = extract_counts(g, torch.full((2,), step, dtype=torch.float64), total, capped=True)
    assert counts.min() >= 0
    assert counts.sum(1).eq(total).all()


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_llg_agrees_with_the_plain_loop_on_real_gradients(batch, models):
    block = digits_block(batch, models=models)
    counts = block.run(LLG())
    for t in range(len(counts)):
        g = block.plain_head_gradient(t)[0].sum(-1).tolist()
        expected = extract(g, impact(g, batch), [0.0] * CLASSES, batch, plus=False)
        assert as_labels(counts[t]) == expected
        if batch == 1:
            assert expected == block.labels[t].tolist()


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_llg_does_not_need_the_learning_rate(sends):
    protocol = Protocol(sends=sends, local_steps=3, lr=0.05)
    block = digits_block(4, protocol=protocol)
    name, update = f"{block.model.head}.weight", block.update()
    summed = update[name] if sends == "delta" else block.model.parameters[name] - update[name]
    counts = block.run(LLG(), update)
    for t in range(len(counts)):
        g = (summed[t] / protocol.lr).sum(-1).tolist()
        assert as_labels(counts[t]) == extract(g, impact(g, 12), [0.0] * CLASSES, 12, plus=False)


def plain_row_sums(model, trial, inputs, labels):
    """Row sums of the last layer's weight gradient of one batch, by one backward pass through the module."""
    state = {k: v[trial % len(v)].clone() for k, v in (model.parameters | model.buffers).items()}
    weight = state[f"{model.head}.weight"].requires_grad_()
    loss = F.cross_entropy(functional_call(model.module, state, (inputs,)), labels)
    return torch.autograd.grad(loss, weight)[0].sum(-1).tolist()


def plus_statistics(row_sums, labels, batch, rounds=ROUNDS):
    """Impact of one occurrence and offsets of one step, from a function that maps example indices to row sums."""
    m, s = 0.0, [0.0] * CLASSES
    for r in range(rounds):
        for c in range(CLASSES):
            members = [i for i in range(len(labels)) if labels[i] == c]
            g = row_sums([members[(r * batch + b) % len(members)] for b in range(batch)])
            m += g[c] / (CLASSES * batch) / rounds
            for j in range(CLASSES):
                s[j] += 0 if j == c else g[j] / (rounds * (CLASSES - 1))
    return m * (1 + 1 / CLASSES), s


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize(
    ("protocol", "batch"),
    [
        (Protocol(), 1),
        (Protocol(), 6),
        (Protocol(reduction="sum"), 6),
        (Protocol(sends="delta", local_steps=3, lr=0.05), 6),
        (Protocol(sends="weights", local_steps=2, batches="same", lr=0.05, reduction="sum"), 5),
    ],
)
def test_llg_plus_agrees_with_the_plain_loop_on_real_gradients(protocol, batch, models):
    block = digits_block(batch, protocol=protocol, models=models)
    own_inputs, own_labels = block.knowledge["auxiliary"]
    name, update = f"{block.model.head}.weight", block.update()
    sent = block.model.parameters[name] - update[name] if protocol.sends == "weights" else update[name]
    per_example = batch if protocol.reduction == "sum" else 1
    scale = per_example * (1 if protocol.sends == "gradient" else protocol.lr)
    counts = block.run(LLGPlus(rounds=ROUNDS), update)
    total = block.labels.shape[1]
    for t in range(len(counts)):

        def row_sums(rows, trial=t):
            return plain_row_sums(block.model, trial, own_inputs[rows], own_labels[rows])

        m, s = plus_statistics(row_sums, own_labels.tolist(), batch)
        # Summed over steps, an occurrence counts once per step that its example is part of.
        m *= protocol.local_steps * batch / total
        g = (sent[t] / scale).sum(-1).tolist()
        expected = extract(g, m, [protocol.local_steps * x for x in s], total, plus=True)
        assert as_labels(counts[t]) == expected


@pytest.mark.parametrize("models", [1, 2])
def test_llg_plus_measures_whole_batches_where_batch_norm_joins_them(models):
    protocol = Protocol(batch_norm="train")
    block = digits_block(3, architecture="resnet20", width=4, protocol=protocol, trials=2, models=models)
    knowledge = Knowledge(**block.knowledge)
    own_inputs, own_labels = knowledge.auxiliary
    prepared = LLGPlus(rounds=ROUNDS).prepare(knowledge)

    def row_sums(rows, trial):
        x, y = (v[rows].expand(models, *v[rows].shape) for v in (own_inputs, own_labels))
        return knowledge.gradients(x, y, create_graph=False)[f"{block.model.head}.weight"][trial].sum(-1).tolist()

    for t in range(models):
        m, s = plus_statistics(lambda rows, trial=t: row_sums(rows, trial), own_labels.tolist(), 3)
        assert prepared["impact"][t].item() == pytest.approx(3 * m)
        assert prepared["offset"][t].tolist() == pytest.approx(s)


def test_llg_plus_prepares_shared_and_own_models_alike():
    knowledge = digits_block(4).knowledge
    own = LLGPlus(rounds=2).prepare(Knowledge(**knowledge))
    shared = LLGPlus(rounds=2).prepare(Knowledge(**{**knowledge, "model": knowledge["model"].trials(2, 3)}))
    for name, value in shared.items():
        torch.testing.assert_close(value, own[name][2:3])


def test_llg_plus_studies_only_the_classes_it_has_examples_of():
    knowledge = digits_block(4).knowledge
    inputs, labels = knowledge["auxiliary"]
    kept = labels == 3
    prepared = LLGPlus(rounds=2).prepare(Knowledge(**{**knowledge, "auxiliary": (inputs[kept], labels[kept])}))
    assert prepared["impact"].lt(0).all()
    assert prepared["offset"].isfinite().all()
    assert prepared["offset"][:, 3].eq(0).all()
    assert prepared["offset"][:, :3].gt(0).all()

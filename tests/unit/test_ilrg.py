"""iLRG against a plain loop with a pseudo-inverse, one trial, class and entry at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.ilrg import ILRG, class_embeddings, solve_counts

from leakbench.tasks import Protocol


def decade(x):
    return math.floor(math.log10(abs(x)))


def entry(weight, bias):
    """One entry of a class embedding: mantissas divided, the gap of their exponents held within 10 decades."""
    if weight == 0:
        return 0.0
    mantissa, exponent = (bias / 10.0 ** decade(bias), decade(bias)) if bias != 0 else (1.0, -64)
    gap = min(10, max(-10, decade(weight) - exponent))
    return weight / 10.0 ** decade(weight) / mantissa * 10.0**gap


def system(probabilities, bias, total):
    """The C + 1 equations as the paper writes them; ``probabilities[j]`` is class j's softmax."""
    classes = len(bias)
    coefficients, values = [[1.0] * classes], [float(total)]
    for i in range(classes):
        coefficients.append([probabilities[j][i] - (i == j) for j in range(classes)])
        values.append(total * bias[i])
    return np.array(coefficients), np.array(values)


def by_hand(weight, bias, head_weight, head_bias, total):
    """Counts of one trial, from a mean weight (C, d) and bias (C,) gradient."""
    classes = len(bias)
    probabilities = []
    for i in range(classes):
        embedding = np.array([entry(w, bias[i]) for w in weight[i]])
        logits = head_weight @ embedding + head_bias
        exponentials = np.exp(logits - logits.max())
        probabilities.append(exponentials / exponentials.sum())
    coefficients, values = system(probabilities, bias, total)
    solution = np.linalg.pinv(coefficients) @ values
    rounded = [round(max(0.0, n)) for n in solution]
    return [n if n <= total else 0 for n in rounded]


def head(block, trial):
    model = block.model
    return [model.parameters[f"{model.head}.{part}"][trial % model.draws].numpy() for part in ("weight", "bias")]


@pytest.mark.parametrize("architecture", ["lenet_zhu", "mlp"])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("models", [1, 4])
def test_agrees_with_the_plain_loop_on_real_gradients(batch, models, architecture):
    block = digits_block(batch, models=models, architecture=architecture)
    counts = block.run(ILRG())
    for t in range(len(counts)):
        gradient = [part.numpy() for part in block.plain_head_gradient(t)]
        assert counts[t].tolist() == by_hand(*gradient, *head(block, t), batch)


@pytest.mark.parametrize("sends", ["delta", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_agrees_with_the_plain_loop_over_several_steps(sends, reduction):
    steps, batch, lr = 3, 4, 0.01
    protocol = Protocol(sends=sends, local_steps=steps, lr=lr, reduction=reduction)
    block = digits_block(batch, protocol=protocol, architecture="mlp")
    update, counts, name = block.update(), block.run(ILRG()), block.model.head
    for t in range(len(counts)):
        mean = []
        for part, start in zip(("weight", "bias"), head(block, t), strict=True):
            sent = update[f"{name}.{part}"][t].numpy()
            moved = sent if sends == "delta" else start - sent
            mean.append(moved / lr / steps / (batch if reduction == "sum" else 1))
        assert counts[t].tolist() == by_hand(*mean, *head(block, t), steps * batch)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    classes=st.integers(2, 30),
    sharpness=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    noise=st.sampled_from([0.0, 0.01, 10.0]),
)
def test_square_system_has_the_pseudo_inverse_solution_on_noisy_updates_too(seed, classes, sharpness, noise):
    stream = torch.Generator().manual_seed(seed)
    probabilities = (sharpness * torch.randn(3, classes, classes, generator=stream, dtype=torch.float64)).softmax(-1)
    counts = torch.randint(0, 9, (3, classes), generator=stream).double()
    total = 24
    bias = ((counts[:, :, None] * probabilities).sum(1) - counts) / total
    bias = bias + noise * torch.randn(bias.shape, generator=stream, dtype=torch.float64)  # does not sum to 0
    solved = solve_counts(probabilities, bias, total)
    for t in range(3):
        coefficients, values = system(probabilities[t].tolist(), bias[t].tolist(), total)
        reference = np.linalg.pinv(coefficients) @ values
        # Two backward stable solvers differ by the condition number times rounding.
        allowed = max(1e-8, 1e-14 * np.linalg.cond(coefficients)) * max(1, np.abs(reference).max())
        assert np.abs(solved[t].numpy() - reference).max() <= allowed


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), classes=st.integers(3, 20), saturated=st.integers(1, 20))
def test_singular_systems_of_saturated_nets_have_the_pseudo_inverse_solution(seed, classes, saturated):
    stream = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(2, classes, classes, generator=stream, dtype=torch.float64).softmax(-1)
    own = torch.arange(min(saturated, classes))
    probabilities[1, own] = torch.eye(classes, dtype=torch.float64)[own]  # trial 0 stays regular
    bias = torch.randn(2, classes, generator=stream, dtype=torch.float64)
    solved = solve_counts(probabilities, bias, 24)
    for t in range(2):
        coefficients, values = system(probabilities[t].tolist(), bias[t].tolist(), 24)
        reference = np.linalg.pinv(coefficients, rcond=1e-13) @ values
        assert np.abs(solved[t].numpy() - reference).max() <= 1e-8 * max(1, np.abs(reference).max())


def test_a_trial_is_solved_alike_with_a_singular_neighbor_and_without():
    stream = torch.Generator().manual_seed(0)
    probabilities = torch.randn(2, 12, 12, generator=stream, dtype=torch.float64).softmax(-1)
    probabilities[1] = torch.eye(12, dtype=torch.float64)
    bias = torch.randn(2, 12, generator=stream, dtype=torch.float64)
    together = solve_counts(probabilities, bias, 24)
    for t in range(2):
        torch.testing.assert_close(solve_counts(probabilities[t : t + 1], bias[t : t + 1], 24)[0], together[t])


@settings(max_examples=100, deadline=None)
@given(
    weight=st.floats(-1e3, 1e3).filter(lambda w: w == 0 or abs(w) > 1e-25),
    bias=st.sampled_from([0.0, 1.0, -0.3, 1e-12, -7e-18, 1e-30]),
)
def test_embeddings_keep_within_ten_decades(weight, bias):
    rows = torch.tensor([[[weight, 1.0]]], dtype=torch.float64)
    found = class_embeddings(rows, torch.tensor([[bias]], dtype=torch.float64))[0, 0, 0].item()
    expected = entry(weight, bias)
    # An entry further below 1 than that stays where it is: the released floor of 1e-10 adds nothing to a logit.
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), batch=st.integers(1, 40))
def test_counts_are_exact_where_all_examples_look_alike(seed, batch):
    block = digits_block(batch, trials=2, seed=seed, sampler="iid")
    block.inputs.copy_(block.inputs[:, :1].expand_as(block.inputs))
    counts = block.run(ILRG())
    total = torch.bincount(block.labels[0], minlength=CLASSES)
    assert torch.equal(counts, block.counts)
    assert torch.equal(counts[0], total)


@pytest.mark.parametrize("activation", ["relu", "tanh", "leaky_relu"])
def test_any_activation_will_do_on_untrained_nets(activation):
    block = digits_block(16, architecture="mlp", activation=activation, trials=12)
    assert block.recall(ILRG()) > 0.95


def test_repair_makes_the_counts_sum_to_the_labels():
    block = digits_block(64, architecture="mlp", trials=12)
    update = {n: v + 0.02 * torch.randn(v.shape, dtype=v.dtype) for n, v in block.update().items()}
    plain, repaired = block.run(ILRG(), update), block.run(ILRG(repair=True), update)
    assert (plain.sum(1) != 64).any()
    assert (repaired.sum(1) == 64).all()


def test_single_precision_agrees_with_double():
    block = digits_block(16, trials=8)
    rounded = {name: value.float() for name, value in block.update().items()}
    assert torch.equal(block.run(ILRG(), rounded), block.run(ILRG()))


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("kind", ["constant", "noise", "no_bias"])
def test_degenerate_updates_give_counts(kind, scale, repair):
    block = digits_block(8)
    stream = torch.Generator().manual_seed(0)

    def spoil(name, value):
        if kind == "constant":
            return torch.full_like(value, scale)
        noise = scale * torch.randn(value.shape, generator=stream, dtype=value.dtype)
        return noise * 0 if kind == "no_bias" and name.endswith("bias") else noise

    counts = block.run(ILRG(repair=repair), {n: spoil(n, v) for n, v in block.update().items()})
    assert ((counts >= 0) & (counts <= 8)).all()
    if repair:
        assert (counts.sum(1) == 8).all()

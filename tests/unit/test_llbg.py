"""LLBG against its greedy rule written as a loop over labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.bias_count import BiasCount
from leakbench_baselines.attacks.llbg import LLBG, smallest_counts
from leakbench_baselines.attacks.llbg_aux import LLBGAux
from leakbench_baselines.attacks.llg import LLG

from leakbench import UserError
from leakbench.tasks import Protocol

STEPS = Protocol(sends="delta", local_steps=3, lr=0.05)
BLOCKS = {
    "B=1": {"batch": 1},
    "B=4": {"batch": 4},
    "B=32": {"batch": 32},
    "tanh": {"batch": 16, "architecture": "mlp", "activation": "tanh"},
    "shared": {"batch": 16, "models": 1},
    "several steps": {"batch": 8, "protocol": STEPS},
    "the same batch again": {"batch": 8, "protocol": STEPS.model_copy(update={"batches": "same"})},
    "weights, shared": {"batch": 8, "protocol": STEPS.model_copy(update={"sends": "weights"}), "models": 1},
    "sum": {"batch": 8, "protocol": Protocol(reduction="sum")},
}


def plain_llbg(summed, gamma, examples_per_step, steps, total):
    """One trial as in the paper: ``summed`` is the sum of the local steps' bias gradients."""
    g, labels = np.array(summed, dtype=np.float64), []
    present = [c for c in range(len(g)) if g[c] < 0]
    for c in present:
        labels.append(c)
        g[c] += (1 - gamma[c]) / examples_per_step
    g -= steps / len(g)
    while len(labels) < total:
        j = int(np.argmin(g))
        labels.append(j)
        g[j] += (1 - gamma[j]) / examples_per_step
    return np.bincount(labels, minlength=len(g))


def summed_gradient(block, trial):
    protocol, name = block.protocol, f"{block.model.head}.bias"
    sent = block.update()[name][trial]
    if protocol.sends == "weights":
        sent = block.model.parameters[name][trial % block.model.draws] - sent
    if protocol.sends != "gradient":
        sent = sent / protocol.lr
    return (sent / (block.batch if protocol.reduction == "sum" else 1)).numpy()


def expected(block, gammas):
    # A label that takes part in several steps counts once, so the paper's examples per step are spread over them.
    steps, total = block.protocol.local_steps, block.labels.shape[1]
    per_step = total / steps
    return [plain_llbg(summed_gradient(block, t), gammas[t], per_step, steps, total) for t in range(len(block.labels))]


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS.keys())
def test_counts_are_those_of_the_greedy_loop(options, gamma):
    block = digits_block(**options)
    assert block.run(LLBG(gamma=gamma)).tolist() == np.array(expected(block, [[gamma] * CLASSES] * 4)).tolist()


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS.keys())
def test_confidences_are_measured_on_auxiliary_examples_of_each_class(options):
    block = digits_block(**options, auxiliary=15)  # some classes have none
    inputs, labels = block.knowledge["auxiliary"]
    gammas = []
    for t in range(len(block.labels)):
        model = block.model.trials(t, t + 1)
        p = model.logits(inputs[None])[0].softmax(-1).detach().numpy()
        gamma = {c: np.mean([p[i, c] for i in range(len(labels)) if labels[i] == c]) for c in set(labels.tolist())}
        gammas.append([gamma.get(c, np.mean(list(gamma.values()))) for c in range(CLASSES)])
    assert len(set(labels.tolist())) < CLASSES
    assert block.run(LLBGAux()).tolist() == np.array(expected(block, gammas)).tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 40), st.sampled_from(["real", "tied", "far"]))
@example(929, 12, 10, "far")  # two numbers that differ by less than the halvings resolve
def test_the_smallest_numbers_are_those_that_the_greedy_rule_picks(seed, classes, total, kind):
    stream = np.random.default_rng(seed)
    start, step = stream.normal(size=(3, classes)), stream.uniform(0.01, 1, size=(3, classes))
    if kind == "tied":  # exact in binary, so that equal numbers are equal
        start, step = np.round(start * 2) / 4, np.full_like(step, 0.25)
    if kind == "far":
        start = start * 10.0 ** stream.integers(-20, 20, size=(3, classes))
    wanted = np.array([total, total // 2, 0])
    counts = smallest_counts(*map(torch.tensor, (start, step, wanted)))
    for t in range(3):
        listed = sorted(
            (start[t, c] - start[t].min() + j * step[t, c], c) for c in range(classes) for j in range(total)
        )
        picked = [c for _, c in listed[: wanted[t]]]
        assert counts[t].tolist() == np.bincount(picked, minlength=classes).tolist()


@pytest.mark.parametrize("attack", [LLBG(), LLBG(gamma=0.9), LLBGAux()], ids=repr)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_an_update_of_noise_gives_as_many_labels_as_there_are(attack, scale):
    block = digits_block(4)
    noise = {n: scale * torch.randn(v.shape, generator=torch.manual_seed(0)) for n, v in block.update().items()}
    for update in (noise, {n: v.to(torch.float64) for n, v in noise.items()}, {n: v * 0 - 1 for n, v in noise.items()}):
        counts = block.run(attack, update)
        assert counts.sum(1).tolist() == [4] * 4
        assert (counts >= 0).all()


def test_the_bias_is_immune_to_activations_that_change_sign():
    block = digits_block(32, architecture="mlp", activation="tanh", trials=16)
    assert block.recall(LLBG()) > 0.9 > 0.7 > block.recall(LLG())


def test_on_an_untrained_model_it_is_about_as_good_as_counting_by_the_bias():
    block = digits_block(32, trials=16)
    assert abs(block.recall(LLBG()) - block.recall(BiasCount())) < 0.1


@pytest.mark.parametrize("gamma", [-0.1, 1.0])
def test_a_confidence_that_leaves_no_step_is_refused(gamma):
    with pytest.raises(UserError, match=r"gamma: expected .* got .* write"):
        LLBG(gamma=gamma)

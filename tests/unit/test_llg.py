"""LLG against a plain loop written from the paper's released algorithm, one trial and one label at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.attacks.llg import LLG, extract_counts
from leakbench_baselines.attacks.llg_plus import LLGPlus
from sklearn.datasets import load_digits
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, Observation
from leakbench.federation.client import Client
from leakbench.knowledge import Facts, Seen
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8))
CLASSES = 10
ROUNDS = 2


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    counts = extract_counts(g, m, total, offset=offset, capped=plus)
    for t in range(trials):
        s = offset[t].tolist() if plus else [0.0] * classes
        assert as_labels(counts[t]) == extract(g[t].tolist(), m[t].item(), s, total, plus=plus)


def block(protocol, batch, *, trials=4, auxiliary=80):
    """Return what a harness would hand over, and the private data, for digits and one untrained net per trial."""
    data = load_digits()
    images = torch.tensor(data.images)[:, None] / 16
    labels = torch.tensor(data.target)
    inputs = batch * protocol.local_batches
    picks = torch.randint(0, 1500, (trials, inputs), generator=torch.Generator().manual_seed(11))
    picks[:, : inputs // 2] = picks[:, :1]  # repeated labels
    model = build_model(Architecture(name="lenet_zhu"), SPEC.shape, CLASSES, seeds=range(trials))
    facts = Facts(
        granted=ThreatModel(auxiliary=auxiliary).granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=False,
        num_classes=CLASSES,
        batch_size=batch,
        inputs_per_client=inputs,
    )
    knowledge = {
        "facts": facts,
        "random": TrialRandom(torch.arange(trials * 32).reshape(trials, 32).to(torch.uint8)),
        "model": model.to(dtype=torch.float64),
        "auxiliary": (images[-auxiliary:], labels[-auxiliary:]),
    }
    return knowledge, images[picks], labels[picks]


def plain_row_sums(model, trial, inputs, labels):
    """Row sums of the last layer's weight gradient of one batch, by one backward pass through the module."""
    state = {k: v[trial].clone() for k, v in (model.parameters | model.buffers).items()}
    weight = state[f"{model.head}.weight"].requires_grad_()
    loss = F.cross_entropy(functional_call(model.module, state, (inputs,)), labels)
    return torch.autograd.grad(loss, weight)[0].sum(-1).tolist()


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_llg_agrees_with_the_plain_loop_on_real_gradients(batch):
    knowledge, inputs, labels = block(Protocol(), batch)
    update = Client(Protocol(), batch).update(knowledge["model"], inputs, labels, random=knowledge["random"])
    counts = LLG().run(Observation(Seen([update]), **knowledge)).label_counts
    assert counts.shape == (len(labels), 1, CLASSES)
    for t in range(len(labels)):
        g = plain_row_sums(knowledge["model"], t, inputs[t], labels[t])
        expected = extract(g, impact(g, batch), [0.0] * CLASSES, batch, plus=False)
        assert as_labels(counts[t, 0]) == expected
        if batch == 1:
            assert expected == labels[t].tolist()


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_llg_does_not_need_the_learning_rate(sends):
    protocol = Protocol(sends=sends, local_steps=3, lr=0.05)
    knowledge, inputs, labels = block(protocol, 4)
    update = Client(protocol, 4).update(knowledge["model"], inputs, labels, random=knowledge["random"])
    start = knowledge["model"].parameters
    summed = {n: (v if sends == "delta" else start[n] - v) / protocol.lr for n, v in update.items()}
    counts = LLG().run(Observation(Seen([update]), **knowledge)).label_counts
    for t in range(len(labels)):
        g = summed[f"{knowledge['model'].head}.weight"][t].sum(-1).tolist()
        assert as_labels(counts[t, 0]) == extract(g, impact(g, 12), [0.0] * CLASSES, 12, plus=False)


@pytest.mark.parametrize("steps", [1, 3])
def test_llg_plus_agrees_with_the_plain_loop_on_real_gradients(steps):
    protocol = Protocol() if steps == 1 else Protocol(sends="delta", local_steps=steps, lr=0.05)
    batch = 6
    knowledge, inputs, labels = block(protocol, batch)
    model, (own_inputs, own_labels) = knowledge["model"], knowledge["auxiliary"]
    update = Client(protocol, batch).update(model, inputs, labels, random=knowledge["random"])
    attack = LLGPlus(rounds=ROUNDS)
    prepared = attack.prepare(Knowledge(**knowledge))
    counts = attack.run(Observation(Seen([update], prepared=prepared), **knowledge)).label_counts
    scale = 1 if steps == 1 else protocol.lr
    for t in range(len(labels)):
        m, s = 0.0, [0.0] * CLASSES
        for r in range(ROUNDS):
            for c in range(CLASSES):
                members = [i for i in range(len(own_labels)) if own_labels[i] == c]
                rows = [members[(r * batch + b) % len(members)] for b in range(batch)]
                g = plain_row_sums(model, t, own_inputs[rows], own_labels[rows])
                m += g[c] / (CLASSES * batch) / ROUNDS
                for j in range(CLASSES):
                    s[j] += 0 if j == c else g[j] / (ROUNDS * (CLASSES - 1))
        m *= 1 + 1 / CLASSES
        g = (update[f"{model.head}.weight"][t] / scale).sum(-1).tolist()
        expected = extract(g, m, [steps * x for x in s], steps * batch, plus=True)
        assert as_labels(counts[t, 0]) == expected


def test_llg_plus_prepares_shared_and_own_models_alike():
    knowledge, _, _ = block(Protocol(), 4)
    own = LLGPlus(rounds=2).prepare(Knowledge(**knowledge))
    shared = LLGPlus(rounds=2).prepare(Knowledge(**{**knowledge, "model": knowledge["model"].trials(2, 3)}))
    for name, value in shared.items():
        torch.testing.assert_close(value, own[name][2:3])


def test_llg_plus_studies_only_the_classes_it_has_examples_of():
    knowledge, _, _ = block(Protocol(), 4)
    inputs, labels = knowledge["auxiliary"]
    kept = labels == 3
    prepared = LLGPlus(rounds=2).prepare(Knowledge(**{**knowledge, "auxiliary": (inputs[kept], labels[kept])}))
    assert prepared["impact"].lt(0).all()
    assert prepared["offset"].isfinite().all()
    assert prepared["offset"][:, 3].eq(0).all()

"""RLU against its formulas as loops over trials, classes and local steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from label_blocks import CLASSES, digits_block
from leakbench_baselines.attacks.bias_count import BiasCount
from leakbench_baselines.attacks.llg import LLG
from leakbench_baselines.attacks.rlu import RLU
from scipy.special import softmax
from sklearn.datasets import load_digits

from leakbench import UserError
from leakbench.federation.gradients import per_trial_gradients
from leakbench.tasks import Protocol

STEPS = Protocol(sends="delta", local_steps=5, lr=0.1)
ONE_STEP = {
    "B=1": {"batch": 1},
    "B=8": {"batch": 8},
    "B=64": {"batch": 64, "architecture": "mlp"},
    "shared": {"batch": 16, "models": 1},
    "sum": {"batch": 8, "protocol": Protocol(reduction="sum")},
    "delta": {"batch": 8, "protocol": Protocol(sends="delta", lr=0.3)},
    "some classes": {"batch": 8, "auxiliary": 12},
}
SEVERAL = {
    "own": {"batch": 8, "protocol": STEPS},
    "shared": {"batch": 8, "protocol": STEPS, "models": 1, "architecture": "mlp"},
    "weights": {"batch": 4, "protocol": STEPS.model_copy(update={"sends": "weights"}), "architecture": "mlp"},
    "same": {"batch": 16, "protocol": STEPS.model_copy(update={"batches": "same"})},
    "batch norm": {
        "batch": 6,
        "protocol": STEPS.model_copy(update={"batch_norm": "train", "send_buffers": True}),
        "architecture": "resnet20",
    },
}


def trained(block, steps):
    """The same block on nets that have learned for a while."""
    data, stream, model = load_digits(), torch.Generator().manual_seed(0), block.model
    images, labels = torch.tensor(data.images)[:1500, None] / 16, torch.tensor(data.target)[:1500]
    for _ in range(steps):
        picks = torch.randint(1500, (model.draws, 32), generator=stream)
        slope = per_trial_gradients(model, images[picks], labels[picks]).tensors
        model = model.with_state(parameters={n: v - 0.1 * slope[n] for n, v in model.parameters.items()})
    return replace(block, model=model, knowledge={**block.knowledge, "model": model})


def plain_erroneous(block, model):
    """Mean logits and probabilities in class j: means over the examples of each other class, averaged over classes."""
    inputs, labels = block.knowledge["auxiliary"]
    parts = inputs.split(block.batch)  # as many as a client's batch, which matters to BatchNorm in train mode
    logits = [model.logits(part[None], batch_norm=block.protocol.batch_norm)[0] for part in parts]
    logits = torch.cat(logits).detach().numpy()
    result = []
    for values in (logits, softmax(logits, axis=1)):
        means = {c: values[labels.numpy() == c].mean(0) for c in sorted(set(labels.tolist()))}
        result.append(np.array([np.mean([m[j] for c, m in means.items() if c != j]) for j in range(CLASSES)]))
    return result


def plain_counts(confidence, db, total):
    share = np.maximum(confidence - db, 0)
    share = share / share.sum() * total
    counts = np.floor(share).astype(int)
    for c in np.argsort(-(share - counts), kind="stable")[: total - counts.sum()]:
        counts[c] += 1
    return counts


def plain_rlu(block, update, trial, refinements=5):
    protocol, name, total = block.protocol, block.model.head, block.labels.shape[1]
    model = block.model.trials(trial, trial + 1)
    before, after = {n: v[0] for n, v in model.parameters.items()}, {}
    summed = {n: v[trial] for n, v in update.items()}
    if protocol.sends == "weights":
        summed = {n: before[n] - v for n, v in summed.items()}
    after = {n: (before[n] - summed[n])[None] for n in before}
    scale = protocol.local_steps * (1 if protocol.sends == "gradient" else protocol.lr)
    scale *= block.batch if protocol.reduction == "sum" else 1
    dw, db = ((summed[f"{name}.{part}"] / scale).detach().numpy() for part in ("weight", "bias"))
    mu, e = plain_erroneous(block, model)
    if protocol.local_steps == 1:
        return plain_counts(e, db, total)
    target, late = plain_erroneous(block, model.with_state(parameters=after))
    o = [sum(db[i] * dw[i, d] for i in range(CLASSES)) / sum(db**2) for d in range(dw.shape[1])]
    n = plain_counts(late, db, total)
    unit = protocol.local_batches
    for turn in range(refinements + 1):
        shift, seen = mu.copy(), []
        for _ in range(protocol.local_steps):
            p = softmax(shift)
            seen.append(p)
            shift = np.array(
                [shift[i] - protocol.lr * (p[i] - n[i] / total) * sum(v * v for v in o) for i in range(CLASSES)]
            )
        gap = shift - target
        can_give = [i for i in range(CLASSES) if n[i] >= unit]
        if turn == refinements or max(abs(gap)) < 0.1 or not can_give:
            break
        over, under = max(can_give, key=lambda i: gap[i]), int(np.argmin(gap))
        if gap[over] < 0 or gap[under] >= 0:
            break
        n[over] -= unit
        n[under] += unit
    return plain_counts(np.minimum(e * np.mean(seen, axis=0) / softmax(mu), 1), db, total)


@pytest.mark.parametrize("learned", [0, 40])
@pytest.mark.parametrize("options", ONE_STEP.values(), ids=ONE_STEP.keys())
def test_counts_of_one_step_are_those_of_the_formula(options, learned):
    block = trained(digits_block(**options), learned)
    update = block.update()
    assert block.run(RLU()).tolist() == [plain_rlu(block, update, t).tolist() for t in range(4)]


@pytest.mark.parametrize(("name", "learned"), [(name, 0) for name in SEVERAL] + [("own", 40), ("shared", 40)])
def test_counts_of_several_steps_are_those_of_the_refined_simulation(name, learned):
    block = trained(digits_block(**SEVERAL[name]), learned)
    update = block.update()
    for refinements in (0, 5):
        expected = [plain_rlu(block, update, t, refinements).tolist() for t in range(4)]
        assert block.run(RLU(refinements=refinements), update).tolist() == expected


def test_one_step_on_an_untrained_net_is_recovered_whatever_the_activation():
    for activation in ("relu", "tanh", "elu"):
        block = digits_block(16, architecture="mlp", activation=activation, trials=16)
        assert block.recall(RLU()) > 0.97


def test_following_the_local_steps_beats_one_formula_for_all():
    block = digits_block(16, protocol=STEPS.model_copy(update={"local_steps": 10}), trials=16)
    assert block.recall(RLU()) > 0.9
    assert block.recall(RLU()) > block.recall(BiasCount()) + 0.1
    assert block.recall(RLU()) > block.recall(LLG()) + 0.1


def test_erroneous_confidences_help_on_a_trained_net():
    block = trained(digits_block(16, architecture="mlp", trials=16, models=1), 200)
    assert block.recall(RLU()) > block.recall(BiasCount()) + 0.1


@pytest.mark.parametrize("protocol", [Protocol(), STEPS, STEPS.model_copy(update={"sends": "weights"})])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_an_update_of_noise_gives_as_many_labels_as_there_are(protocol, scale):
    block = digits_block(4, protocol=protocol)
    noise = {
        n: scale * torch.randn(v.shape, generator=torch.manual_seed(0)).double() for n, v in block.update().items()
    }
    for update in (noise, {n: v * 0 + scale for n, v in noise.items()}):
        counts = block.run(RLU(), update)
        assert (counts >= 0).all()
        assert counts.sum(1).tolist() == [block.labels.shape[1]] * 4


def test_a_negative_number_of_refinements_is_refused():
    with pytest.raises(UserError, match=r"refinements: expected .* got -1; write"):
        RLU(refinements=-1)

"""ZLG and ZLG+ against their formula in plain loops, and where it is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from label_blocks import CLASSES, SPEC, digits_block
from leakbench_baselines.attacks.fedavg_labels import FedAvgLabels
from leakbench_baselines.attacks.zlg import ZLG, noise
from leakbench_baselines.attacks.zlg_plus import ZLGPlus
from torch.func import functional_call

from leakbench import Knowledge, UserError
from leakbench.randomness import TrialRandom
from leakbench.tasks import Protocol

SAMPLES = 50
PROTOCOLS = [
    (Protocol(), 1),
    (Protocol(), 8),
    (Protocol(reduction="sum"), 32),
    (Protocol(sends="delta", local_steps=3, lr=0.05), 6),
    (Protocol(sends="weights", local_steps=2, lr=0.05, batches="same"), 6),
]


def behavior(model, trial, inputs):
    """Mean softmax and mean sum of features, one input at a time through the module."""
    state = {k: v[trial % len(v)] for k, v in (model.parameters | model.buffers).items()}
    weight, bias = (state[f"{model.head}.{part}"].numpy() for part in ("weight", "bias"))
    features = []
    hook = model.module.get_submodule(model.head).register_forward_pre_hook(lambda _, x: features.append(x[0]))
    with torch.no_grad():
        functional_call(model.module, state, (inputs,))
    hook.remove()
    p, mass = np.zeros(CLASSES), 0.0
    for a in features[0].numpy():
        z = np.exp(weight @ a + bias)
        p += z / z.sum() / len(inputs)
        mass += a.sum() / len(inputs)
    return p, mass


def rounded(estimate, total):
    """Clip, rescale, round down, and give what is missing to the largest remainders."""
    share = [max(x, 0.0) for x in estimate]
    share = [x / sum(share) * total for x in share]
    counts = [int(x) for x in share]
    for k in sorted(range(len(share)), key=lambda k: (counts[k] - share[k], k))[: total - sum(counts)]:
        counts[k] += 1
    return counts


def mean_row_sums(block, update, trial):
    """Row sums of the last layer's weight gradient, as a mean over the examples behind the update."""
    name, protocol = f"{block.model.head}.weight", block.protocol
    sent = update[name][trial]
    if protocol.sends == "weights":
        sent = block.model.parameters[name][trial % block.model.draws] - sent
    if protocol.sends != "gradient":
        sent = sent / protocol.lr
    return sent.numpy().sum(1) / protocol.local_steps / (block.batch if protocol.reduction == "sum" else 1)


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("architecture", ["lenet_zhu", "mlp"])
@pytest.mark.parametrize(("protocol", "batch"), PROTOCOLS)
@pytest.mark.parametrize("plus", [False, True])
def test_agrees_with_the_formula_trial_by_trial(plus, protocol, batch, architecture, models):
    block = digits_block(batch, architecture=architecture, protocol=protocol, models=models)
    update, total = block.update(), block.labels.shape[1]
    drawn = TrialRandom(block.seeds[:models]).randn(SAMPLES, *SPEC.shape).double()
    counts = block.run(ZLGPlus() if plus else ZLG(samples=SAMPLES), update)
    for t in range(len(counts)):
        p, mass = behavior(block.model, t, block.knowledge["auxiliary"][0] if plus else drawn[t % models])
        estimate = total * p - total * mean_row_sums(block, update, t) / mass
        assert counts[t].tolist() == rounded(estimate, total)


def with_constant_features(block, value):
    """The same block on nets whose features are ``value`` before the activation, whatever the input."""
    model = block.model
    flat = {k: torch.zeros_like(v) for k, v in model.parameters.items() if not k.startswith(model.head)}
    last = [k for k in flat if k.endswith(".bias")][-1]
    flat[last] = torch.full_like(flat[last], value)
    model = model.with_state(parameters=flat)
    return replace(block, model=model, knowledge={**block.knowledge, "model": model})


@pytest.mark.parametrize("attack", [ZLG(samples=5), ZLGPlus(), FedAvgLabels(samples=5)])
@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("sampler", ["iid", "unbalanced"])
def test_counts_are_exact_where_features_do_not_depend_on_the_input(attack, batch, sampler):
    block = with_constant_features(digits_block(batch, architecture="mlp", sampler=sampler), 0.3)
    assert block.run(attack).equal(block.counts)


@pytest.mark.parametrize("attack", [ZLG(samples=5), ZLGPlus(), FedAvgLabels(samples=5)])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_net_without_features_gives_valid_counts(attack, steps):
    protocol = Protocol() if steps == 1 else Protocol(sends="delta", local_steps=steps)
    block = with_constant_features(digits_block(7, architecture="mlp", protocol=protocol), -1.0)
    counts = block.run(attack)
    assert counts.min() >= 0
    assert counts.sum(1).eq(7 * steps).all()


@pytest.mark.parametrize("architecture", ["mlp", "resnet20"])
@pytest.mark.parametrize("samples", [1, 40, 5000])
def test_noise_comes_in_whole_pieces_that_other_trials_do_not_change(architecture, samples):
    protocol = Protocol(batch_norm="train")
    block = digits_block(8, architecture=architecture, trials=2, models=2, width=4, protocol=protocol)
    both = list(noise(Knowledge(**block.knowledge), samples))
    alone = list(noise(Knowledge(**{**block.knowledge, "random": TrialRandom(block.seeds[1:])}), samples))
    assert all(x[1:].equal(y) for x, y in zip(both, alone, strict=True))
    assert len({x.shape for x in both}) == 1
    assert samples <= sum(x.shape[1] for x in both) < samples + both[0].shape[1]
    if architecture == "resnet20":
        assert both[0].shape[1] == min(samples, 8)


def test_auxiliary_batches_are_whole_where_batch_norm_joins_them():
    protocol = Protocol(batch_norm="train")
    block = digits_block(7, architecture="resnet20", trials=2, models=1, width=4, protocol=protocol, auxiliary=15)
    knowledge = Knowledge(**block.knowledge)
    inputs, _ = knowledge.auxiliary
    again = torch.cat([inputs, inputs[:6]])
    expected = knowledge.forward(again.reshape(3, 7, *SPEC.shape))[0].softmax(-1).mean((0, 1))
    torch.testing.assert_close(ZLGPlus().prepare(knowledge)["confidence"][0], expected)


def test_no_samples_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^zlg: samples: expected at least 1, got 0; write [^\n]*$"):
        ZLG(samples=0)

"""Labels of federated averaging against the paper's interpolation in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from label_blocks import SPEC, digits_block
from leakbench_baselines.attacks.fedavg_labels import FedAvgLabels
from leakbench_baselines.attacks.zlg import ZLG
from test_zlg import behavior, mean_row_sums, rounded

from leakbench import UserError
from leakbench.randomness import TrialRandom
from leakbench.tasks import Protocol

SAMPLES = 50


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("architecture", ["lenet_zhu", "mlp"])
@pytest.mark.parametrize(
    ("protocol", "batch"),
    [
        (Protocol(), 8),
        (Protocol(sends="delta", local_steps=4, lr=0.5), 6),
        (Protocol(sends="weights", local_steps=3, lr=0.5), 6),
        (Protocol(sends="delta", local_steps=5, lr=0.5, batches="same"), 16),
    ],
)
def test_agrees_with_the_interpolation_trial_by_trial(protocol, batch, architecture, models):
    block = digits_block(batch, architecture=architecture, protocol=protocol, models=models)
    update, total, steps = block.update(), block.labels.shape[1], protocol.local_steps
    before = TrialRandom(block.seeds[:models]).randn(SAMPLES, *SPEC.shape).double()
    after = TrialRandom(block.seeds).randn(SAMPLES, *SPEC.shape).double()
    counts = block.run(FedAvgLabels(samples=SAMPLES), update)
    for t in range(len(counts)):
        parameters = {}
        for name, value in block.model.parameters.items():
            start, sent = value[t % models], update[name][t]
            step = {"gradient": start - protocol.lr * sent, "delta": start - sent, "weights": sent}
            parameters[name] = step[protocol.sends][None]
        returned = block.model.trials(t, t + 1).with_state(parameters=parameters)
        p0, mass0 = behavior(block.model, t, before[t % models])
        p1, mass1 = behavior(returned, 0, after[t])
        g = mean_row_sums(block, update, t)
        estimates = []
        for j in range(steps):
            p, mass = p0 + j / steps * (p1 - p0), mass0 + j / steps * (mass1 - mass0)
            estimates.append(total * p - total * g / mass)
        assert counts[t].tolist() == rounded(np.mean(estimates, axis=0), total)


@pytest.mark.parametrize("batch", [4, 32])
def test_one_step_is_zlg(batch):
    block = digits_block(batch, architecture="mlp")
    assert block.run(FedAvgLabels(samples=SAMPLES)).equal(block.run(ZLG(samples=SAMPLES)))


def test_interpolation_helps_where_the_model_moves_far():
    protocol = Protocol(sends="delta", local_steps=10, lr=0.5)
    block = digits_block(8, architecture="lenet_zhu", protocol=protocol, trials=30)
    assert block.recall(FedAvgLabels(samples=200)) > block.recall(ZLG(samples=200)) + 0.1


def test_a_model_that_went_astray_gives_valid_counts():
    protocol = Protocol(sends="delta", local_steps=2)
    block = digits_block(4, protocol=protocol)
    update = block.update()
    for value in (0.0, 1e30, -1e30, float("inf"), float("nan")):
        counts = block.run(FedAvgLabels(samples=SAMPLES), {k: torch.full_like(v, value) for k, v in update.items()})
        assert counts.min() >= 0
        assert counts.sum(1).eq(8).all()


def test_no_samples_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^fedavg_labels: samples: expected at least 1, got 0; write [^\n]*$"):
        FedAvgLabels(samples=0)

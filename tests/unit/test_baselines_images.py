"""Image attacks of the baselines against plain single-trial references."""

from __future__ import annotations

import pytest
import torch
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.attacks.mean_image import MeanImage
from leakbench_baselines.attacks.random_image import RandomImage
from sklearn.datasets import load_digits
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, Observation, UserError
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
AUXILIARY = 100


pytestmark = pytest.mark.usefixtures("one_thread")


def block(*, trials, batch=1, own_models=True, labels_known=True, budget=None, width=64, precision="float32"):
    """Return the knowledge, the update and the private inputs of one block of digits."""
    data = load_digits()
    images = (torch.tensor(data.images, dtype=getattr(torch, precision))[:, None] / 16 - 0.3) / 0.4
    labels = torch.tensor(data.target)
    picks = torch.randint(0, 1500, (trials, batch), generator=torch.Generator().manual_seed(5))
    net = Architecture(name="mlp", params={"width": width, "depth": 1})
    model = build_model(net, SPEC.shape, 10, seeds=range(trials if own_models else 1)).to(dtype=images.dtype)
    protocol = Protocol(precision=precision)
    facts = Facts(
        granted=ThreatModel(labels=labels_known, auxiliary=AUXILIARY).granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=True,
        num_classes=10,
        batch_size=batch,
        inputs_per_client=batch,
        model_evaluations=budget,
    )
    reports = []
    knowledge = {
        "facts": facts,
        "random": TrialRandom(torch.arange(trials * 32).reshape(trials, 32).to(torch.uint8)),
        "model": model,
        "auxiliary": (images[-AUXILIARY:], labels[-AUXILIARY:]),
        "report": reports.append,
    }
    update = Client(protocol, batch).update(model, images[picks], labels[picks], random=knowledge["random"])
    seen = Seen([update], labels=labels[picks][:, None] if labels_known else None)
    return Observation(seen, **knowledge), images[picks], labels[picks], reports


def test_inverting_gradients_recovers_images_far_better_than_the_mean():
    observation, truth, _, _ = block(trials=3, labels_known=False, width=32)
    recovery = InvertingGradients(steps=120, tv=1e-4).run(observation)
    mean = observation.auxiliary[0].mean(0)
    error = (recovery.inputs - truth).square().flatten(1).mean(1)
    assert (error < 0.01 * (mean - truth).square().flatten(1).mean(1)).all()
    assert (recovery.visible_loss < 0.01).all()


def reference(model, weights, target, labels, image, *, steps, tv, lr):
    """Inverting Gradients for one trial and one restart; returns the best image on the way and its distance."""

    def gradients(create_graph):
        state = {k: v.clone().requires_grad_() for k, v in weights.items()}
        loss = F.cross_entropy(functional_call(model.module, state, (image,)), labels)
        return torch.autograd.grad(loss, list(state.values()), create_graph=create_graph)

    def distance(grads):
        dot = sum((g * t).sum() for g, t in zip(grads, target, strict=True))
        norms = sum((g * g).sum() for g in grads).sqrt() * sum((t * t).sum() for t in target).sqrt()
        return 1 - dot / norms

    def smoothness(x):
        return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., :, 1:] - x[..., :, :-1]).abs().mean()

    image = image.clone().requires_grad_()
    optimiser = torch.optim.Adam([image], lr=lr)
    visited = []
    for step in range(steps + 1):
        found = distance(gradients(create_graph=True))
        loss = found + tv * smoothness(image)
        visited.append((loss.item(), found.item(), image.detach().clone()))
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.1 ** sum(step >= int(steps // part) for part in (2.667, 1.6, 1.142))
        image.grad = torch.autograd.grad(loss, image)[0].sign()
        optimiser.step()
        with torch.no_grad():
            image.copy_(image.clamp((0 - 0.3) / 0.4, (1 - 0.3) / 0.4))
    _, found, best = min(visited, key=lambda visit: visit[0])
    return best, found


@pytest.mark.parametrize("own_models", [True, False])
def test_batched_optimiser_is_a_plain_loop_per_trial_and_restart(own_models):
    options = {"steps": 8, "tv": 0.05, "lr": 0.2}
    restarts, batch = 2, 2
    observation, _, labels, _ = block(trials=3, batch=batch, own_models=own_models, width=12, precision="float64")
    update, model = observation.update, observation.model
    starts = TrialRandom(torch.arange(3 * 32).reshape(3, 32).to(torch.uint8)).randn(restarts, batch, *SPEC.shape)
    recovery = InvertingGradients(restarts=restarts, **options).run(observation)
    for t in range(3):
        weights = {n: v[t if own_models else 0] for n, v in model.parameters.items()}
        target = [update[n][t] for n in weights]
        runs = [reference(model, weights, target, labels[t], starts[t, r].double(), **options) for r in range(restarts)]
        image, distance = min(runs, key=lambda run: run[1])
        torch.testing.assert_close(recovery.inputs[t], image)
        assert recovery.visible_loss[t].item() == pytest.approx(distance)


@pytest.mark.parametrize(("budget", "restarts"), [(1, 1), (7, 2), (5, 9), (300, 1)])
def test_inverting_gradients_stays_within_the_budget(budget, restarts):
    observation, _, _, reports = block(trials=2, budget=budget, width=8)
    recovery = InvertingGradients(steps=230, restarts=restarts).run(observation)
    assert 1 <= recovery.model_evaluations <= budget
    assert recovery.model_evaluations <= restarts * 231
    assert 1 <= recovery.visible_loss_trace.shape[1] <= 200
    assert len(reports) <= 100
    assert all(report["done"] <= report["total"] for report in reports)


def test_unknown_labels_come_from_the_row_sums():
    hidden, _, _, _ = block(trials=3, labels_known=False, width=12)
    known, _, _, _ = block(trials=3, labels_known=True, width=12)
    attack = InvertingGradients(steps=5)
    torch.testing.assert_close(attack.run(hidden).inputs, attack.run(known).inputs)


def test_a_vanishing_update_gives_finite_images():
    observation, _, _, _ = block(trials=2, width=8)
    nothing = {name: torch.zeros_like(value) for name, value in observation.update.items()}
    observation._seen = Seen([nothing], labels=observation._seen.labels)
    recovery = InvertingGradients(steps=4).run(observation)
    assert recovery.inputs.isfinite().all()
    assert recovery.visible_loss.isfinite().all()


def test_random_images_fill_the_valid_range():
    observation, _, _, _ = block(trials=3, batch=4)
    pixels = RandomImage().run(observation).inputs * 0.4 + 0.3
    assert pixels.shape == (3, 4, 1, 8, 8)
    assert 0 <= pixels.min() < 0.02
    assert 0.98 < pixels.max() <= 1
    assert abs(pixels.mean() - 0.5) < 0.03


def test_mean_image_is_the_mean_of_the_auxiliary_data():
    observation, truth, _, _ = block(trials=3, batch=4)
    inputs, _ = observation.auxiliary
    attack = MeanImage()
    observation._seen = Seen([{}], prepared=attack.prepare(Knowledge(**_knowledge(observation))))
    claimed = attack.run(observation).inputs
    assert claimed.shape == truth.shape
    torch.testing.assert_close(claimed, (inputs.sum(0) / AUXILIARY).expand_as(claimed))


def _knowledge(observation):
    return {"facts": observation._facts, "random": observation._random, "auxiliary": observation._auxiliary}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"restarts": 0}])
def test_a_run_without_steps_or_restarts_is_refused(wrong):
    with pytest.raises(UserError):
        InvertingGradients(**wrong)

"""The learned inverter: better than the mean image, better when it knows the defense, and plain in its parts."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from leakbench_baselines.attacks.learning_to_invert import LearningToInvert, inverted, matched_error
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.topk import TopK
from sklearn.datasets import load_digits

from leakbench import Knowledge, Observation, UserError
from leakbench.chain import DefenseChain
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
AUXILIARY = 1000
TRIALS = 24

pytestmark = pytest.mark.usefixtures("one_thread")


def block(*, batch=1, defense=None, known=True, protocol=None):
    """Return what prepare gets, a function from prepared tensors to an observation, and the private inputs."""
    data = load_digits()
    images = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.3) / 0.4
    labels = torch.tensor(data.target)
    picks = torch.randint(0, 700, (TRIALS, batch), generator=torch.Generator().manual_seed(5))
    model = build_model(Architecture(name="mlp", params={"width": 12, "depth": 1}), SPEC.shape, 10, seeds=[0])
    chain = DefenseChain([defense] if defense else [])
    protocol = protocol or Protocol()
    each = batch * protocol.local_batches
    facts = Facts(
        granted=ThreatModel(auxiliary=AUXILIARY, lr=True, local_steps=True).granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=True,
        num_classes=10,
        batch_size=batch,
        inputs_per_client=each,
    )
    knowledge = {
        "facts": facts,
        "model": model,
        "auxiliary": (images[-AUXILIARY:], labels[-AUXILIARY:]),
        "defense": chain if known else DefenseChain(),
    }
    update = Client(protocol, batch, chain).update(model, images[picks], labels[picks], random=_random(TRIALS, 1))

    def observe(prepared):
        return Observation(Seen([update], prepared=prepared), random=_random(TRIALS, 2), **knowledge)

    return Knowledge(random=_random(1, 3), **knowledge), observe, images[picks]


def _random(count, salt):
    return TrialRandom((torch.arange(count * 32).reshape(count, 32) + salt).to(torch.uint8))


def error(found, truth):
    """Return the mean squared error (T,) in the best order."""
    orders = [found[:, list(p)] for p in permutations(range(found.shape[1]))]
    return torch.stack([(o - truth).square().flatten(1).mean(1) for o in orders]).amin(0)


def attacked(attack, **options):
    knowledge, observe, truth = block(**options)
    return error(attack.run(observe(attack.prepare(knowledge))).inputs, truth).mean()


def mean_image(truth):
    data = torch.tensor(load_digits().images[-AUXILIARY:], dtype=torch.float32)
    return error(((data.mean(0) / 16 - 0.3) / 0.4).expand_as(truth), truth).mean()


@pytest.mark.parametrize(("batch", "share"), [(1, 0.4), (2, 0.6)])
def test_it_is_clearly_better_than_the_mean_image(batch, share):
    attack = LearningToInvert(width=100, epochs=25, batch=64, simulations=1500)
    assert attacked(attack, batch=batch) < share * mean_image(block(batch=batch)[2])


@pytest.mark.parametrize("defense", [GaussianNoise(std=1.0, relative=True), TopK(p=0.95)])
def test_training_on_defended_updates_pays(defense):
    attack = LearningToInvert(width=100, epochs=20, batch=64, simulations=1000)
    assert attacked(attack, defense=defense) < 0.85 * attacked(attack, defense=defense, known=False)


def test_it_learns_from_weights_after_local_steps():
    attack = LearningToInvert(width=100, epochs=25, batch=64)
    protocol = Protocol(sends="weights", local_steps=2, batches="same", lr=0.1)
    assert attacked(attack, protocol=protocol) < 0.5 * mean_image(block()[2])


def test_hashed_updates_still_tell_the_image():
    attack = LearningToInvert(width=100, epochs=25, batch=64, features=400)
    assert attacked(attack) < 0.5 * mean_image(block()[2])


def test_the_same_knowledge_trains_the_same_inverter():
    attack = LearningToInvert(width=8, epochs=2, simulations=50)
    options = {"batch": 2, "defense": GaussianNoise(std=0.5, relative=True)}
    once, again = (attack.prepare(block(**options)[0]) for _ in range(2))
    assert once.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_degenerate_updates_give_finite_inputs_within_bounds(scale):
    knowledge, observe, _ = block()
    attack = LearningToInvert(width=8, epochs=1, simulations=20)
    observation = observe(attack.prepare(knowledge))
    observation._seen = Seen(
        [{name: scale * value for name, value in observation.update.items()}], prepared=observation.prepared
    )
    inputs = attack.run(observation).inputs
    low, high = observation.bounds
    assert ((inputs >= low - 1e-6) & (inputs <= high + 1e-6)).all()


def test_error_is_that_of_the_best_order():
    generator = torch.Generator().manual_seed(0)
    found, images = torch.rand(2, 4, 3 * 5, generator=generator), torch.rand(2, 4, 3, 5, generator=generator)
    best = [[error(f.view(1, 3, 5), i[None])[0] for f, i in zip(a, b, strict=True)] for a, b in zip(found, images)]  # noqa: B905
    torch.testing.assert_close(matched_error(found, images), torch.tensor(best).mean(1))


def test_inverter_is_a_perceptron_with_two_hidden_layers():
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 6), (6, 6), (6, 3)]
    net = {f"weight{i}": torch.randn(1, *size, generator=generator) for i, size in enumerate(sizes)}
    net |= {f"bias{i}": torch.randn(1, 1, size[1], generator=generator) for i, size in enumerate(sizes)}
    x = torch.randn(2, 5, 4, generator=generator)
    hidden = (x @ net["weight0"][0] + net["bias0"][0, 0]).relu()
    hidden = (hidden @ net["weight1"][0] + net["bias1"][0, 0]).relu()
    torch.testing.assert_close(inverted(net, x), (hidden @ net["weight2"][0] + net["bias2"][0, 0]).sigmoid())


@pytest.mark.parametrize("wrong", [{"width": 0}, {"epochs": 0}, {"lr": 0}, {"features": 0}, {"simulations": 0}])
def test_senseless_parameters_are_refused(wrong):
    with pytest.raises(UserError):
        LearningToInvert(**wrong)

"""The quotient of a dense first layer: exact for one input, and for inputs that have a neuron of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.attacks.analytic import Analytic
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dropout import Dropout
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from sklearn.datasets import load_digits

from leakbench import Knowledge, NotApplicable, Observation, UserError
from leakbench.chain import DefenseChain
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
LOW, HIGH = -0.3 / 0.4, 0.7 / 0.4

pytestmark = pytest.mark.usefixtures("one_thread")


def block(*, trials=6, batch=1, net="mlp", protocol=None, defense=None, models=None, **params):
    """Return an observation of digits and the private inputs (T, N, 1, 8, 8)."""
    protocol = protocol or Protocol()
    data = load_digits()
    dtype = getattr(torch, protocol.precision)
    images, labels = (torch.tensor(data.images, dtype=dtype)[:, None] / 16 - 0.3) / 0.4, torch.tensor(data.target)
    count = batch * protocol.local_batches
    picks = torch.randint(0, 1500, (trials, count), generator=torch.Generator().manual_seed(2))
    model = build_model(Architecture(name=net, params=params), SPEC.shape, 10, seeds=range(models or trials))
    facts = Facts(
        granted=ThreatModel(lr=False).granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=True,
        num_classes=10,
        batch_size=batch,
        inputs_per_client=count,
    )
    random = TrialRandom(torch.arange(trials * 32).reshape(trials, 32).to(torch.uint8))
    known = {"facts": facts, "random": random, "model": model.to(dtype=dtype)}
    client = Client(protocol, batch, DefenseChain([defense] if defense else []))
    update = client.update(known["model"], images[picks], labels[picks], random=random)
    return Observation(Seen([update]), **known), images[picks]


def showing(observation, update):
    return Observation(Seen([update]), **known(observation))


def known(observation):
    return {"facts": observation._facts, "random": observation._random, "model": observation.model}


def exact(claimed, truth, bound=1e-5):
    """How many of the inputs (T, N, ...) have a claim within ``bound`` in every pixel."""
    difference = (claimed[:, None] - truth[:, :, None]).abs().flatten(3).amax(3)
    return (difference.amin(2) < bound).float().mean().item()


DEFENSES = {
    "none": None,
    "label_smoothing": LabelSmoothing(alpha=0.3),
    "dropout": Dropout(p=0.5),
    "clip": ClipL2(bound=0.01),
}


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("models", [1, 6])
@pytest.mark.parametrize("defense", ["none", "label_smoothing", "dropout", "clip"])
def test_one_input_is_exact_whatever_comes_after_the_layer(defense, models, activation):
    observation, truth = block(defense=DEFENSES[defense], models=models, activation=activation)
    assert (Analytic().run(observation).inputs - truth).abs().max() < 1e-5


def test_one_input_is_one_row_s_quotient_in_float64():
    observation, _ = block(protocol=Protocol(precision="float64"))
    weight, bias = (observation.update[f"body.linear0.{part}"] for part in ("weight", "bias"))
    claimed = Analytic().run(observation).inputs
    for t in range(6):
        row = bias[t].abs().argmax()
        torch.testing.assert_close(claimed[t].flatten(), (weight[t, row] / bias[t, row]))


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_several_steps_on_one_input_are_exact_without_the_learning_rate(sends):
    protocol = Protocol(sends=sends, local_steps=4, batches="same", lr=0.05, momentum=0.9, precision="float64")
    observation, truth = block(protocol=protocol)
    assert (Analytic().run(observation).inputs - truth).abs().max() < 1e-5


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-30, 1e30), st.integers(1, 4))
def test_the_scale_of_the_update_does_not_matter(scale, batch):
    observation, _ = block(trials=2, batch=batch, protocol=Protocol(precision="float64"))
    scaled = showing(observation, {name: scale * value for name, value in observation.update.items()})
    torch.testing.assert_close(Analytic().run(scaled).inputs, Analytic().run(observation).inputs)


def test_inputs_with_neurons_of_their_own_are_exact():
    observation, truth = block(batch=3)
    bias = torch.zeros(6, 9)
    bias[:, :6] = torch.tensor([0.5, -2.0, 1.0, 0.3, 0.1, -0.4])
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    weight = torch.zeros(6, 9, 64)
    weight[:, :6] = bias[:, :6, None] * truth.flatten(2)[:, owner]
    bias[:, 6], weight[:, 6] = 3.0, (truth.flatten(2) * torch.tensor([1.0, 1.0, 1.0])[:, None]).sum(1)  # an average
    bias[:, 7], weight[:, 7] = 1.0, 50.0  # no image
    claimed = Analytic().run(showing(observation, {"body.linear0.weight": weight, "body.linear0.bias": bias})).inputs
    assert exact(claimed, truth) == 1


def test_of_rows_that_agree_with_none_the_least_alike_are_claimed():
    observation, truth = block(batch=2)
    share = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.2, 1.0])[:, None]  # of the second input
    weight = truth.flatten(2)[:, :1] * (1 - share) + truth.flatten(2)[:, 1:] * share
    update = {"body.linear0.weight": weight, "body.linear0.bias": torch.ones(6, 6)}
    assert exact(Analytic().run(showing(observation, update)).inputs, truth) == 1


def test_real_batches_give_whole_inputs_while_relu_neurons_are_plenty():
    shares = []
    for batch in (2, 4, 16):
        observation, truth = block(batch=batch, width=128)
        claimed = Analytic().run(observation).inputs
        assert claimed.shape == truth.shape
        shares.append(exact(claimed, truth, 1e-3))
    assert shares[0] == 1
    assert shares[1] > 0.8
    assert shares[2] < shares[1]


def test_no_more_claims_than_rows():
    observation, _ = block(batch=8, width=5)
    assert Analytic().run(observation).inputs.shape == (6, 5, 1, 8, 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spoil", [0.0, 1e-40, 1e38, float("inf"), float("nan")])
def test_degenerate_updates_give_finite_images(spoil, batch):
    observation, _ = block(trials=2, batch=batch)
    broken = showing(observation, {name: value * spoil for name, value in observation.update.items()})
    claimed = Analytic().run(broken).inputs
    assert claimed.isfinite().all()
    assert LOW - 1e-6 <= claimed.min() <= claimed.max() <= HIGH + 1e-6


def test_nets_without_a_dense_first_layer_are_declined():
    observation, _ = block(trials=1, net="lenet_zhu")
    with pytest.raises(NotApplicable):
        Analytic().prepare(Knowledge(**known(observation)))
    observation, _ = block(trials=1)
    assert Analytic().prepare(Knowledge(**known(observation))) == {}


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(UserError):
        Analytic(tolerance=tolerance)

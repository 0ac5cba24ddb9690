from __future__ import annotations

import plain_client as plain
import pytest
import torch
from plain_client import B, C, T, close

from leakbench import Defense, NotGranted
from leakbench.attack import NEEDS
from leakbench.chain import DefenseChain
from leakbench.errors import InvalidOutput
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.knowledge import Knowledge
from leakbench.observation import Observation, Seen
from leakbench.tasks import InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 3, 3), mean=(0.25,), std=(0.5,))
EVERYTHING = ThreatModel(
    adversary="malicious_server", labels=True, batch_order=True, auxiliary=3, change_parameters=True, per_client=True
)


class Scene:
    """One block: what the clients hold, what they send, and what a threat model grants of it."""

    def __init__(self, protocol=None, threat=EVERYTHING, *, net="mlp", draws=1, parts=(), update=None, order=None):
        self.protocol = protocol or Protocol()
        self.model = plain.make(net, draws)
        self.inputs, self.labels = plain.examples(self.model, B * self.protocol.local_batches)
        self.chain = DefenseChain(parts)
        self.sent = update or Client(self.protocol, B, self.chain).update(
            self.model, self.inputs, self.labels, random=plain.random()
        )
        self.threat, self.order = threat, order
        self.granted = threat.granted()

    def facts(self, **changes):
        fields = {
            "granted": self.granted,
            "protocol": self.protocol,
            "input_spec": SPEC,
            "normalised": True,
            "num_classes": C,
            "clients": self.protocol.clients,
            "batch_size": B if self.threat.batch_size else None,
            "inputs_per_client": self.inputs.shape[1] if self.threat.batch_size else None,
            "class_prior": (0.2,) * C if self.threat.label_prior else None,
            "model_evaluations": 7,
        }
        return Facts(**(fields | changes))

    def knowledge(self, **changes):
        return {
            "facts": self.facts(**changes),
            "random": plain.random(first=50),
            "model": self.model if self.threat.weights else None,
            "auxiliary": (self.inputs[0, :3], self.labels[0, :3]) if self.threat.auxiliary else None,
            "defense": self.chain if self.threat.defense else None,
        }

    def observation(self, **changes):
        labels = self.labels[:, None] if self.threat.labels else None
        order = self.order if self.threat.batch_order else None
        return Observation(Seen([self.sent], labels, order, {"made": torch.ones(1)}), **self.knowledge(**changes))


# --- grants -----------------------------------------------------------------------------------------------------------

READS = {
    "labels": ["labels"],
    "batch_size": ["batch_size", "inputs_per_client", "simulate"],
    "lr": ["lr", "gradient", "head_bias", "simulate"],
    "local_steps": ["local_steps", "batch_order", "simulate"],
    "batch_order": ["batch_order"],
    "label_prior": ["class_prior"],
    "weights": ["model", "gradients", "simulate", "head_weight"],
    "defense": ["defense"],
    "auxiliary": ["auxiliary"],
    "bn_statistics": ["bn_statistics"],
}
"""What cannot be read without a grant."""
NOTHING = {"auxiliary": 0, "bn_statistics": "none"}
OPEN = ("trials", "num_classes", "input_spec", "bounds", "sends", "clients", "budget", "update", "updates", "prepared")


def read(observation, name, scene):
    value = getattr(observation, name)
    return value(scene.inputs, scene.labels) if name in ("simulate", "gradients") else value


@pytest.mark.parametrize(("flag", "name"), [(flag, name) for flag, names in READS.items() for name in names])
def test_what_is_withheld_cannot_be_read(flag, name):
    protocol = Protocol(sends="delta", local_steps=2)
    withheld = Scene(protocol, EVERYTHING.model_copy(update={flag: NOTHING.get(flag, False)}))
    with pytest.raises(NotGranted, match=rf"^'{flag}' is not granted") as error:
        read(withheld.observation(), name, withheld)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted({name for names in READS.values() for name in names}))
def test_what_is_granted_can_be_read(name):
    scene = Scene(Protocol(sends="delta", local_steps=2))
    assert read(scene.observation(), name, scene) is not None


@pytest.mark.parametrize("name", OPEN)
def test_public_facts_need_no_grant(name):
    nothing = ThreatModel(**{flag: NOTHING.get(flag, False) for flag in READS})
    assert nothing.granted() == frozenset()
    assert getattr(Scene(threat=nothing).observation(), name) is not None


def test_a_value_that_was_not_handed_over_cannot_be_read_even_if_it_is_named():
    scene = Scene()
    with pytest.raises(NotGranted, match="'labels'"):
        _ = Observation(Seen([scene.sent]), **scene.knowledge()).labels


def test_every_grant_of_a_threat_model_may_be_needed_by_an_attack():
    assert ThreatModel(**{**EVERYTHING.model_dump(), "change_architecture": True}).granted() <= NEEDS


def test_a_gradient_protocol_needs_no_learning_rate_and_no_number_of_steps():
    scene = Scene(threat=EVERYTHING.model_copy(update={"lr": False, "local_steps": False}))
    close(scene.observation().gradient, scene.sent)
    close(scene.observation().simulate(scene.inputs, scene.labels), scene.sent)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_gradient_is_the_sum_of_the_local_gradients_without_buffers(sends, draws):
    steps = {} if sends == "gradient" else {"local_steps": 3}
    protocol = Protocol(sends=sends, lr=0.2, batch_norm="train", send_buffers=True, **steps)
    scene = Scene(protocol, net="convnet", draws=draws)
    model, total = scene.model, dict.fromkeys(scene.model.parameters, 0)
    for step in range(protocol.local_steps):
        own = slice(step * B, (step + 1) * B)
        grads = plain.update(model, scene.inputs[:, own], scene.labels[:, own], Protocol(batch_norm="train"))
        total = {name: value + grads[name] for name, value in total.items()}
        model = model.with_state({name: value - 0.2 * grads[name] for name, value in model.parameters.items()})
    observation = scene.observation()
    assert observation.update.keys() > total.keys()
    close(observation.gradient, total)
    assert torch.equal(observation.head_weight, observation.gradient["fc.weight"])
    assert torch.equal(observation.head_bias, observation.gradient["fc.bias"])


def test_a_head_that_was_not_read_is_named():
    scene = Scene()
    del scene.sent["fc.bias"]
    with pytest.raises(NotGranted, match=r"'fc\.bias' was not sent or not read; `reads` must name head\.bias"):
        _ = scene.observation().head_bias


@pytest.mark.parametrize("normalised", [True, False])
def test_bounds_are_the_values_of_black_and_white(normalised):
    low, high = Scene().observation(normalised=normalised).bounds
    assert (low.item(), high.item()) == ((-0.5, 1.5) if normalised else (0.0, 1.0))
    colored = InputSpec(shape=(2, 3, 3), mean=(0.25, 0.5), std=(0.5, 0.25))
    low, high = Scene().observation(normalised=normalised, input_spec=colored).bounds
    images = torch.rand(4, 2, 3, 3)
    inputs = (images - torch.tensor([0.25, 0.5]).view(2, 1, 1)) / torch.tensor([0.5, 0.25]).view(2, 1, 1)
    inputs = inputs if normalised else images
    assert ((low <= inputs) & (inputs <= high)).all()
    assert high.flatten().tolist() == ([1.5, 2.0] if normalised else [1.0])


def test_labels_of_several_clients_come_one_after_the_other():
    scene = Scene(Protocol(clients=2))
    labels = torch.arange(T * 2 * B).view(T, 2, B)
    observation = Observation(Seen([scene.sent], labels), **scene.knowledge())
    assert torch.equal(observation.labels, labels.view(T, 2 * B))


@pytest.mark.parametrize("batches", ["fresh", "same", "epochs"])
def test_batch_order_is_what_the_client_went_by(batches):
    protocol = Protocol(sends="delta", local_steps=4, batches=batches, batches_per_epoch=2)
    scene = Scene(protocol)
    expected = torch.tensor(plain.batches_of(protocol, B))
    assert torch.equal(scene.observation().batch_order, expected.expand(T, 1, -1, -1))
    scene.order = torch.randint(B, (T, 1, 4, B))
    assert torch.equal(scene.observation().batch_order, scene.order)


def test_draws_are_those_of_the_attacks_own_streams():
    observation = Scene().observation()
    assert torch.equal(observation.randn(2), plain.random(first=50).randn(2))
    assert observation.rand(3, 2).shape == (T, 3, 2)
    assert observation.randint(4, 5).max() < 4
    assert observation.trials == T


def test_progress_is_reported():
    reports = []
    Knowledge(**Scene().knowledge(), report=reports.append).progress(1, 2, 0.5, rate=8.0)
    Knowledge(**Scene().knowledge()).progress(1, 2)
    assert reports == [{"done": 1, "total": 2, "loss": 0.5, "rate": 8.0}]


def test_rows_beyond_the_trials_have_noise_of_their_own():
    knowledge = Knowledge(**Scene().knowledge())
    streams = knowledge._random.rows(3)
    assert streams.trials == 3 * T
    assert len({tuple(row.tolist()) for row in streams.randn(4)}) == 3 * T
    torch.testing.assert_close(streams.part(3, 6).randn(2), knowledge._random.part(1, 2).rows(3).randn(2))


# --- what the attacker can compute ------------------------------------------------------------------------------------


class Noise(Defense):
    """Adds noise."""

    def update(self, update, ctx):
        return {name: value + ctx.random.at(name).randn(*value.shape[1:]) for name, value in update.items()}


@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(reduction="sum"),
        Protocol(batch_norm="train", send_buffers=True),
        Protocol(sends="delta", local_steps=2, momentum=0.9, weight_decay=0.1),
        Protocol(sends="weights", local_steps=2, batches="same", batch_norm="train"),
    ],
)
def test_simulate_is_the_tasks_own_client(protocol, draws):
    scene = Scene(protocol, net="convnet", draws=draws)
    simulated = scene.observation().simulate(scene.inputs, scene.labels)
    close(simulated, plain.update(scene.model, scene.inputs, scene.labels, protocol))


def test_simulate_runs_a_known_defense_with_fresh_noise_and_an_unknown_one_not_at_all():
    scene = Scene(parts=[Noise()])
    clean = plain.update(scene.model, scene.inputs, scene.labels, scene.protocol)
    observation = scene.observation()
    draws = [scene.sent, *(observation.simulate(scene.inputs, scene.labels) for _ in range(2))]
    noises = [tuple((update["fc.bias"] - clean["fc.bias"]).flatten().tolist()) for update in draws]
    assert len(set(noises)) == 3
    unknown = Scene(parts=[Noise()], threat=EVERYTHING.model_copy(update={"defense": False}))
    close(unknown.observation().simulate(scene.inputs, scene.labels), clean)


def test_simulate_is_differentiable_when_asked():
    scene = Scene(Protocol(sends="delta", lr=0.3))
    observation = scene.observation()

    def sent(values):
        return observation.simulate(values, scene.labels, create_graph=True)["fc.weight"]

    assert torch.autograd.gradcheck(sent, scene.inputs.requires_grad_(), fast_mode=True, atol=1e-7)
    assert not observation.simulate(scene.inputs, scene.labels)["fc.weight"].requires_grad


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("draws", [1, T])
def test_gradients_are_differentiable_in_inputs_and_soft_labels(soft, draws):
    scene = Scene(draws=draws)
    labels = scene.labels
    if soft:
        labels = torch.nn.functional.one_hot(labels, C).double() * 0.8 + 0.04
        labels.requires_grad_()
    arguments = (scene.inputs.requires_grad_(), *([labels] if soft else []))
    observation = scene.observation()

    def gradient(inputs, probabilities=scene.labels):
        return observation.gradients(inputs, probabilities, names=["body.linear0.weight"])["body.linear0.weight"]

    assert torch.autograd.gradcheck(gradient, arguments, fast_mode=True, atol=1e-7)


def test_gradients_are_undefended_and_follow_the_protocols_reduction_and_names():
    protocol = Protocol(reduction="sum", sends="delta", local_steps=2)
    scene = Scene(protocol, parts=[Noise()])
    inputs, labels = scene.inputs[:, :B], scene.labels[:, :B]
    expected = plain.update(scene.model, inputs, labels, Protocol(reduction="sum"))
    observation = scene.observation()
    actual = observation.gradients(inputs, labels, create_graph=False)
    close(actual, expected)
    assert not actual["fc.bias"].requires_grad
    assert set(observation.gradients(inputs, labels, names=["fc.bias"])) == {"fc.bias"}


def test_evaluations_count_gradients():
    scene = Scene(Protocol(sends="delta", local_steps=3))
    observation = scene.observation()
    observation.gradients(scene.inputs[:, :B], scene.labels[:, :B])
    observation.simulate(scene.inputs, scene.labels)
    assert observation.evaluations == 4


def test_a_defense_that_breaks_its_word_is_noticed_in_a_simulation_too():
    class Wrong(Defense):
        def update(self, update, ctx):
            return {}

    scene = Scene(parts=[Wrong()], update={"fc.bias": torch.zeros(T, C)})
    with pytest.raises(InvalidOutput, match=r"Wrong\(\)\.update"):
        scene.observation().simulate(scene.inputs, scene.labels)

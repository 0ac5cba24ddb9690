"""Inference attacks against plain versions of what they do, and against what they must not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from leakbench_baselines.attacks.attribute_inference import AttributeInference
from leakbench_baselines.attacks.membership_inference import RULES, MembershipInference, calibrated
from leakbench_baselines.attacks.property_inference import (
    PropertyInference,
    attribute_picks,
    fitted_scores,
    simulated,
    weight_features,
)
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import leakbench
from leakbench import Knowledge, NotApplicable, Observation, UserError
from leakbench.chain import DefenseChain
from leakbench.data import draw_task, load_dataset
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, AttributeSpec, BatchSpec, Protocol, Task, ThreatModel

DATA = {"attribute": "digits_parity", "membership": "digits"}
LENET = Architecture(name="lenet_zhu", init="uniform(0.5)")
THREES = AttributeSpec(name="class", value=3, mix=0.5)

pytestmark = pytest.mark.usefixtures("one_thread")


def images(rows):
    return torch.tensor(load_dataset("digits").images[rows]).double() / 255


def streams(count):
    return TrialRandom(torch.arange(count * 32).reshape(count, 32).to(torch.uint8))


class World:
    """A task with its knowledge, and observations of victims drawn by its law."""

    def __init__(self, *, target="attribute", batch=4, clients=1, trials=40, net=LENET, own=False, **protocol):
        several = {"clients": clients, "secure_aggregation": clients > 1}
        self.protocol = Protocol(precision="float64", **several, **protocol)
        self.task = Task(
            dataset=DATA[target],
            architecture=net,
            batch=BatchSpec(size=batch),
            protocol=self.protocol,
            threat_model=ThreatModel(auxiliary=300),
            target=target,
            attribute=THREES if target == "attribute" else None,
        )
        self.data = load_dataset(DATA[target])
        self.victims = draw_task(self.data, self.task, trials=range(trials), key=b"a key of the tests")
        self.truth = torch.tensor(self.victims.truth)
        self.model = build_model(net, (1, 8, 8), self.data.num_classes, seeds=range(trials if own else 1)).to(
            dtype=torch.float64
        )
        self.trials, self.clients = trials, clients
        rows = self.data.rows("auxiliary")[:300]
        self.owned = {
            "auxiliary": (images(rows), torch.tensor(self.data.labels[rows])),
            "auxiliary_attribute": torch.tensor(self.data.has(THREES)[rows].astype(np.int64)),
        }
        size = batch * self.protocol.local_batches
        self.facts = Facts(
            granted=self.task.threat_model.granted(),
            protocol=self.protocol,
            input_spec=self.data.input_spec,
            normalised=False,
            num_classes=self.data.num_classes,
            clients=clients,
            batch_size=batch,
            inputs_per_client=size,
            client_sizes=(size,) * clients,
            local_batches=self.protocol.local_batches,
            target=target,
            attribute=self.task.attribute,
        )

    def knowledge(self):
        return Knowledge(facts=self.facts, random=streams(self.draws), model=self.model, **self.owned)

    @property
    def draws(self):
        return self.model.draws

    def update(self):
        client = Client(self.protocol, self.task.batch.size, DefenseChain())
        indices, labels = self.victims.indices, torch.tensor(self.victims.labels)
        sent = [
            client.update(self.model, images(indices[:, k]), labels[:, k], random=streams(self.trials))
            for k in range(self.clients)
        ]
        return {name: torch.stack([one[name] for one in sent]).mean(0) for name in sent[0]}

    def observe(self, prepared, update=None):
        asked = self.victims.candidates
        candidates = None if asked is None else (images(asked.indices), torch.tensor(asked.labels))
        seen = Seen([update or self.update()], prepared=prepared, candidates=candidates)
        return Observation(seen, facts=self.facts, random=streams(self.trials), model=self.model, **self.owned)

    def scores(self, attack, update=None):
        return attack.run(self.observe(attack.prepare(self.knowledge()), update)).scores

    def auc(self, attack, update=None):
        return roc_auc_score(self.truth, self.scores(attack, update))


# --- property inference -----------------------------------------------------------------------------------------------


def test_picks_are_the_papers_mixes_in_turn():
    world = World(batch=5, clients=2, local_steps=2, sends="delta")
    picks, truth = attribute_picks(world.knowledge(), 16, "paper")
    assert picks.shape == (1, 16, 2, 10)
    having = world.owned["auxiliary_attribute"][picks[0]].view(16, 2, 2, 5).sum(3)
    assert having[:, 1].sum() == 0
    assert having[truth == 1, 0].tolist() == [[n, n] for n in (2, 3, 4, 5)] * 2
    assert having[truth == 0].sum() == 0
    alone = attribute_picks(world.knowledge(), 4, "task")[0]
    assert world.owned["auxiliary_attribute"][alone[0, 0, 0]].view(2, 5).sum(1).tolist() == [3, 3]


def test_features_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (6, 2, 3, 3), "a.b": (6,), "wide": (80, 70, 1, 1), "b": (7, 5), "c": (60, 90)}
    change = {name: torch.randn(2, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for row in range(2):
        plain = []
        for o in range(6):
            plain += [max(abs(float(v)) for v in change["a"][row, o, i].flatten()) for i in range(2)]
        plain += [abs(float(v)) for v in change["b"][row].flatten()]
        plain += [max(abs(float(v)) for v in change["c"][row, :, i]) for i in range(90)]
        plain = np.array(plain) / np.linalg.norm(plain)
        np.testing.assert_allclose(weight_features(change)[row].numpy(), plain, rtol=1e-5)


def test_scores_are_those_of_a_plain_forest():
    world = World()
    attack = PropertyInference(simulations=60)
    prepared, update = attack.prepare(world.knowledge()), world.update()
    mine = world.observe(prepared, update)
    scaler = StandardScaler().fit(prepared["features"][0].double().numpy())
    forest = RandomForestClassifier(100, min_samples_leaf=5, min_samples_split=5, random_state=0)
    forest.fit(scaler.transform(prepared["features"][0].double().numpy()), prepared["truth"].numpy())
    asked = weight_features({name: update[name] for name in world.model.parameter_names}).double().numpy()
    plain = forest.predict_proba(scaler.transform(asked))[:, 1]
    np.testing.assert_allclose(attack.run(mine).scores.numpy(), plain, atol=1e-9)


# --- what all simulate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_a_simulated_update_is_the_mean_of_plain_clients(sends, own):
    steps = 1 if sends == "gradient" else 2
    world = World(batch=2, clients=3, trials=2, own=own, sends=sends, local_steps=steps)
    knowledge = world.knowledge()
    picks, _ = attribute_picks(knowledge, 5, "task")
    kept = simulated(knowledge, picks, lambda _, change: torch.cat([v.flatten(1) for v in change.values()], 1))
    inputs, labels = world.owned["auxiliary"]
    client = Client(world.protocol, 2, DefenseChain())
    for m in range(world.draws):
        model = world.model.trials(m, m + 1)
        for i in range(5):
            total = 0
            for k in range(3):
                rows = picks[m, i, k]
                sent = client.update(model, inputs[rows][None], labels[rows][None], random=streams(1))
                sign, start = (-1, model.parameters) if sends == "weights" else (1, dict.fromkeys(sent, 0))
                total = total + torch.cat([(sign * (sent[n] - start[n])).flatten() for n in model.parameter_names])
            torch.testing.assert_close(kept[m, i], total / 3)


ATTACKS = {
    "property": ("attribute", PropertyInference(simulations=60)),
    "logistic": ("attribute", AttributeInference(simulations=60, features=200)),
    "mlp": ("attribute", AttributeInference(simulations=200, features=200, family="mlp")),
    **{rule: ("membership", MembershipInference(rule=rule, simulations=40)) for rule in RULES},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_order_of_what_was_sent_does_not_matter(name):
    """Tensors that cross a process boundary come in the order of their names."""
    target, attack = ATTACKS[name]
    world = World(target=target, trials=12)
    update = world.update()
    plain, sorted_ = (world.scores(attack, sent) for sent in (update, dict(sorted(update.items()))))
    assert list(update) != sorted(update)
    torch.testing.assert_close(plain, sorted_)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "gradient_norm"])
def test_every_attack_is_better_than_a_coin_and_no_better_on_noise(name):
    target, attack = ATTACKS[name]
    world = World(target=target, trials=120, batch=2 if target == "membership" else 6)
    assert world.auc(attack) > 0.75
    generator = torch.Generator().manual_seed(2)
    noise = {n: torch.randn(v.shape, generator=generator, dtype=v.dtype) * v.std() for n, v in world.update().items()}
    assert 0.35 < world.auc(attack, noise) < 0.65  # 4 standard errors of a coin's AUC at 60 of each: .21


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-30])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_update_of_any_size_gives_probabilities(name, value):
    target, attack = ATTACKS[name]
    world = World(target=target, trials=3)
    scores = world.scores(attack, {n: torch.full_like(v, value) for n, v in world.update().items()})
    assert scores.shape == (3,)
    assert ((scores >= 0) & (scores <= 1)).all()


# --- membership -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["cosine", "inner", "loss", "gradient_norm"])
def test_a_rule_reads_the_plain_number(rule):
    world = World(target="membership", trials=3, sends="delta", local_steps=2)
    attack, update = MembershipInference(rule=rule), world.update()
    seen = world.observe({}, update)
    inputs, labels = seen.candidates
    found = attack._numbers(seen, seen.difference(update), inputs, labels)

    def looked(parameters, t):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        module = world.model.module
        logits = torch.func.functional_call(module, leaves, (inputs[t : t + 1],))
        loss = torch.nn.functional.cross_entropy(logits, labels[t : t + 1])
        return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])

    for t in range(3):
        start = {name: value[0] for name, value in world.model.parameters.items()}
        after = {name: value - update[name][t] for name, value in start.items()}
        (before, own), (later, moved) = looked(start, t), looked(after, t)
        sent = torch.cat([update[name][t].flatten() for name in start])
        plain = {
            "inner": own @ sent,
            "cosine": own @ sent / own.norm() / sent.norm(),
            "loss": before - later,
            "gradient_norm": own.norm() - moved.norm(),
        }
        torch.testing.assert_close(found[t, 0].double(), plain[rule].detach(), rtol=1e-5, atol=1e-7)


def test_a_gradient_of_one_example_names_it():
    world = World(target="membership", batch=1, trials=60)
    scores = world.scores(MembershipInference(simulations=60))
    assert ((scores > 0.5).long() == world.truth).all()


def test_half_is_the_best_balanced_threshold():
    generator = torch.Generator().manual_seed(4)
    truth = torch.arange(400) % 2
    known = torch.randn(400, generator=generator).double() + 0.8 * truth
    scores = calibrated(known, truth, known)
    grid = torch.linspace(-4, 5, 2000)
    accuracy = [(((known > t) == (truth == 1)).double()[truth == b].mean()) for t in grid for b in (0, 1)]
    best = torch.stack(accuracy).view(-1, 2).mean(1).max()
    own = torch.stack([((scores > 0.5) == (truth == 1)).double()[truth == b].mean() for b in (0, 1)]).mean()
    assert own == pytest.approx(float(best), abs=1e-9)
    assert (scores.argsort() == known.argsort()).all()


def test_numbers_that_tell_nothing_are_worth_a_half():
    truth = torch.arange(40) % 2
    assert (calibrated(torch.ones(40).double(), truth, torch.randn(5).double()) == 0.5).all()
    assert (calibrated(-truth.double(), truth, torch.randn(5).double()) == 0.5).all()


def test_examples_that_interact_are_declined():
    net = Architecture(name="mlp", params={"width": 8, "depth": 1, "batch_norm": True})
    world = World(target="membership", net=net, batch_norm="train")
    with pytest.raises(NotApplicable, match="no example has a gradient of its own"):
        MembershipInference().prepare(world.knowledge())


def test_an_attribute_that_all_or_none_of_the_auxiliary_examples_have_is_declined():
    world = World()
    world.owned["auxiliary_attribute"] = torch.zeros(300, dtype=torch.int64)
    with pytest.raises(NotApplicable, match="0 auxiliary examples with the attribute and 300 without"):
        PropertyInference().prepare(world.knowledge())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PropertyInference(mixes="all"), "mixes paper or task"),
        (lambda: AttributeInference(family="forest"), "family logistic or mlp"),
        (lambda: MembershipInference(rule="guess"), "rule out of loss"),
    ],
)
def test_a_wrong_parameter_is_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.usefixtures("one_cache")
def test_several_clients_and_local_steps_go_through_the_runner():
    protocol = Protocol(sends="delta", local_steps=2, lr=0.01, clients=2, secure_aggregation=True)
    task = World(target="membership", batch=1).task.model_copy(update={"protocol": protocol})
    rows = leakbench.evaluate(MembershipInference(simulations=60), task, trials=96, isolation="none")
    assert set(rows.status) == {"ok"}
    assert set(rows.lane) == {"inference"}
    assert roc_auc_score(rows.inference_truth, rows.inference_score) > 0.6


def test_a_model_of_its_own_per_trial_has_a_forest_of_its_own():
    prepared = {"features": torch.randn(2, 40, 3), "truth": torch.arange(40) % 2}
    prepared["features"][1] += 5 * prepared["truth"][:, None]
    asked = torch.tensor([[0.0] * 3, [5.0] * 3])
    whole = fitted_scores(lambda: RandomForestClassifier(20, random_state=0), prepared, asked)
    second = {"features": prepared["features"][1:], "truth": prepared["truth"]}
    assert whole[1] == fitted_scores(lambda: RandomForestClassifier(20, random_state=0), second, asked[1:])[0]
    assert whole[1] > 0.9

"""One bit per trial: how it is drawn, that it does not cross, and what a claim about it is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import leakbench
from leakbench import Recovery
from leakbench.attack import RecoveryShape
from leakbench.data import draw_task, draw_victims, load_dataset
from leakbench.errors import InvalidOutput, Unavailable, UserError
from leakbench.grids import Grid
from leakbench.keys import DEVELOPMENT, Season
from leakbench.metrics.inference import score_inference
from leakbench.runner import children
from leakbench.tasks import Architecture, AttributeSpec, BatchSpec, Protocol, Task, ThreatModel

KEY = b"a key of the tests"
THREES = AttributeSpec(name="class", value=3, mix=0.4)


def task(**changes):
    values = {"dataset": "digits_parity", "architecture": Architecture(name="mlp"), "target": "membership"}
    return Task(**(values | changes))


def attribute(spec=THREES, **changes):
    return task(target="attribute", attribute=spec, **changes)


def drawn(of, trials):
    return draw_task(load_dataset(of.dataset), of, trials=range(trials), key=KEY)


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_the_coin_is_fair_and_its_own_for_every_question():
    asked = [attribute(), attribute(AttributeSpec(name="class", value=4)), task()]
    coins = np.stack([drawn(of, 1500).truth for of in asked])
    assert np.abs(coins.mean(1) - 0.5).max() < 4 * 0.5 / math.sqrt(1500)
    assert np.abs(np.corrcoef(coins)[np.triu_indices(3, 1)]).max() < 4 / math.sqrt(1500)


@settings(max_examples=30, deadline=None)
@given(
    mix=st.sampled_from([0.01, 0.25, 0.4, 0.5, 0.6, 1.0]),
    size=st.integers(1, 9),
    batches=st.integers(1, 3),
    clients=st.integers(1, 3),
)
def test_a_batch_holds_the_declared_share_in_the_first_client_alone(mix, size, batches, clients):
    data, spec = load_dataset("digits_parity"), AttributeSpec(name="class", value=3, mix=mix)
    options = {"clients": clients, "local_batches": batches, "trials": range(12), "key": KEY}
    victims = draw_victims(data, BatchSpec(size=size), **options, attribute=spec)
    having = (data.attributes["class"][victims.indices] == 3).reshape(12, clients, batches, size).sum(3)
    expected = -(-round(100 * mix) * size // 100)  # in whole numbers: .07 * 100 is more than 7
    assert (having[:, 0] == victims.truth[:, None] * expected).all()
    assert not having[:, 1:].any()
    assert all(len(set(trial.ravel().tolist())) == trial.size for trial in victims.indices)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3), batches=st.integers(1, 2))
def test_a_candidate_is_of_the_first_client_or_of_none(sizes, batches):
    data = load_dataset("digits")
    options = {"clients": len(sizes), "local_batches": batches, "trials": range(20), "key": KEY}
    victims = draw_victims(data, BatchSpec(sizes=tuple(sizes)), **options, membership=True)
    asked = victims.candidates
    own = (victims.indices == asked.indices[:, None, None]).any(2)
    assert (own[:, 0] == victims.truth).all()
    assert not own[:, 1:].any()
    assert np.isin(asked.indices, data.rows("private")).all()
    assert (asked.inputs == data.images[asked.indices]).all()
    assert (asked.labels == data.labels[asked.indices]).all()


def test_members_and_others_are_uniform_over_the_split():
    victims = drawn(task(batch=BatchSpec(size=4)), 3000)
    rows, cells = load_dataset("digits_parity").rows("private"), 20
    for truth in (0, 1):
        counts, _ = np.histogram(victims.candidates.indices[victims.truth == truth], cells, (0, len(rows)))
        expected = counts.sum() / cells
        assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-square, 19 degrees: p = 1e-4


@pytest.mark.parametrize("of", [attribute(), task()], ids=["attribute", "membership"])
def test_a_trial_does_not_depend_on_which_others_are_drawn(of):
    data = load_dataset(of.dataset)
    whole, alone = drawn(of, 8), draw_task(data, of, trials=[5], key=KEY)
    assert (whole.indices[5:6] == alone.indices).all()
    assert whole.truth[5] == alone.truth[0]


def test_the_batches_of_other_targets_hold_no_bit_and_are_the_same_for_both():
    labels, inputs = (drawn(task(target=target), 4) for target in ("labels", "inputs"))
    assert labels.truth is labels.candidates is inputs.truth is None
    assert (labels.indices == inputs.indices).all()


def test_too_few_examples_is_one_line_with_the_numbers():
    data = load_dataset("digits_parity")
    having = int((data.attributes["class"][data.rows("private")] == 3).sum())
    with pytest.raises(Unavailable, match=f"expected at least 500 examples with it .* got {having} and"):
        drawn(attribute(AttributeSpec(name="class", value=3), batch=BatchSpec(size=500)), 1)
    everyone = len(data.rows("private"))
    with pytest.raises(Unavailable, match=rf"\+ a candidate = {everyone + 1};"):
        drawn(task(batch=BatchSpec(size=everyone)), 1)


def test_an_unknown_attribute_is_one_line_with_those_there_are():
    with pytest.raises(UserError, match="Known: class, ge5, parity"):
        drawn(attribute(AttributeSpec(name="color")), 1)


def test_a_label_map_as_main_task_keeps_the_class_as_attribute():
    data, plain = load_dataset("digits_parity"), load_dataset("digits")
    assert data.num_classes == 2
    assert (data.labels == plain.labels % 2).all()
    assert (data.attributes["class"] == plain.labels).all()
    assert (data.attributes["ge5"] == (plain.labels >= 5)).all()
    assert (data.images == plain.images).all()
    assert data.fingerprint != plain.fingerprint


# --- tasks and grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "attribute"}, "target: attribute needs attribute"),
        ({"attribute": THREES}, "no other target takes one"),
        ({"batch": BatchSpec(size=2, sampler="unique")}, "needs sampler: iid, got unique"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        task(**changes)


def test_the_lane_is_inference_unless_the_server_is_malicious():
    malicious = ThreatModel(adversary="malicious_server", change_parameters=True)
    several = Protocol(clients=3, secure_aggregation=True)
    assert [attribute().lane, task(protocol=several).lane] == ["inference"] * 2
    assert task(threat_model=malicious).lane == "malicious_server"


def test_a_grid_asks_for_attributes_only_where_that_is_the_target():
    axes = {"dataset": "digits_parity", "architecture": "mlp", "attacks": "property_inference"}
    grid = Grid.model_validate(
        axes | {"target": ["attribute", "membership"], "attribute": ["ge5", {"name": "class", "value": 3}]}
    )
    asked = [(each.target, each.attribute and each.attribute.label) for each in grid.tasks()]
    assert asked == [("attribute", "ge5"), ("attribute", "class3"), ("membership", None)]
    with pytest.raises(ValidationError, match="needs target: attribute"):
        Grid.model_validate(axes | {"attribute": ["ge5"]})


# --- what crosses -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_cache")
@pytest.mark.parametrize("of", ["attribute", "membership"])
def test_before_the_update_an_attack_is_handed_nothing_of_the_victims_but_the_candidates(of, monkeypatch):
    """Two seasons differ in victims, truths and inits: what else crosses is equal, and what crosses is listed."""
    posted = []

    def post(self, kind, body, blobs):
        if kind == "attack":
            tensors = {name: blob.load() for name, blob in blobs.items()}
            posted.append((body, {name: {n: t.clone() for n, t in ts.items()} for name, ts in tensors.items()}))
        return original(self, kind, body, blobs)

    original = children.Child.post
    monkeypatch.setattr(children.Child, "post", post)
    threat = ThreatModel(auxiliary=120)
    asked = (attribute if of == "attribute" else task)(threat_model=threat, batch=BatchSpec(size=2))
    attack = {"attribute": "property_inference(simulations=20)", "membership": "membership_inference(simulations=20)"}
    truths = []
    for season in (DEVELOPMENT, Season("other", b"another key of the tests")):
        rows = leakbench.evaluate(attack[of], asked, trials=8, season=season, isolation="none")
        assert set(rows.status) == {"ok"}
        truths.append(rows.inference_truth.tolist())
    assert truths[0] != truths[1]
    private = {"model", "prepared"} | ({"candidates"} if of == "membership" else set())
    preparing, running = posted[0], posted[1]
    assert set(preparing[1]) == {"seeds", "auxiliary", "model"}
    assert set(running[1]) == {"seeds", "auxiliary"} | private
    for (body, tensors), (other_body, others) in zip(posted[:2], posted[2:], strict=True):
        assert body == other_body
        for name in tensors.keys() - private:
            assert tensors[name].keys() == others[name].keys()
            if name != "seeds" or tensors is running[1]:  # a preparation's are those of its weights
                assert all(torch.equal(value, others[name][key]) for key, value in tensors[name].items()), name


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "expected probabilities"),
        (torch.tensor([0, 1]), "floating dtype"),
        (torch.tensor([0.5]), r"got shape \(1,\)"),
        (torch.tensor([0.5, 1.1]), "got values from 0.5 to 1.1"),
        (torch.tensor([-0.1, 0.5]), "got values from -0.1"),
        (torch.tensor([0.5, math.nan]), "NaN"),
    ],
)
def test_a_claim_that_is_no_probability_is_invalid(scores, message):
    shape = RecoveryShape(trials=2, clients=1, inputs=1, num_classes=2, input_shape=(1,))
    with pytest.raises(InvalidOutput, match=message):
        shape.check(Recovery(scores=scores), frozenset({"attribute"}))


def test_what_a_claim_is_worth():
    truth, scores = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([0.75, 0.25, 0.25, 0.5, 0.0])
    found = score_inference(truth, scores)
    assert found["inference_accuracy"].tolist() == [1, 0, 1, 0.5, 0]
    expected = [1 + math.log2(0.75), -1, 1 + math.log2(0.75), 0, 1 + math.log2(0.01)]
    assert found["inference_bits"].tolist() == pytest.approx(expected)


@given(st.floats(0.02, 0.98))
def test_bits_of_a_calibrated_claim_are_the_information_it_holds(p):
    """Half of the claims say p, the others 1 - p; each is true as often as it says: 1 - H(p) bits."""
    weights = np.array([p, 1 - p, p, 1 - p]) / 2
    truth, scores = torch.tensor([1, 0, 0, 1]), torch.tensor([p, p, 1 - p, 1 - p], dtype=torch.float64)
    bits = score_inference(truth, scores)["inference_bits"].numpy() @ weights
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert bits == pytest.approx(1 - entropy, abs=1e-9)

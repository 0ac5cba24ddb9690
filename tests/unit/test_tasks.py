from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from leakbench.parts import Part, content_hash
from leakbench.tasks import LANES, Architecture, AttributeSpec, BatchSpec, InputSpec, Protocol, Task, ThreatModel

DELTA = Protocol(sends="delta", local_steps=4)
MALICIOUS = ThreatModel(adversary="malicious_server", change_parameters=True)


def task(**changes):
    return Task(**({"dataset": "digits", "architecture": Architecture(name="mlp")} | changes))


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_task_is_the_one_in_published_rows():
    """A change here makes every published row incomparable: raise Task.version or the benchmark's MINOR with it."""
    assert task().hash == "1adbbdb5f5bed094b93918149725875a0ed86cb4d7cf4ec52bab80bbed832eab"
    rich = task(
        architecture=Architecture(name="resnet18", init="uniform(0.5)", params={"width": 8}),
        batch=BatchSpec(size=8, sampler="dirichlet", alpha=0.5),
        protocol=Protocol(sends="weights", local_steps=4, batches="epochs", batches_per_epoch=2),
        threat_model=MALICIOUS,
        target="inputs",
    )
    assert rich.hash == "39f2ea933d2f400ac875e598cbfa5894660ab1e5fafe55be4bdc7953f9bb96b4"


def test_the_hash_is_the_sha256_of_canonical_json():
    content = {"b": [1, 2.5, None], "a": "x"}
    assert content_hash(content) == "ce74053d7a9997b7a9ffa28fba2f736e47c7ebb226ab093038bc0fba3a1554ee"
    assert content_hash(dict(reversed(content.items()))) == content_hash(content)
    assert content_hash(json.loads(json.dumps(task().content()))) == task().hash


CHANGES = {
    "dataset": ["mnist"],
    "normalise": [False],
    "stage": ["early"],
    "target": ["inputs"],
    "version": [2],
    "architecture.name": ["lenet5"],
    "architecture.init": ["uniform(0.5)"],
    "architecture.params": [{"width": 3}, {"width": 4}, {"width": True}, {"depth": 3}],
    "batch.size": [2],
    "batch.sampler": ["unique", "unbalanced", "single_class"],
    "protocol.sends": ["delta", "weights"],
    "protocol.local_steps": [2],
    "protocol.lr": [0.2],
    "protocol.momentum": [0.9],
    "protocol.weight_decay": [0.1],
    "protocol.reduction": ["sum"],
    "protocol.batches": ["same", "epochs"],
    "protocol.batches_per_epoch": [2],
    "protocol.batch_norm": ["train"],
    "protocol.send_buffers": [True],
    "protocol.rounds": [2],
    "protocol.clients": [2],
    "protocol.secure_aggregation": [True],
    "protocol.precision": ["float64"],
    "protocol.weighting": ["examples"],
    "threat_model.adversary": ["malicious_server"],
    "threat_model.labels": [True],
    "threat_model.batch_size": [False],
    "threat_model.lr": [False],
    "threat_model.local_steps": [False],
    "threat_model.batch_order": [True],
    "threat_model.bn_statistics": ["none", "updated_running", "exact_batch"],
    "threat_model.auxiliary": [5],
    "threat_model.label_prior": [False],
    "threat_model.weights": [False],
    "threat_model.defense": [False],
    "threat_model.change_parameters": [True],
    "threat_model.per_client": [True],
    "threat_model.change_architecture": [True],
}


def leaves(part, prefix=""):
    for name in type(part).model_fields:
        value = getattr(part, name)
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, Part) else [prefix + name]


def changed(key, value):
    """Return the default task with one field changed, and what its validators ask for along with it."""
    content = task().content()
    parent, _, name = key.rpartition(".")
    place = content[parent] if parent else content
    place[name] = value
    if name == "local_steps" or (name == "batches_per_epoch"):
        content["protocol"]["sends"] = "delta"
    if name == "clients":
        content["protocol"]["secure_aggregation"] = True
    if name in ("change_parameters", "per_client", "change_architecture"):
        content["threat_model"]["adversary"] = "malicious_server"
    return Task.model_validate(content)


def test_the_hash_changes_with_every_field():
    assert {*CHANGES, "batch.alpha", "batch.classes", "batch.sizes", "attribute"} == set(leaves(task()))
    changes = [changed(key, value) for key, values in CHANGES.items() for value in values]
    changes += [task(batch=BatchSpec(sampler="dirichlet", alpha=alpha)) for alpha in (0.1, 1)]
    changes += [task(batch=BatchSpec(size=8, sampler="balanced", classes=classes)) for classes in (1, 2)]
    two = Protocol(clients=2, secure_aggregation=True)
    changes += [task(batch=BatchSpec(sizes=sizes), protocol=two) for sizes in ((8, 2), (2, 8), (8, 8))]
    changes += [task(stage=stage) for stage in ("sgd(steps=1)", "sgd(steps=2)", "sgd(steps=1, lr=0.2)")]
    specs = [{"name": "parity"}, {"name": "ge5"}, {"name": "parity", "value": 0}, {"name": "parity", "mix": 0.5}]
    changes += [task(target="attribute", attribute=AttributeSpec(**spec)) for spec in specs]
    changes += [task(target="membership")]
    assert len({each.hash for each in [task(), *changes]}) == 1 + len(changes)


def test_the_hash_does_not_depend_on_how_a_value_is_written():
    params = [{"width": 3, "depth": 2}, {"depth": 2, "width": 3}]
    assert len({task(architecture=Architecture(name="mlp", params=p)).hash for p in params}) == 1
    assert Protocol(lr=1) == Protocol(lr=1.0)
    assert task(protocol=Protocol(lr=1)).hash == task(protocol=Protocol(lr=1.0)).hash


def test_a_task_survives_json():
    rich = task(protocol=DELTA, threat_model=MALICIOUS, batch=BatchSpec(size=3, sampler="dirichlet", alpha=0.5))
    assert Task.model_validate_json(rich.model_dump_json()) == rich
    spec = InputSpec(shape=(3, 2, 2), mean=(0.1, 0.2, 0.3))
    assert InputSpec.model_validate_json(spec.model_dump_json()) == spec


def test_parts_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        task().stage = "early"


# --- names ------------------------------------------------------------------------------------------------------------


def test_ids_are_readable():
    assert task().id == "digits-mlp-untrained-b1-iid-gradient-labels"
    net = Architecture(name="timm/vit", init="uniform(0.5)", params={"b": 2, "a": 1})
    spec = BatchSpec(size=8, sampler="dirichlet", alpha=0.5)
    protocol = DELTA.model_copy(update={"clients": 3, "secure_aggregation": True})
    other = task(dataset="/some/where/faces.npz", architecture=net, batch=spec, protocol=protocol)
    assert other.id == "faces.npz-timm.vit-a1-b2-uniform0.5-untrained-b8-dirichlet0.5-delta4-k3-labels"


@pytest.mark.parametrize(
    ("protocol", "distinct"),
    [
        (Protocol(), 1),
        (DELTA, 4),
        (DELTA.model_copy(update={"batches": "same"}), 1),
        (Protocol(sends="delta", local_steps=6, batches="epochs", batches_per_epoch=3), 3),
    ],
)
def test_a_client_holds_the_examples_of_its_distinct_batches(protocol, distinct):
    assert protocol.local_batches == distinct
    assert task(protocol=protocol, batch=BatchSpec(size=5)).client_sizes == (5 * distinct,)


# --- lanes ------------------------------------------------------------------------------------------------------------

KNOWN = ThreatModel(labels=True)
BLIND = ThreatModel(lr=False)
SECURE = Protocol(clients=3, secure_aggregation=True)


@pytest.mark.parametrize(
    ("lane", "changes"),
    [
        ("legacy_upper_bound", {"target": "inputs", "threat_model": KNOWN}),
        (None, {"target": "inputs", "threat_model": KNOWN, "batch": BatchSpec(size=2)}),
        (None, {"target": "inputs", "threat_model": KNOWN, "protocol": Protocol(batch_norm="train")}),
        ("passive_labels", {}),
        ("passive_labels", {"batch": BatchSpec(size=8, sampler="unbalanced"), "stage": "converged"}),
        ("passive_labels", {"threat_model": BLIND}),
        ("passive_images", {"target": "inputs"}),
        ("passive_images", {"target": "inputs", "batch": BatchSpec(size=4)}),
        ("passive_update", {"protocol": DELTA, "threat_model": BLIND}),
        ("passive_update", {"protocol": DELTA, "threat_model": BLIND, "target": "inputs"}),
        (None, {"protocol": DELTA}),
        (None, {"protocol": Protocol(sends="delta"), "threat_model": BLIND}),
        ("aggregate", {"protocol": SECURE}),
        ("aggregate", {"protocol": SECURE, "target": "inputs"}),
        ("passive_labels", {"protocol": Protocol(secure_aggregation=True)}),
        ("malicious_server", {"threat_model": MALICIOUS}),
        ("malicious_server", {"threat_model": MALICIOUS, "protocol": SECURE, "target": "inputs"}),
        *((None, {"threat_model": ThreatModel(labels=True, lr=False), "protocol": p}) for p in (Protocol(), DELTA)),
        (None, {"threat_model": KNOWN, "protocol": SECURE}),
        ("inference", {"target": "membership"}),
        (None, {"target": "membership", "threat_model": KNOWN}),
        ("inference", {"target": "attribute", "attribute": AttributeSpec(name="class")}),
        (None, {"target": "attribute", "attribute": AttributeSpec(name="class"), "threat_model": KNOWN}),
        (None, {"threat_model": MALICIOUS.model_copy(update={"labels": True})}),
    ],
)
def test_lanes_are_those_of_the_design(lane, changes):
    assert task(**changes).lane == lane
    assert lane is None or lane in LANES


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (BatchSpec, {"size": 0}, "greater than or equal to 1"),
        (BatchSpec, {"size": "8"}, "valid integer"),
        (BatchSpec, {"sampler": "even"}, "'iid', 'unique'"),
        (BatchSpec, {"sampler": "dirichlet"}, "alpha is needed by the dirichlet sampler and by no other"),
        (BatchSpec, {"alpha": 0.5}, "alpha is needed by the dirichlet sampler and by no other"),
        (BatchSpec, {"sampler": "dirichlet", "alpha": 0.0}, "greater than 0"),
        (BatchSpec, {"sampler": "dirichlet", "alpha": float("inf")}, "finite"),
        (Protocol, {"local_steps": 2}, "use sends: delta for several local_steps"),
        (Protocol, {"sends": "gradients"}, "'gradient', 'delta' or 'weights'"),
        (Protocol, {"sends": "delta", "local_steps": 3, "batches": "epochs", "batches_per_epoch": 2}, "multiple of"),
        (Protocol, {"lr": 0.0}, "greater than 0"),
        (Protocol, {"lr": float("nan")}, "finite"),
        (Protocol, {"lr": float("inf")}, "finite"),
        (Protocol, {"momentum": 1.0}, "less than 1"),
        (Protocol, {"rounds": 0}, "greater than or equal to 1"),
        (Protocol, {"clients": 0}, "greater than or equal to 1"),
        (Protocol, {"secure_aggregation": "yes"}, "valid boolean"),
        (Protocol, {"learning_rate": 0.1}, "not permitted"),
        (ThreatModel, {"auxiliary": -1}, "greater than or equal to 0"),
        (ThreatModel, {"labels": 1}, "valid boolean"),
        (ThreatModel, {"change_parameters": True}, "need adversary: malicious_server"),
        (ThreatModel, {"per_client": True}, "need adversary: malicious_server"),
        (ThreatModel, {"change_architecture": True}, "need adversary: malicious_server"),
        (Architecture, {"name": "mlp", "init": "normal"}, r"uniform\(A\), e.g. uniform\(0.5\); got 'normal'"),
        (Architecture, {"name": "mlp", "init": "uniform(-1)"}, "expected default, kaiming or uniform"),
        (Architecture, {"name": "mlp", "params": {"width": [1]}}, "valid"),
        (Architecture, {"name": "mlp", "params": {"width": float("nan")}}, "finite"),
    ],
)
def test_a_mistake_says_what_was_expected(part, fields, message):
    with pytest.raises(ValidationError, match=message):
        part(**fields)


@given(st.floats(min_value=0.0, max_value=99.0, allow_subnormal=False).map(lambda value: f"{value:.4f}"))
def test_any_uniform_bound_is_an_init(bound):
    assert Architecture(name="mlp", init=f"uniform({bound})").init == f"uniform({bound})"


def test_grants_are_the_flags_that_are_set():
    assert ThreatModel().granted() == {
        "batch_size", "lr", "local_steps", "label_prior", "weights", "defense", "bn_statistics",
    }  # fmt: skip
    assert ThreatModel(labels=True, auxiliary=1, bn_statistics="none").granted() >= {"labels", "auxiliary"}
    assert "bn_statistics" not in ThreatModel(bn_statistics="none").granted()
    assert MALICIOUS.granted() - ThreatModel().granted() == {"change_parameters"}


def test_tasks_do_not_import_torch():
    code = "import sys, leakbench.tasks, leakbench.keys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clients_without_aggregation_are_trials_of_their_own():
    with pytest.raises(ValueError, match="needs secure_aggregation: true"):
        task(protocol=Protocol(clients=3))


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("sgd(steps=100)", "sgd(steps=100)"),
        ("sgd( steps=100,lr=0.1,batch_size=8 )", "sgd(steps=100)"),
        ("sgd(batch_size=4,steps=1)", "sgd(steps=1, batch_size=4)"),
        ("sgd(steps=1,drops=true,lr=1)", "sgd(steps=1, lr=1.0, drops=true)"),
    ],
)
def test_a_stage_has_one_spelling_and_one_hash(spelling, canonical):
    assert task(stage=spelling).stage == canonical
    assert task(stage=spelling).hash == task(stage=canonical).hash


@pytest.mark.parametrize("stage", ["warm", "sgd", "sgd()", "sgd(steps=0)", "sgd(steps=1.5)", "sgd(step=3)", "sgd(1)"])
def test_an_unknown_stage_names_the_known_ones(stage):
    with pytest.raises(ValidationError, match=r"expected untrained, .*sgd\(steps=100, lr=0.1, batch_size=8\); got"):
        task(stage=stage)

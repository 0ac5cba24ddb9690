"""The runner: one row per planned trial whatever happens, no entry in this process, no more than is granted."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from leakbench.entries import resolve, resolve_all
from leakbench.errors import Unavailable, UserError
from leakbench.grids import Budget, Cell
from leakbench.keys import DEVELOPMENT
from leakbench.models.functional import build_model
from leakbench.results import read_job_status
from leakbench.runner.execute import Runner
from leakbench.runner.grant import granted_facts, granted_state, read_names
from leakbench.runner.plan import plan
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

TRIALS = 3
ENTRIES = """
import os, time
import torch
from leakbench import Attack, Defense, Recovery


class Base(Attack):
    recovers = frozenset({"labels"})

    def run(self, observation):
        return Recovery(label_counts=torch.zeros(observation.trials, 1, observation.num_classes, dtype=torch.int64))


class Honest(Base):
    pass


class Peek(Base):
    def __init__(self, *, what):
        self.what = what

    def run(self, observation):
        getattr(observation, self.what)
        raise RuntimeError(f"read {self.what}")


class Tell(Base):
    reads = ("head.bias",)

    def run(self, observation):
        facts = observation._facts
        raise RuntimeError(f"{sorted(observation.update)} {facts.protocol.lr} {facts.batch_size} {facts.class_prior}")


class Sleep(Base):
    def run(self, observation):
        time.sleep(60)


class FailsToPrepare(Base):
    def prepare(self, knowledge):
        raise ValueError("cannot prepare")


class PreparesNonsense(Base):
    def prepare(self, knowledge):
        return [1, 2]


class PlantsNonsense(Base):
    def plant(self, model, cohort, history):
        return {"no.such.parameter": torch.zeros(1)}


class PlantsNaN(Base):
    def plant(self, model, cohort, history):
        return {name: value * float("nan") for name, value in model.parameters.items()}


class NeedsMore(Base):
    needs = frozenset({"labels"})


class BadConstructor(Base):
    def __init__(self, *, size=1):
        raise ValueError("no such size")


class Plain(Defense):
    def update(self, update, ctx):
        return update
"""
CLASSES = ("Honest", "Sleep", "FailsToPrepare", "PreparesNonsense", "PlantsNonsense", "PlantsNaN", "NeedsMore")
CLASSES += ("Tell", "BadConstructor", "Peek(what='x')")
PASSIVE = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=4))
MALICIOUS = PASSIVE.model_copy(
    update={"threat_model": ThreatModel(adversary="malicious_server", change_parameters=True)}
)


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    path = tmp_path_factory.mktemp("entries") / "mine.py"
    path.write_text(ENTRIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(path.parent / "cache"))
        resolve_all([("attack", f"{path}:{name}") for name in CLASSES] + [("defense", f"{path}:Plain")])
        yield path


@pytest.fixture(scope="module")
def runner(entries, tmp_path_factory):
    with Runner(tmp_path_factory.mktemp("out"), season=DEVELOPMENT, isolation="process", files=[entries]) as started:
        yield started


@pytest.fixture
def job(entries):
    def make(attack, task=PASSIVE, *, seconds=60.0, defense="none", trials=TRIALS, start=0):
        (spec,) = resolve("attack", f"{entries}:{attack}")
        chain = resolve("defense", defense if defense == "none" else f"{entries}:{defense}")
        cell = Cell("", task, spec, chain, start + trials, trials, budget=Budget(wall_seconds=seconds))
        return plan([cell], DEVELOPMENT)[-1]

    return make


def rows_of(outcome):
    import pandas as pd

    assert read_job_status(outcome.path) is not None
    return pd.read_parquet(outcome.path)


@pytest.mark.parametrize(
    ("attack", "task", "status", "says"),
    [
        ("Honest", PASSIVE, "ok", ""),
        ("FailsToPrepare", PASSIVE, "error", "attack.prepare: ValueError: cannot prepare"),
        ("PreparesNonsense", PASSIVE, "invalid", r"attack.prepare: prepare\(\) must return a dict"),
        ("PlantsNonsense", MALICIOUS, "invalid", "attack.plant: 'no.such.parameter'"),
        ("PlantsNaN", MALICIOUS, "invalid", "attack.plant: .* finite"),
        ("NeedsMore", PASSIVE, "not_applicable", "does not grant: labels"),
        ("BadConstructor", PASSIVE, "error", "attack: ValueError: no such size"),
        ("Sleep", PASSIVE, "timeout", "attack: took longer than 1 s"),
    ],
)
def test_every_planned_trial_has_one_row_whatever_happens(runner, job, monkeypatch, attack, task, status, says):
    if status == "timeout":
        monkeypatch.setattr("leakbench.runner.exchange.GRACE_SECONDS", 1.0)
    outcome = runner.run(job(attack, task, seconds=0.01 if status == "timeout" else 60.0))
    rows = rows_of(outcome)
    assert list(rows.trial) == list(range(TRIALS))
    assert set(rows.status) == {status}
    assert outcome.statuses == {status: TRIALS}
    assert rows.error.isna().all() if status == "ok" else rows.error.str.contains(says, regex=True).all()
    assert rows.instance_recall.isna().all() == (status != "ok")
    assert rows.instance_recall_chance.notna().all()


def test_weights_that_cannot_be_had_give_rows_that_say_so(runner, job, monkeypatch):
    def cannot(*_, **__):
        raise Unavailable("weights of x: no network")

    monkeypatch.setattr(runner._shop.scenes, "weights", cannot)
    rows = rows_of(runner.run(job("Honest", start=3)))
    assert set(rows.status) == {"unavailable"}
    assert list(rows.trial) == [3, 4, 5]
    assert set(rows.error) == {"weights of x: no network"}


def test_a_server_killed_in_mid_run_costs_only_the_job_at_work(runner, job):
    results = {}
    thread = threading.Thread(target=lambda: results.update(first=runner.run(job("Sleep", start=3))))
    thread.start()
    time.sleep(1.5)
    os.kill(runner._shop._server._process.pid, 9)
    thread.join(20)
    assert results["first"].statuses == {"error": TRIALS}
    assert "child server ended" in results["first"].error
    assert runner.run(job("Honest", start=6)).statuses == {"ok": TRIALS}


def test_jobs_run_at_once_from_several_threads(runner, job):
    outcomes = {}

    def work(number):
        outcomes[number] = runner.run(job("Honest", start=30 + 3 * number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(rows_of(outcomes[n]).trial) for n in range(4)] == [list(range(s, s + 3)) for s in (30, 33, 36, 39)]


@pytest.mark.parametrize(
    ("what", "grant"),
    [
        ("labels", "labels"),
        ("batch_order", "batch_order"),
        ("auxiliary", "auxiliary"),
        ("batch_size", "batch_size"),
        ("inputs_per_client", "batch_size"),
        ("lr", "lr"),
        ("local_steps", "local_steps"),
        ("class_prior", "label_prior"),
        ("model", "weights"),
        ("defense", "defense"),
    ],
)
def test_reading_what_is_not_granted_raises_behind_the_boundary(runner, entries, what, grant):
    (spec,) = resolve("attack", f"{entries}:Peek(what={what!r})")
    withheld = ThreatModel(**({} if grant in ("labels", "batch_order", "auxiliary") else {grant: False}))
    for threat_model, granted in ((withheld, False), (_everything(), True)):
        task = PASSIVE.model_copy(update={"threat_model": threat_model, "protocol": _epochs()})
        (job,) = plan([Cell("", task, spec, trials=2, trials_per_job=2)], DEVELOPMENT)
        error = runner.run(job).error
        assert (f"read {what}" in error) if granted else f"{grant!r} is not granted" in error, error


def _everything() -> ThreatModel:
    return ThreatModel(labels=True, batch_order=True, auxiliary=5)


def _epochs() -> Protocol:
    return Protocol(sends="delta", local_steps=4, batches="epochs", batches_per_epoch=2, lr=0.7)


def test_what_is_withheld_is_not_even_in_the_child(runner, job):
    threat = ThreatModel(lr=False, batch_size=False, label_prior=False, local_steps=False)
    told = runner.run(job("Tell", PASSIVE.model_copy(update={"threat_model": threat, "protocol": _epochs()}))).error
    assert told.startswith("attack: RuntimeError: ['")
    names, rest = told.split("] ")[0], told.split("] ")[1]
    assert names.count("'") == 2, "the update holds more than the attack reads"
    assert names.split("'")[1].endswith("bias")
    assert rest.split(" (")[0] == f"{Protocol().lr} None None"


def test_withheld_statistics_are_those_of_a_fresh_net():
    model = build_model(Architecture(name="resnet20"), (3, 16, 16), 10, seeds=[0])
    tensors = model.tensors()
    for name, tensor in tensors.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.fill_(7.0)
    buffers = {n.removeprefix("buffer/"): t for n, t in tensors.items() if n.startswith("buffer/")}
    changed = model.with_state(buffers=buffers)
    task = PASSIVE.model_copy(update={"threat_model": ThreatModel(bn_statistics="none")})
    state = granted_state(task, changed)
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            assert not tensor.any()
        elif name.endswith("running_var"):
            assert (tensor == 1).all()
        else:
            assert torch.equal(tensor, tensors[name])


def test_withheld_facts_are_not_handed_over():
    from leakbench.data import load_dataset

    threat = ThreatModel(batch_size=False, label_prior=False, lr=False, local_steps=False)
    task = PASSIVE.model_copy(update={"threat_model": threat, "protocol": _epochs()})
    facts = granted_facts(task, load_dataset("digits"), wall_seconds=None, model_evaluations=None)
    assert facts["batch_size"] is facts["inputs_per_client"] is facts["class_prior"] is None
    protocol = Protocol.model_validate_json(facts["protocol"])
    assert (protocol.lr, protocol.local_steps, protocol.batches_per_epoch) == (Protocol().lr, 1, 1)


def test_reads_name_tensors_by_pattern():
    model = build_model(Architecture(name="mlp"), (1, 8, 8), 10, seeds=[0])
    every = list(model.parameters)
    assert read_names(["*"], model, Protocol(), "labels") == every
    assert read_names(["head.weight", "head.bias"], model, Protocol(), "labels") == every[-2:]
    assert read_names(["*.bias"], model, Protocol(), "labels") == [name for name in every if name.endswith("bias")]
    assert read_names(["nothing"], model, Protocol(), "labels") == []
    assert read_names(["labels:head.bias", "inputs:*"], model, Protocol(), "labels") == every[-1:]
    assert read_names(["labels:head.bias", "inputs:*"], model, Protocol(), "inputs") == every


def test_a_block_that_does_not_fit_is_refused_with_a_size_that_does(runner, job, monkeypatch):
    planned = job("Honest", trials=4096)
    monkeypatch.setattr(runner._shop, "memory", 100_000_000)
    with pytest.raises(UserError, match="set trials_per_job: ") as refusal:
        runner.preflight([planned])
    fits = int(str(refusal.value).split("trials_per_job: ")[1].split()[0])
    runner.preflight([job("Honest", trials=fits)])
    with pytest.raises(UserError):
        runner.preflight([job("Honest", trials=fits + 1)])


def test_this_process_imports_no_entry(entries):
    code = f"""
    import sys
    import leakbench
    from leakbench.tasks import Architecture, BatchSpec, Task

    task = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=4))
    rows = leakbench.evaluate("{entries}:Honest", task, "{entries}:Plain", trials=2, isolation="process")
    assert set(rows.status) == set(["ok"]), rows.error[0]
    held = [name for name in sys.modules if name.startswith(("leakbench_baselines.", "leakbench_entry", "mine"))]
    assert held == [], held
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_rows_and_artefacts_are_all_that_a_run_leaves(runner, job):
    runner.run(job("Honest"))
    left = {path.relative_to(runner._out).parts[0] for path in Path(runner._out).rglob("*") if path.is_file()}
    assert left <= {"development", "artefacts"}

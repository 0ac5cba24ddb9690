"""What an attack may say besides its claim, and when it may decline; what a defense shows of the model."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from leakbench.entries import resolve, resolve_all
from leakbench.grids import Budget, Cell
from leakbench.keys import DEVELOPMENT
from leakbench.runner.child import SHOWN
from leakbench.runner.exchange import Exchange
from leakbench.runner.execute import Runner
from leakbench.runner.plan import plan
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

TRIALS = 3
ENTRIES = """
import torch
from leakbench import Attack, Defense, NotApplicable, Recovery


class Base(Attack):
    recovers = frozenset({"labels"})

    def run(self, observation):
        counts = torch.zeros(observation.trials, 1, observation.num_classes, dtype=torch.int64)
        return Recovery(label_counts=counts, notes=self.notes(observation))

    def notes(self, observation):
        return {}


class Declines(Base):
    def prepare(self, knowledge):
        raise NotApplicable("only for transformers")


class AsksTooMuch(Base):
    def prepare(self, knowledge):
        return {"inputs": knowledge.auxiliary[0]}


class DeclinesLate(Base):
    def notes(self, observation):
        raise NotApplicable("this trial looks hard")


class Notes(Base):
    def notes(self, observation):
        return {"scale": torch.arange(observation.trials) / 2, "chunk": 7}


class TooMany(Base):
    def notes(self, observation):
        return {f"n{i}": float(i) for i in range(9)}


class BadName(Base):
    def notes(self, observation):
        return {"../../x": 1.0}


class WrongShape(Base):
    def notes(self, observation):
        return {"x": torch.zeros(observation.trials, 2)}


class Infinite(Base):
    def notes(self, observation):
        return {"x": float("nan")}


class SeesModel(Base):
    def notes(self, observation):
        name, sent = next(iter(observation.update.items()))
        value = observation.model.parameters[name]
        return {"draws": float(observation.model.draws), "same": float((value - sent).abs().max() == 0)}


class Doubles(Defense):
    acts_on = frozenset({"broadcast"})

    def broadcast(self, weights, ctx):
        return {name: 2 * value for name, value in weights.items()}


class ShowsWhatIs(Defense):
    acts_on = frozenset({"broadcast"})

    def broadcast(self, weights, ctx):
        return weights


class ShowsLess(Defense):
    acts_on = frozenset({"broadcast"})

    def broadcast(self, weights, ctx):
        return {}
"""
CLASSES = (
    "Declines",
    "AsksTooMuch",
    "DeclinesLate",
    "Notes",
    "TooMany",
    "BadName",
    "WrongShape",
    "Infinite",
    "SeesModel",
)
PASSIVE = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("entries") / "mine.py"
    path.write_text(ENTRIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(path.parent / "cache"))
        defenses = [("defense", f"{path}:{name}") for name in ("Doubles", "ShowsWhatIs", "ShowsLess")]
        resolve_all([("attack", f"{path}:{name}") for name in CLASSES] + defenses)
        with Runner(path.parent / "out", season=DEVELOPMENT, isolation="process", files=[path]) as runner:

            def rows(attack, task=PASSIVE, defense="none"):
                (spec,) = resolve("attack", f"{path}:{attack}")
                chain = () if defense == "none" else resolve("defense", f"{path}:{defense}")
                (job,) = plan(
                    [Cell("", task, spec, chain, TRIALS, TRIALS, budget=Budget(wall_seconds=60))], DEVELOPMENT
                )
                return pd.read_parquet(runner.run(job).path)

            yield rows


@pytest.mark.parametrize(
    ("attack", "status", "says"),
    [
        ("Declines", "not_applicable", "only for transformers"),
        ("AsksTooMuch", "not_applicable", "'auxiliary' is not granted"),
        ("DeclinesLate", "error", "this trial looks hard"),
        ("TooMany", "invalid", "at most 8"),
        ("BadName", "invalid", "expected a name and"),
        ("WrongShape", "invalid", "expected a name and"),
        ("Infinite", "invalid", "notes/x|note/x|holds NaN"),
    ],
)
def test_an_attack_declines_before_it_sees_an_update_or_not_at_all(run, attack, status, says):
    rows = run(attack)
    assert set(rows.status) == {status}
    assert rows.error.str.contains(says, regex=True).all(), rows.error[0]


def test_notes_are_numbers_of_a_trial_or_of_all(run):
    rows = run("Notes")
    assert set(rows.status) == {"ok"}
    assert [json.loads(text) for text in rows.notes] == [{"scale": t / 2, "chunk": 7.0} for t in range(TRIALS)]


def test_what_a_defense_shows_of_the_model_is_what_the_attack_holds(run):
    task = PASSIVE.model_copy(update={"protocol": Protocol(sends="weights", lr=1e-30)})
    plain, shown = (run("SeesModel", task, defense) for defense in ("none", "Doubles"))
    assert set(plain.status) | set(shown.status) == {"ok"}, plain.error[0] or shown.error[0]
    plain, shown = (json.loads(rows.notes[0]) for rows in (plain, shown))
    assert plain == {"draws": 1.0, "same": 1.0}, "a step of no length leaves the weights as they are"
    assert shown == {"draws": TRIALS, "same": 0.0}


def test_a_defense_that_shows_less_than_the_model_fails(run):
    rows = run("SeesModel", PASSIVE, "ShowsLess")
    assert set(rows.status) == {"invalid"}
    assert rows.error.str.contains("broadcast must return the names and shapes").all()


@pytest.mark.parametrize(
    ("defense", "shown", "lane"),
    [("none", "sent", "passive_labels"), ("ShowsWhatIs", "sent", "passive_labels"), ("Doubles", "defended", "no lane")],
)
def test_rows_say_whether_the_model_that_is_seen_is_the_one_that_was_sent_and_have_a_lane_only_if_it_is(
    run, defense, shown, lane
):
    rows = run("Notes", PASSIVE, defense)
    assert set(rows.status) == {"ok"}, rows.error[0]
    assert set(rows.model_shown) == {shown}
    assert set(rows.lane.fillna("no lane")) == {lane}


@pytest.mark.parametrize("weights", [True, False])
def test_an_attack_without_the_weights_is_never_sent_what_a_defense_shows_of_them(run, monkeypatch, weights):
    sent = []
    recover = Exchange._recover

    def record(self, attack, updates):
        sent.extend(name for update in updates for name in update.load())
        recover(self, attack, updates)

    monkeypatch.setattr(Exchange, "_recover", record)
    task = PASSIVE.model_copy(update={"threat_model": ThreatModel(weights=weights)})
    rows = run("Notes", task, "Doubles")
    assert set(rows.status) == {"ok"}, rows.error[0]
    assert sent
    assert any(name.startswith(SHOWN) for name in sent) == weights
    assert set(rows.model_shown) == {"defended" if weights else "sent"}

"""What holds for the file of every baseline beyond the laws of `leakbench check`, attack or defense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import tiny

import leakbench
from leakbench.attack import NEEDS
from leakbench.defense import Defense
from leakbench.entries import Description
from leakbench.runner.loading import describe_class
from leakbench.submitting.check import documented
from leakbench.tasks import Target

ATTACKS, DEFENSES = tiny.entries("attacks"), tiny.entries("defenses")
ENTRIES = [pytest.param(stem, cls, id=stem) for stem, cls in ATTACKS + DEFENSES]


def test_every_file_holds_one_entry():
    stems = [stem for stem, _ in ATTACKS + DEFENSES]
    files = Path(tiny.leakbench_baselines.__file__).parent.glob("*/*.py")
    assert sorted(stems) == sorted(f.stem for f in files if not f.stem.startswith("_"))


@pytest.mark.parametrize(("stem", "cls"), ENTRIES)
def test_entry_is_registered_under_its_file_name(stem, cls):
    assert vars(cls)["name"] == stem
    assert vars(cls)["version"] >= 1


@pytest.mark.parametrize(("stem", "cls"), ENTRIES)
def test_docstring_says_what_it_is_and_where_it_comes_from(stem, cls):
    kind = "attack" if issubclass(cls, leakbench.Attack) else "defense"
    told = documented(Description.model_validate_json(json.dumps(describe_class(cls, kind, stem))))
    assert [f"{law}: {text}" for law, state, text in told if state != "ok"] == []


@pytest.mark.parametrize(("stem", "cls"), [pytest.param(s, c, id=s) for s, c in ATTACKS])
def test_attack_declares_known_needs_and_targets(stem, cls):
    assert cls.needs <= NEEDS
    assert cls.recovers
    assert cls.recovers <= set(get_args(Target))


def faced(cls, target):
    """Return the attacks for a target that a defense names."""
    known = dict(ATTACKS)
    return [name for name in cls.adaptive if target in known[name].recovers]


@pytest.mark.parametrize(("stem", "cls"), [pytest.param(s, c, id=s) for s, c in DEFENSES])
def test_defense_names_adaptive_attacks_for_labels_and_inputs(stem, cls):
    assert set(cls.adaptive) <= {name for name, _ in ATTACKS}
    assert faced(cls, "labels")
    assert faced(cls, "inputs")


@pytest.mark.parametrize(("stem", "cls"), [pytest.param(s, c, id=s) for s, c in DEFENSES])
def test_defense_says_how_an_adversary_takes_it_into_account(stem, cls):
    seen = cls.acts_on & {"batch", "per_example", "step", "update"}
    assert (cls.likelihood is not None) == bool(seen)
    own = cls.log_likelihood is not Defense.log_likelihood
    assert own == (cls.likelihood in ("density", "surrogate"))
    assert cls.neutral is None or set(cls.neutral) <= set(cls().params())

"""What holds for the file of every baseline, attack or defense."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import tiny

import leakbench
import leakbench.inversion
from leakbench.attack import NEEDS
from leakbench.defense import HOOKS, Defense
from leakbench.tasks import Target

ATTACKS, DEFENSES = tiny.entries("attacks"), tiny.entries("defenses")
ENTRIES = [pytest.param(stem, cls, id=stem) for stem, cls in ATTACKS + DEFENSES]
LIBRARIES = {"leakbench_baselines", "numpy", "scipy", "sklearn", "torch"}


def test_every_file_holds_one_entry():
    stems = [stem for stem, _ in ATTACKS + DEFENSES]
    files = Path(tiny.leakbench_baselines.__file__).parent.glob("*/*.py")
    assert sorted(stems) == sorted(f.stem for f in files if not f.stem.startswith("_"))


@pytest.mark.parametrize(("stem", "cls"), ENTRIES)
def test_entry_is_registered_under_its_file_name(stem, cls):
    assert vars(cls)["name"] == stem
    assert vars(cls)["version"] >= 1


@pytest.mark.parametrize(("stem", "cls"), ENTRIES)
def test_parameters_are_data_and_rebuild_the_entry(stem, cls):
    params = cls().params()
    again = cls(**json.loads(json.dumps(params)))
    assert again.params() == params
    assert list(params) == list(inspect.signature(cls).parameters)


@pytest.mark.parametrize(("stem", "cls"), ENTRIES)
def test_docstring_says_what_it_is_and_where_it_comes_from(stem, cls):
    doc = inspect.getdoc(cls)
    summary = doc.split("\n", 1)[0]
    assert summary.endswith((".", "?"))
    reference = re.search(r"^Reference: (.+)", doc, flags=re.MULTILINE | re.DOTALL)
    assert reference, "write `Reference: authors, title, year, arXiv id`, or `Reference: none; why`"
    text = reference[1]
    assert re.search(r"arXiv \d{4}\.\d{5}|doi 10\.|openreview \w{8}", text) or re.match(r"none; \w+ \w+", text)
    assert re.search(r"^Sees: " if issubclass(cls, leakbench.Attack) else r"^Acts on: ", doc, flags=re.MULTILINE)
    for name in inspect.signature(cls).parameters:
        assert re.search(rf"^    {name}: ", doc, flags=re.MULTILINE), f"Args of the docstring lack {name!r}"


@pytest.mark.parametrize(("stem", "cls"), ENTRIES)
def test_baseline_imports_public_names_only(stem, cls):
    tree = ast.parse(Path(inspect.getfile(cls)).read_text())
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "leakbench":
                assert {alias.name for alias in node.names} <= set(leakbench.__all__)
            if node.module == "leakbench.inversion":
                assert {alias.name for alias in node.names} <= set(leakbench.inversion.__all__)
        for module in modules:
            top = module.split(".")[0]
            public = module in ("leakbench", "leakbench.inversion", "leakbench.metrics.stealth")
            assert public or top in LIBRARIES or top in sys.stdlib_module_names


@pytest.mark.parametrize(("stem", "cls"), [pytest.param(s, c, id=s) for s, c in ATTACKS])
def test_attack_declares_known_needs_and_targets(stem, cls):
    assert cls.needs <= NEEDS
    assert cls.recovers
    assert cls.recovers <= set(get_args(Target))


@pytest.mark.parametrize(("stem", "cls"), [pytest.param(s, c, id=s) for s, c in DEFENSES])
def test_defense_declares_the_hooks_it_brings(stem, cls):
    assert cls.acts_on == {hook for hook in HOOKS if getattr(cls, hook) is not getattr(Defense, hook)}
    if cls.strength is not None:
        parameter, stronger = cls.strength
        assert parameter in cls().params()
        assert stronger in ("higher", "lower")


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

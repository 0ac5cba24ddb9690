"""Skeletons, and the laws that `leakbench check` tries: each is kept by a skeleton and broken by a change of it."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from leakbench.errors import InvalidOutput, UserError
from leakbench.submitting.attack_laws import ATTACK_LAWS
from leakbench.submitting.defense_laws import DEFENSE_LAWS
from leakbench.submitting.laws import Broken
from leakbench.submitting.skeletons import new_entry

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"labels": ("attack", ATTACK_LAWS), "inputs": ("attack", ATTACK_LAWS), "defense": ("defense", DEFENSE_LAWS)}


def load(path):
    """Import a file that this test wrote, and return its entry."""
    spec = importlib.util.spec_from_file_location(f"made_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (cls,) = (c for _, c in inspect.getmembers(module, inspect.isclass) if "name" in vars(c) and "version" in vars(c))
    return cls


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skeletons")
    return {
        what: new_entry(kind, f"try_{what}", folder / f"{what}.py", recovers="inputs" if what == "inputs" else "labels")
        for what, (kind, _) in KINDS.items()
    }


@pytest.mark.parametrize("what", KINDS)
def test_a_skeleton_keeps_every_law(skeletons, what):
    cls = load(skeletons[what])
    for law in KINDS[what][1]:
        law.check(cls)


ATTACK, RETURN = "        pull = (-rows", "        return Recovery("
BROKEN = [
    (
        "labels",
        "parameters_are_data",
        "self.sharpness = sharpness",
        "self.sharpness = sharpness + 1",
        "not what __init__",
    ),
    ("labels", "imports_public_names_only", "import torch\n", "import torch\nimport pandas\n", "'pandas' is not on"),
    (
        "labels",
        "imports_public_names_only",
        "import torch\n",
        "import torch\nimport leakbench.tasks\n",
        "may change any day",
    ),
    (
        "labels",
        "runs_on_some_task",
        "observation.total_inputs",
        "10**9 * observation.total_inputs",
        "expected counts in",
    ),
    ("labels", "needs_suffice", '"weights", "batch_size"', '"weights"', "'batch_size' is not granted"),
    ("labels", "needs_are_needed", '"weights", "batch_size"', '"weights", "batch_size", "lr"', "'lr' is never read"),
    (
        "labels",
        "same_observation_same_recovery",
        ATTACK,
        "        rows = rows * torch.rand_like(rows)\n" + ATTACK,
        "draw from observation.randn",
    ),
    (
        "labels",
        "trials_are_independent",
        ATTACK,
        "        rows = rows - rows.mean(0, keepdim=True)\n" + ATTACK,
        "run alone",
    ),
    ("labels", "update_is_not_changed_in_place", ATTACK, "        rows.mul_(2)\n" + ATTACK, "in place"),
    (
        "labels",
        "budget_is_respected",
        "(order < left).long())[:, None]",
        "(order < left).long())[:, None], model_evaluations=7",
        "7 gradient",
    ),
    (
        "labels",
        "degenerate_updates_give_finite_output",
        RETURN,
        "        if not rows.any():\n            raise ValueError('nothing')\n" + RETURN,
        "an update of zeros",
    ),
    ("defense", "declares_its_hooks", 'frozenset({"update"})', 'frozenset({"step"})', "make them equal"),
    (
        "defense",
        "keeps_names_shapes_and_dtypes",
        "return sent",
        "return {n: v.float() for n, v in sent.items()}",
        "expected",
    ),
    (
        "defense",
        "keeps_names_shapes_and_dtypes",
        "return sent",
        "return {n: v / 0 for n, v in sent.items()}",
        "NaN or infinity",
    ),
    (
        "defense",
        "same_streams_same_update",
        ".randn(*value.shape[1:])",
        ".randn(*value.shape[1:]).normal_()",
        "ctx.random",
    ),
    (
        "defense",
        "declares_what_it_draws",
        'draws = "normal noise, one number per coordinate"',
        'draws = ""',
        "it draws at random",
    ),
    ("defense", "trials_are_independent", "sent[name] = value", "sent[name] = value.mean(0)", "runs alone"),
    ("defense", "tensors_are_treated_alike_alone", "return sent", 'return sent | {"more": 1}', "more"),
    ("defense", "changes_nothing_at_strength_zero", "sent[name] = value", "sent[name] = 1.01 * value", "still moves"),
    ("defense", "distortion_grows_with_strength", '"share", "higher"', '"share", "lower"', "does not grow"),
    (
        "defense",
        "arguments_are_not_changed_in_place",
        "        return sent",
        "        value.zero_()\n        return sent",
        "in place",
    ),
]


@pytest.mark.parametrize(
    ("what", "law", "old", "new", "says"), BROKEN, ids=[f"{b[1]}-{i}" for i, b in enumerate(BROKEN)]
)
def test_a_broken_law_is_found_and_said(skeletons, tmp_path, what, law, old, new, says):
    text = skeletons[what].read_text()
    assert old in text
    path = tmp_path / f"broken_{what}.py"
    path.write_text(text.replace(old, new, 1))
    check = {law.name: law.check for law in KINDS[what][1]}[law]
    with pytest.raises((Broken, InvalidOutput)) as broken:  # what the harness itself refuses is said by it
        check(load(path))
    assert says in str(broken.value)


def test_every_law_is_broken_by_one_of_these_changes():
    assert {b[1] for b in BROKEN} == {law.name for law in (*ATTACK_LAWS, *DEFENSE_LAWS)}


@pytest.mark.parametrize(
    ("name", "says"),
    [("llg", "exists"), ("My-Attack", "snake_case"), ("class", "snake_case"), ("x" * 60, "2 to 49"), ("x", "got 1")],
)
def test_a_name_that_is_none_or_taken_is_refused(tmp_path, name, says):
    with pytest.raises(UserError, match=says):
        new_entry("attack", name, tmp_path / "a.py")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        new_entry("attack", "mine", path)
    assert path.read_text() == "mine"


def test_a_full_disk_leaves_no_empty_file(tmp_path, monkeypatch):
    real = Path.open

    @contextmanager
    def full(path, *arguments, **options):
        with real(path, *arguments, **options):
            yield Mock(write=Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left"):
        new_entry("attack", "mine", tmp_path / "mine.py")
    assert not list(tmp_path.iterdir())

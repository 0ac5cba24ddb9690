from __future__ import annotations

import json

import pytest

from leakbench.errors import UserError
from leakbench.lock import lock_suite, read_lock, suite_hash, tasks_folder
from leakbench.models import stages
from leakbench.suites import load_suite, suite_paths


@pytest.mark.parametrize("name", sorted(suite_paths()))
def test_a_suite_changes_only_with_its_version(name):
    suite = load_suite(name)
    pinned = read_lock(tasks_folder())["suites"].get(name)
    assert pinned == {"version": suite.version, "sha256": suite_hash(suite)}, f"run: leakbench lock {name}"


def test_a_changed_suite_is_not_locked_under_its_old_version(tmp_path):
    suite = load_suite("quick").model_copy(update={"grids": load_suite("quick").grids[:1]})
    lock_suite(suite, tmp_path)
    with pytest.raises(UserError, match="set version: 3"):
        lock_suite(suite.model_copy(update={"trials": suite.trials + 1}), tmp_path)


def test_every_locked_checkpoint_is_there_and_is_the_one():
    for pins in read_lock(tasks_folder())["checkpoints"].values():
        for pin in pins.values():
            data = (tasks_folder() / "checkpoints" / pin["file"]).read_bytes()
            assert stages._parse(data, "official", None).sha256 == pin["sha256"]


def test_the_lock_is_plain_sorted_json():
    text = (tasks_folder() / "tasks.lock").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"

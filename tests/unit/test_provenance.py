"""Where rows come from."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from leakbench import provenance
from leakbench.provenance import NUMBER_MOVING, PACKAGE


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package that may be changed."""
    package = tmp_path / "root" / "leakbench"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return package


def fresh_hash():
    return provenance.code_sha256.__wrapped__()


def test_every_pattern_of_number_moving_modules_matches_a_file():
    for pattern in NUMBER_MOVING:
        assert list(PACKAGE.glob(pattern)), pattern


def test_the_code_hash_covers_what_moves_numbers_and_nothing_else(copy):
    before = fresh_hash()
    moving = {path for pattern in NUMBER_MOVING for path in copy.glob(pattern)}
    for path in copy.rglob("*.py"):
        text = path.read_bytes()
        path.write_bytes(text + b"\n# changed")
        assert (fresh_hash() != before) == (path in moving), path
        path.write_bytes(text)
    assert fresh_hash() == before


def test_what_computes_or_scores_is_number_moving_and_what_shows_is_not():
    moving = {path.relative_to(PACKAGE).as_posix() for pattern in NUMBER_MOVING for path in PACKAGE.glob(pattern)}
    assert {
        "data/sampling.py",
        "federation/client.py",
        "metrics/labels.py",
        "models/stages.py",
        "runner/execute.py",
    } <= moving
    assert not moving & {"cli/base.py", "board/score.py", "runner/progress.py", "runner/isolate.py", "listing.py"}


def test_everything_that_a_child_imports_of_leakbench_is_number_moving_or_known_not_to_be():
    code = "import leakbench.runner.child, leakbench.inversion, sys; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    imported = {PACKAGE.parent.joinpath(*name.split(".")) for name in out.split() if name.startswith("leakbench.")}
    files = {file for path in imported for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()}
    moving = {path for pattern in NUMBER_MOVING for path in PACKAGE.glob(pattern)}
    named = {file.relative_to(PACKAGE).as_posix() for file in files - moving}
    assert named <= NAMES_AND_FILES, "add these to NUMBER_MOVING, or here if no number can depend on them"


NAMES_AND_FILES = {
    "cache.py",
    "entries.py",
    "errors.py",
    "inversion/__init__.py",
    "lock.py",
    "provenance.py",
    "registry.py",
    "runner/__init__.py",
    "sources.py",
}
"""Modules of a child that only name, find or hash things."""


def test_a_wheel_inside_another_checkout_has_no_commit(copy, tmp_path):
    assert provenance._git() == (None, None)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert provenance._git() == (None, None)


def test_a_checkout_has_its_commit_and_says_when_it_was_changed(copy):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(copy.parent), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert provenance._git() == (git("rev-parse", "HEAD"), False)
    (copy / "cli" / "base.py").write_text("changed = True")
    assert provenance._git() == (git("rev-parse", "HEAD"), True)


def test_provenance_of_a_cpu_run_is_complete_and_torch_free():
    columns = provenance.provenance("cpu")
    assert columns["device"] == "cpu"
    assert columns["cuda"] is None
    assert columns["driver"] is None
    assert all(columns[key] for key in ("leakbench_version", "code_sha256", "host_kind", "python", "torch"))
    code = "import sys; from leakbench.provenance import provenance; provenance(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

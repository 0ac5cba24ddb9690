"""`leakbench guard`: what a change touches, from git objects alone."""

from __future__ import annotations

import os
import subprocess

import pytest

from leakbench.errors import UserError
from leakbench.submitting.guard import MOST_DATA, guard, place_entry

ENTRY = "baselines/attacks/mine.py"
THEIRS = "baselines/attacks/theirs.py"


def version(number, more=""):
    return f'{more}@register("theirs", version={number})\nclass Theirs(Attack):\n    pass\n'


def git(folder, *arguments):
    names = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", folder, "-c", "init.defaultBranch=main", *arguments]
    environment = {"PATH": os.environ["PATH"], **names}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    write(
        folder,
        {
            THEIRS: version(1),
            ".github/scorers.txt": "# who\nscorer[bot]\n",
            "leakbench/schema.py": "1",
            "results/README.md": "rows",
        },
    )
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "base")
    return folder


def change(base, tmp_path, files, *, removed=(), link=None):
    """Commit a change on a clone and return (clone, base, head)."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(base), str(clone))
    write(clone, files)
    for name in removed:
        (clone / name).unlink()
    if link is not None:
        (clone / link).parent.mkdir(parents=True, exist_ok=True)
        (clone / link).symlink_to("/etc/passwd")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "change")
    return clone, "origin/main", git(clone, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({ENTRY: "x"}, "submission"),
        ({"baselines/defenses/mine.py": "x"}, "submission"),
        ({ENTRY: "x", "tests/data/mine/values.json": "{}"}, "submission"),
        ({THEIRS: version(2)}, "revision"),
        ({ENTRY: "x", "baselines/attacks/second.py": "y"}, "core"),
        ({ENTRY: "x", "leakbench/schema.py": "2"}, "core"),
        ({ENTRY: "x", ".github/scorers.txt": "me"}, "core"),
        ({"baselines/attacks/__init__.py": "x"}, "core"),
        ({"baselines/attacks/deep/mine.py": "x"}, "core"),
        ({"baselines/attacks/Mine.py": "x"}, "core"),
        ({"README.md": "x"}, "core"),
    ],
)
def test_a_change_is_what_it_touches(base, tmp_path, files, kind):
    found = guard(*change(base, tmp_path, files))
    assert found.kind == kind
    assert found.problems == []
    assert (found.entry is not None) == (kind in ("submission", "revision"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({ENTRY: "x" * 300_000}, "expected at most"),
        ({ENTRY: "x", "tests/data/other/values.json": "{}"}, "under tests/data/mine/"),
        ({ENTRY: "x", "tests/data/mine/values.csv": "1" * (MOST_DATA + 1)}, "test data of"),
    ],
)
def test_a_submission_that_holds_too_much_is_refused(base, tmp_path, files, says):
    found = guard(*change(base, tmp_path, files))
    assert found.kind == "submission"
    assert any(says in text for text in found.problems)


def test_a_link_in_the_place_of_an_entry_and_a_removal_are_refused(base, tmp_path):
    found = guard(*change(base, tmp_path, {}, link=ENTRY))
    assert any("mode 120000" in text for text in found.problems)
    (tmp_path / "second").mkdir()
    found = guard(*change(base, tmp_path / "second", {}, removed=[THEIRS]))
    assert any("never removed" in text for text in found.problems)


def test_rows_come_from_the_scoring_identity_of_the_base_and_alone(base, tmp_path):
    where = change(base, tmp_path, {"results/quick/a.parquet": "x", ".github/scorers.txt": "mallory"})
    assert any("scoring identity only, not by mallory" in text for text in guard(*where, actor="mallory").problems)
    assert any("of their own" in text for text in guard(*where, actor="scorer[bot]").problems)
    (tmp_path / "second").mkdir()
    where = change(base, tmp_path / "second", {"results/quick/a.parquet": "x"})
    assert guard(*where, actor="scorer[bot]").problems == []
    assert guard(*where).problems
    assert guard(*where, actor="").problems


def test_what_the_base_did_meanwhile_is_no_part_of_the_change(base, tmp_path):
    clone, _, head = change(base, tmp_path, {ENTRY: "x"})
    git(clone, "checkout", "-q", "-b", "later", "origin/main")
    write(clone, {"results/more.parquet": "x"})
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "later")
    assert guard(clone, "later", head).files == [ENTRY]


def test_placing_takes_the_entry_and_nothing_else(base, tmp_path):
    clone, first, head = change(base, tmp_path, {ENTRY: "mine", "tests/data/mine/values.json": "{}"})
    git(clone, "checkout", "-q", "--detach", "origin/main")
    assert place_entry(clone, guard(clone, first, head)).read_text() == "mine"
    assert git(clone, "status", "--porcelain", "--untracked-files=all") == f"?? {ENTRY}"
    assert git(clone, "status", "--porcelain", "--untracked-files=no") == "", "rows would say the checkout is dirty"


def test_a_placed_change_of_a_baseline_leaves_the_checkout_clean_for_rows(base, tmp_path):
    clone, first, head = change(base, tmp_path, {THEIRS: version(2)})
    git(clone, "checkout", "-q", "--detach", "origin/main")
    assert place_entry(clone, guard(clone, first, head)).read_text() == version(2)
    assert git(clone, "status", "--porcelain", "--untracked-files=no") == ""


def test_a_name_that_is_no_commit_is_one_line(base):
    for name in ("--upload-pack=x", "nowhere", "main:results"):
        with pytest.raises(UserError):
            guard(base, "main", name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (version(1, "import torch\n"), "version 1, expected more than 1"),
        (version(1, "# version=9\n"), "version 1, expected more than 1"),
        (version("int('2')"), "no version can be read"),
        ("(" * 100_000, "no version can be read"),
    ],
)
def test_a_changed_entry_raises_its_version(base, tmp_path, text, says):
    found = guard(*change(base, tmp_path, {THEIRS: text}))
    assert found.kind == "revision"
    assert any(says in problem for problem in found.problems)


def test_what_counts_is_what_merging_does_not_what_a_history_says(base, tmp_path):
    """The base merged two branches; head merges the same two, keeps the older files and adds an entry."""
    clone, _, first = change(base, tmp_path, {"README.md": "first"})
    git(clone, "checkout", "-q", "-b", "second", "origin/main")
    write(clone, {"results/quick/a.parquet": "x", "leakbench/schema.py": "mended"})
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "rows and a fix")
    second = git(clone, "rev-parse", "HEAD")
    git(clone, "checkout", "-q", "-b", "trusted", second)
    git(clone, "merge", "-q", "--no-edit", first)
    git(clone, "checkout", "-q", "-b", "attack", first)
    git(clone, "merge", "-q", "--no-commit", "-s", "ours", second)
    write(clone, {ENTRY: "x"})
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "an entry")
    found = guard(clone, "trusted", "attack")
    assert set(found.files) == {ENTRY, "leakbench/schema.py", "results/quick/a.parquet"}, "merging takes them back"
    assert any("met 2 times" in text for text in found.problems)


def test_a_change_that_conflicts_with_the_base_or_shares_no_history_is_refused(base, tmp_path):
    clone, _, head = change(base, tmp_path, {ENTRY: "x"})
    git(clone, "checkout", "-q", "-b", "later", "origin/main")
    write(clone, {ENTRY: "y"})
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "later")
    assert any("conflicts with the base" in text for text in guard(clone, "later", head).problems)
    git(clone, "checkout", "-q", "--orphan", "alone")
    git(clone, "commit", "-qm", "alone")
    with pytest.raises(UserError, match="no history in common"):
        guard(clone, "later", "alone")


@pytest.mark.parametrize("path", ["results/quick\n/rows.parquet", "Results/rows.parquet", "re\u017fults/a", "results"])
def test_rows_hide_behind_no_name(base, tmp_path, path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(base), str(clone))
    if path == "results":
        git(clone, "rm", "-qr", "results")
    write(clone, {path: "x"})
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "change")
    found = guard(clone, "origin/main", "HEAD", actor="mallory")
    assert found.kind == "rows"
    assert found.problems
    assert all(text.isprintable() for text in found.lines())


def test_a_name_that_does_not_print_is_refused_wherever_it_is(base, tmp_path):
    found = guard(*change(base, tmp_path, {"docs/a\u200b.md": "x"}))
    assert found.kind == "core"
    assert any("printable" in text for text in found.problems)

"""`leakbench check` from the parent's side: nothing of a file runs here, and everything ends in a line of advice."""

from __future__ import annotations

import sys

import pytest

from leakbench.entries import Description
from leakbench.sources import find_source
from leakbench.submitting import check as checking
from leakbench.submitting.check import check, readable
from leakbench.submitting.skeletons import new_entry

pytestmark = pytest.mark.usefixtures("one_cache")


@pytest.fixture
def attack(tmp_path):
    return new_entry("attack", "try_it", tmp_path / "try_it.py")


def states(verdict):
    return {finding.law: finding.state for finding in verdict.findings}


def test_a_skeleton_passes_as_it_is_and_is_ready_once_its_gaps_are_filled(tmp_path):
    path = new_entry("defense", "try_noise", tmp_path / "try_noise.py")
    verdict = check(str(path), isolation="process")
    assert verdict.passed()
    assert not verdict.passed(strict=True)
    assert [f.law for f in verdict.findings if f.state == "todo"] == [
        "docstring begins with one line",
        "docstring says `Acts on:`",
        "docstring names its source",
    ]
    assert (verdict.kind, verdict.name) == ("defense", "try_noise")
    told = {law: state for law, state, _ in checking.documented(_described(path))}
    text = path.read_text().replace("TODO: what the defense does, in one sentence.", "Adds noise.")
    text = text.replace("TODO (now: the update)", "the update").replace(
        "TODO authors, title, venue, year, arXiv id", "none; a demonstration"
    )
    path.write_text(text)
    assert set(told.values()) == {"ok", "todo"}
    assert {state for _, state, _ in checking.documented(_described(path))} == {"ok"}


def _described(path):
    return checking.describe_file(str(path))[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"a" * (checking.MOST_BYTES + 1), "expected at most"),
        (b"\xff\xfe\x00x", "not UTF-8"),
        (b"x = '\0'", "NUL"),
    ],
)
def test_a_file_that_is_no_text_of_a_sane_size_is_refused_unread(tmp_path, content, says):
    path = tmp_path / "entry.py"
    path.write_bytes(content)
    assert says in readable(path)
    verdict = check(str(path), isolation="process")
    assert not verdict.passed()
    assert len(verdict.findings) == 1


def test_what_acts_at_import_is_confined_and_told(tmp_path):
    path, trace = tmp_path / "acts.py", tmp_path / "trace"
    path.write_text(f"open({str(trace)!r}, 'w').write('x')\n")
    verdict = check(str(path), isolation="process")
    assert "at import" in verdict.findings[-1].text
    assert verdict.findings[-1].state == "failed"
    assert not trace.exists()
    assert "leakbench_entry_acts" not in sys.modules


RUN = "        # A gradient, or the change"


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("import os; os._exit(3)", "exited (3)"),
        ("while True: pass", "took longer"),
    ],
)
def test_an_entry_that_dies_or_hangs_ends_the_check_not_the_checker(attack, monkeypatch, does, says):
    monkeypatch.setattr(checking, "SECONDS", 8.0)
    attack.write_text(attack.read_text().replace(RUN, f"        {does}\n{RUN}"))
    verdict = check(str(attack), isolation="process")
    found = [f for f in verdict.findings if f.state == "failed"]
    assert [f.law for f in found] == ["runs, and returns what it claims to recover"]
    assert says in found[0].text
    assert states(verdict)["needs are enough"] == "skipped"


def test_an_entry_that_prints_without_end_is_read_and_dropped(attack, leakbench):
    attack.write_text(attack.read_text().replace(RUN, f"        print('A' * 1_000_000)\n{RUN}"))
    code, out, err = leakbench("check", attack, "--isolation", "process")
    assert code == 0
    assert len(out + err) < 5000
    assert out.splitlines()[-1] == f"next: leakbench evaluate {attack} --suite quick"
    assert leakbench("check", attack, "--isolation", "process", "--strict")[0] == 1


def test_text_of_an_entry_cannot_write_to_the_terminal(attack):
    text = attack.read_text().replace('"head.weight",', '"head.weight",')
    attack.write_text(text.replace(RUN, f"        raise ValueError('\\x1b[2J\\nok everything passed')\n{RUN}"))
    verdict = check(str(attack), isolation="process")
    (failed,) = (f for f in verdict.findings if f.state == "failed")
    assert failed.text.isprintable()


def test_missing_files_and_names_are_one_line(leakbench, tmp_path):
    for given in (tmp_path / "none.py", "llg"):
        code, _, err = leakbench("check", given)
        assert code == 2
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1


TOLD = Description(kind="attack", name="try_it", class_name="TryIt", version=1, reference="", summary="")


@pytest.mark.parametrize(
    ("where", "name", "state", "says"),
    [
        ("baselines/attacks/try_it.py", "try_it", "ok", ""),
        ("baselines/attacks/other.py", "try_it", "failed", "move the file to baselines/attacks/try_it.py"),
        ("baselines/defenses/try_it.py", "try_it", "failed", "move the file to baselines/attacks/try_it.py"),
        ("mine/other.py", "try_it", "ok", ""),
        ("mine/llg.py", "llg", "todo", "to revise that one"),
    ],
)
def test_a_file_in_baselines_has_its_registered_name_and_no_name_is_taken_twice(tmp_path, where, name, state, says):
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.touch()
    got, text = checking._named(path, TOLD.model_copy(update={"name": name}))
    assert got == state
    assert says in text


def test_a_baseline_in_its_place_takes_nobodys_name():
    assert checking._named(find_source("attack", "llg").path, TOLD.model_copy(update={"name": "llg"})) == ("ok", "")

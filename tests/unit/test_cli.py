"""The command line: what it prints, how it exits, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from leakbench.cli import KINDS


@pytest.fixture(scope="module", autouse=True)
def warm_cache(tmp_path_factory):
    """Describe every baseline once for the whole module."""
    import os

    before = os.environ.get("LEAKBENCH_CACHE")
    os.environ["LEAKBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    from leakbench.entries import describe
    from leakbench.sources import sources

    describe([sources(kind).get(name) for kind in ("attack", "defense") for name in sources(kind)])
    yield
    if before is None:
        del os.environ["LEAKBENCH_CACHE"]
    else:
        os.environ["LEAKBENCH_CACHE"] = before


# --- speed of the first answer ----------------------------------------------------------------------------------------


_PROBE = """
import sys
from leakbench import cli
for line in sys.argv[1:]:
    try:
        cli.main(line.split())
    except SystemExit as end:
        heavy = [name for name in ("torch", "pydantic", "pandas", "rich", "yaml") if name in sys.modules]
        print("after", line, end.code, *heavy)
"""


def modules_after(*lines):
    """Run command lines in one fresh process; return what each left imported."""
    done = subprocess.run([sys.executable, "-c", _PROBE, *lines], capture_output=True, text=True, check=True)
    answers = [line.split() for line in done.stdout.splitlines() if line.startswith("after ")]
    assert len(answers) == len(lines), done.stderr
    return {line: set(words) for line, words in zip(lines, answers, strict=True)}


def test_help_imports_click_and_nothing_heavy():
    (words,) = modules_after("--help").values()
    assert not words & {"torch", "pydantic", "pandas", "rich", "yaml"}


def test_what_only_reads_or_plans_does_not_import_torch(tmp_path):
    lines = [f"list {kind}" for kind in KINDS] + ["show quick", "show llg", "schema", "run quick --shard 3/2"]
    lines += [f"status {tmp_path}", f"board {tmp_path}"]
    # Warms the cache of what entries say of themselves, which a child that has torch finds out.
    modules_after("list attacks", "list defenses", "show quick", "show llg")
    for line, words in modules_after(*lines).items():
        assert "torch" not in words, line


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed_as_text_and_as_json(leakbench, kind):
    code, text, _ = leakbench("list", kind)
    assert code == 0
    code, out, _ = leakbench("list", kind, "--json")
    items = json.loads(out)
    assert items
    assert [line.split()[0] for line in text.splitlines()] == [item["name"] for item in items]


@pytest.mark.parametrize("kind", ["attacks", "defenses"])
def test_entries_are_listed_with_what_a_row_needs(leakbench, kind):
    for item in json.loads(leakbench("list", kind, "--json")[1]):
        assert {"name", "version", "reference", "needs", "recovers", "params", "source_sha256"} <= set(item)
        assert len(item["source_sha256"]) == 64
        assert item["reference"]


@pytest.mark.parametrize("name", ["llg", "topk", "digits", "lenet_zhu", "instance_recall", "quick"])
def test_show_finds_a_name_of_any_kind(leakbench, name):
    code, text, _ = leakbench("show", name)
    assert code == 0
    assert name in text.splitlines()[0]
    assert json.loads(leakbench("show", name, "--json")[1])[0]["name"] == name


def test_the_shown_suite_names_every_cell(leakbench):
    (suite,) = json.loads(leakbench("show", "quick", "--json")[1])
    cells = {(cell["attack"], cell["defense"]) for task in suite["tasks"] for cell in task["cells"]}
    assert ("llg", "none") in cells
    assert {task["lane"] for task in suite["tasks"]} == {"passive_labels", "legacy_upper_bound"}


@pytest.mark.parametrize("suite", ["quick", "real"])
def test_the_suites_that_ship_load_and_expand(suite):
    from leakbench.suites import load_suite

    cells = load_suite(suite).expand()
    assert {cell.task.target for cell in cells} == {"labels", "inputs"}


def test_the_schema_is_printed_as_markdown(leakbench):
    code, text, _ = leakbench("schema")
    assert code == 0
    assert text.startswith("| column | type |")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "lst"),
        (["--hlp"], "hlp"),
        (["run"], "SUITE"),
        (["run", "quick", "--trails", "3"], "--trials"),
        (["run", "quick", "--trials", "few"], "few"),
        (["run", "quick", "--trials", "0"], "expected at least 1, got 0"),
        (["run", "quick", "--trials", "-4"], "expected at least 1, got -4"),
        (["run", "quick", "--workers", "0"], "expected at least 1, got 0"),
        (["run", "quick", "--shard", "3/2"], "1 <= I <= N"),
        (["run", "quick", "--shard", "half"], "1 <= I <= N"),
        (["run", "quick", "--isolation", "bwarp"], "bwrap"),
        (["run", "quick", "--device", "gpu"], "expected cpu, cuda"),
        (["run", "quick", "--fresh", "--keep"], "got both"),
        (["run", "quick", "--season-key", "/no/key"], "/no/key"),
        (["run", "quik"], "Did you mean 'quick'"),
        (["run", "quick", "--attack", "llgg"], "Did you mean 'llg'"),
        (["run", "quick", "--attack", "llg(x=1)"], "no parameter 'x'"),
        (["run", "quick", "--attack", "llg+llg"], "expected one attack"),
        (["run", "quick", "--attack", "llbg(gamma=2)"], "expected 0 <= gamma < 1, got 2.0"),
        (["run", "quick", "--defense", "topk+clip_l2(bound=0)"], "defense clip_l2"),
        (["run", "quick", "--defense", "topkk"], "Did you mean 'topk'"),
        (["run", "quick", "--defense", "topk(p='most')"], "expected a number"),
        (["run", "quick", "--attack", "/no/file.py:X"], "/no/file.py"),
        (["list"], "Missing"),
        (["list", "attaks"], "Did you mean 'attacks'"),
        (["show", "mnits"], "Did you mean 'mnist'"),
        (["show", "/no/suite.yaml"], "/no/suite.yaml"),
        (["show", "/no/file.py"], "/no/file.py"),
        (["status", "/no/run"], "expected a directory with plan.json"),
        (["board", "/no/run"], "/no/run"),
        (["board"], "OUT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(leakbench, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = leakbench(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_help_is_an_answer_and_not_a_mistake(leakbench):
    for arguments in (["--help"], ["run", "--help"], ["-h"]):
        code, out, err = leakbench(*arguments)
        assert (code, err) == (0, "")
        assert "Usage: leakbench" in out
    assert leakbench("--version")[0] == 0


def test_a_reader_that_closes_the_pipe_gets_no_traceback():
    command = f"{sys.executable} -c 'from leakbench.cli import main; main([\"schema\"])' | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("| column")
    assert "Traceback" not in done.stderr

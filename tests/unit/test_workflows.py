"""The workflows: linted, pinned, least permissions, and made of commands that exist here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from leakbench.cli import cli
from leakbench.suites import suite_paths

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SUBMISSION = ROOT / ".github" / "workflows" / "evaluate-submission.yml"
WORKFLOWS = [pytest.param(path, id=path.stem) for path in FILES]


def read(path):
    content = yaml.safe_load(path.read_text())
    return content | {"on": content.pop(True)}  # YAML 1.1 takes `on` for a truth value


def steps(path):
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def tool(name):
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def test_the_four_workflows_are_there():
    assert [path.stem for path in FILES] == ["canary", "evaluate-submission", "publish", "test"]


@pytest.mark.skipif(tool("zizmor") is None, reason="zizmor is not installed")
def test_zizmor_finds_nothing():
    command = [tool("zizmor"), "--offline", "--no-progress", ROOT / ".github"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    tool("actionlint") is None, reason="actionlint is not installed: it has no wheel, test.yml builds it"
)
def test_actionlint_finds_nothing():
    done = subprocess.run([tool("actionlint"), *FILES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS)
def test_actions_are_pinned_by_commit_and_say_which_release(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for line in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS)
def test_permissions_are_least_and_no_credential_stays(path):
    workflow = read(path)
    assert workflow["permissions"] == {}
    assert "pull_request_target" not in workflow["on"]
    assert "workflow_run" not in workflow["on"]
    for name, job in workflow["jobs"].items():
        assert set(job["permissions"].items()) <= {
            ("contents", "read"),
            ("id-token", "write"),
            ("attestations", "write"),
            ("pages", "write"),
        }
        assert job["timeout-minutes"]
        writes = "write" in job["permissions"].values()
        assert not (writes and "pull_request" in workflow["on"] and "workflow_dispatch" not in workflow["on"]), name
    for step in steps(path):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS)
def test_no_text_of_a_stranger_reaches_a_shell(path):
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step["name"]


def test_only_an_approved_dispatch_on_main_sees_a_secret():
    for path in FILES:
        for job in read(path)["jobs"].values():
            if "secrets." in yaml.dump(job):
                assert path.stem == "evaluate-submission"
                assert job["environment"] == "scoring"
                assert job["if"] == "github.event_name == 'workflow_dispatch' && github.ref == 'refs/heads/main'"


def commands(path):
    """Return the words of every leakbench command of a workflow."""
    for step in steps(path):
        text = step.get("run", "").replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(re.split(r" (?:>|\|\||&&|\||;) ", line)[0])
            for at, word in enumerate(words[:-1]):
                if Path(word).name == "leakbench":
                    yield words[at + 1 :]


STANDS_FOR = {"$what": "--attack", "$SHARD": "1/8"}
"""What variables of workflows hold, where it matters; any word will do for others."""


@pytest.mark.parametrize("path", WORKFLOWS)
def test_every_command_of_a_workflow_is_one_that_is_taken_here(path):
    for name, *words in commands(path):
        given = [STANDS_FOR.get(word, re.sub(r"\$\w+", "word", word)) for word in words]
        cli.commands[name].make_context(name, given)  # a command, option or value that is unknown raises


def test_commands_are_found_at_all():
    assert {name for path in FILES for name, *_ in commands(path)} >= {"guard", "check", "evaluate", "run", "verify"}


def test_suites_and_targets_that_workflows_name_exist():
    offered = read(SUBMISSION)["on"]["workflow_dispatch"]["inputs"]["suite"]
    assert set(offered["options"]) <= set(suite_paths())
    assert offered["default"] in offered["options"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {w for path in FILES for s in steps(path) for w in re.findall(r"\bmake ([a-z]+)", s.get("run", ""))}
    assert used <= targets


def test_forms_and_templates_are_whole():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "title", "labels", "body"} <= set(form), path.name
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids))
    assert (ROOT / ".github" / "scorers.txt").read_text().splitlines()[-1] == "github-actions[bot]"


def score():
    return {step["name"]: step for step in read(SUBMISSION)["jobs"]["score"]["steps"]}


@pytest.mark.parametrize(
    ("does", "code"),
    [("echo '{}'; exit 0", 0), ("echo '{}'; exit 1", 0), ("exit 1", 1), ("echo '{}'; exit 2", 1), ("exit 130", 1)],
)
def test_failed_jobs_stop_no_shard_but_a_crash_does(tmp_path, does, code):
    """GitHub runs a step by ``bash -e``; what leakbench does is acted here."""
    fake = tmp_path / ".venv" / "bin" / "leakbench"
    fake.parent.mkdir(parents=True)
    fake.write_text(f"#!/bin/sh\n{does}\n")
    fake.chmod(0o755)
    names = {"SEASON": "s", "SEASON_KEY": "k", "SHARD": "1/8", "SUITE": "labels", "NAME": "x", "ENTRY": "y"}
    environment = {"PATH": "/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path), **names}
    command = ["bash", "-e", "-c", score()["Run"]["run"]]
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=20).returncode == code


@pytest.mark.parametrize(("held", "code"), [(None, 0), ("plan.json", 0), ("development/ab/x.parquet", 3)])
def test_a_shard_without_jobs_is_fine_and_one_with_rows_is_verified(tmp_path, held, code):
    fake = tmp_path / ".venv" / "bin" / "leakbench"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    if held is not None:
        (tmp_path / "rows" / held).parent.mkdir(parents=True)
        (tmp_path / "rows" / held).touch()
    environment = {"PATH": "/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path)}
    command = ["bash", "-e", "-c", score()["Verify"]["run"]]
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=20, capture_output=True).returncode == code


def test_rows_are_kept_whatever_became_of_them():
    keep = score()["Keep the rows"]
    assert keep["if"] == score()["Name the part"]["if"] == "always()"
    assert keep["with"]["if-no-files-found"] == "ignore"


def test_the_guard_can_be_required_and_an_approved_commit_is_taken_by_its_hash():
    workflow = read(SUBMISSION)
    assert workflow["on"]["pull_request"] is None, "a filter of paths leaves a required check waiting"
    assert workflow["jobs"]["check"]["if"] == "needs.guard.outputs.kind == 'submission'"
    moving = {name for name, job in workflow["jobs"].items() if "refs/pull/" in yaml.dump(job)}
    assert moving == {"guard", "check", "named"}
    for name in ("score", "seal"):
        assert 'git fetch --no-tags origin "$SHA"' in yaml.dump(workflow["jobs"][name], width=1000).replace("\\", "")


def test_a_submission_is_checked_under_its_own_name():
    for step in read(SUBMISSION)["jobs"]["check"]["steps"]:
        if "docker run" in step.get("run", ""):
            assert '--volume "$PWD/$ENTRY:/submission/$ENTRY:ro"' in step["run"]
            assert "entry.py" not in step["run"]


def test_every_path_has_an_owner():
    lines = [line.split() for line in (ROOT / ".github" / "CODEOWNERS").read_text().splitlines() if line[:1] != "#"]
    assert lines[0] == ["*", "@leakbench/maintainers"]  # the last line that matches counts
    assert all(len(line) == 2 for line in lines)

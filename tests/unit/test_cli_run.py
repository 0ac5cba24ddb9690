"""The run loop and `status`, with a runner that writes files but measures nothing."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from leakbench import cli, entries, results
from leakbench.errors import UserError
from leakbench.runner import isolate, session
from leakbench.runner.plan import Job
from leakbench.runner.pool import resume, run_jobs


@dataclass
class Outcome:
    job: Job
    path: Path
    statuses: dict
    seconds: float = 0.0
    error: str | None = None


@dataclass
class Script:
    """What the fake runner does: ``act(job)`` returns a status or raises."""

    act: object = lambda job: "ok"
    ran: list = field(default_factory=list)
    code: str = "code-1"
    closed: bool = False
    most_at_once: int = 0
    unavailable: dict = field(default_factory=dict)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Replace the runner, the store's reader and the describe child."""
    script, at_once, lock = Script(), [0], threading.Lock()

    class Runner:
        level = "process"

        def __init__(self, out, *, on_progress=None, **options):
            self.out, self.on_progress = out, on_progress

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def close(self):
            script.closed = True

        def preflight(self, jobs):
            return script.unavailable

        def run(self, job):
            with lock:
                at_once[0] += 1
                script.most_at_once = max(script.most_at_once, at_once[0])
            try:
                self.on_progress(job, {"done": 1, "total": 2, "loss": 0.5})
                status = script.act(job)
                write(self.out, job, status, script.code)
                script.ran.append(job.id)
                return Outcome(job, self.out, {status: len(job.trials)}, 0.0, None if status == "ok" else "why")
            finally:
                with lock:
                    at_once[0] -= 1

    def write(out, job, status, code):
        file = out / f"{job.id}.json"
        file.write_text(json.dumps([code, status, len(job.trials)]))

    def completed(out, season):
        found = {}
        for path in out.glob("*.json"):
            if path.name != session.PLAN_FILE:
                code, status, trials = json.loads(path.read_text())
                found[path.stem] = results.JobFile(
                    path=path,
                    job_id=path.stem,
                    season=season,
                    rows=trials,
                    schema_version=1,
                    code_sha256=code,
                    statuses={status: trials},
                    rows_sha256=None,
                )
        return found

    def describe(requests, isolation):
        fields = {"class_name": "X", "version": 1, "reference": "", "summary": "", "params": {"p": 0.9}}
        return [{"ok": {**fields, "name": r["name"], "recovers": ["labels"]}} for r in requests]

    execute = types.ModuleType("leakbench.runner.execute")
    execute.Runner = Runner
    monkeypatch.setitem(sys.modules, "leakbench.runner.execute", execute)
    monkeypatch.setattr(isolate, "describe_entries", describe)
    monkeypatch.setattr(entries, "_described", {})
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))
    for module in ("session", "pool"):
        monkeypatch.setattr(f"leakbench.runner.{module}.completed_jobs", completed)
    monkeypatch.setattr(session.os, "_exit", sys.exit)
    monkeypatch.setattr(session, "code_sha256", lambda: script.code)
    monkeypatch.chdir(tmp_path)
    suite = tmp_path / "small.yaml"
    suite.write_text(
        "{name: small, version: 1, description: d, trials: 8, trials_per_job: 2, grids: [{dataset: digits, "
        "architecture: mlp, attacks: [random_labels, prior_labels]}]}"
    )
    return script


@pytest.fixture
def run(script, capfd):
    def call(*options, suite="small.yaml"):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(["run", suite, *options])
        return end.value.code, *capfd.readouterr()

    return call


def status(out="runs/small"):
    return session.status_of(Path(out))["jobs"]


def test_a_run_does_every_job_and_says_where_and_what_next(run, script):
    code, out, err = run("--workers", "2")
    assert code == 0
    assert len(script.ran) == len(set(script.ran)) == 8
    assert out.splitlines() == [
        "8 of 8 jobs run, 0 failed; trials: 16 ok",
        "rows: runs/small",
        "next: leakbench board runs/small",
    ]
    assert err.startswith("8 jobs, 2 at a time, isolation process; rows go to runs/small\n")
    assert len(err.splitlines()) == 9
    assert "[8/8]" in err
    assert script.closed
    assert status() == {"planned": 8, "done": 8, "failed": 0, "left": 0}


def test_the_summary_is_json_on_demand(run):
    report = json.loads(run("--json")[1])
    assert (report["planned"], report["run"], report["trials"]) == (8, 8, {"ok": 16})


def test_the_same_command_again_repeats_nothing(run, script):
    run()
    first = list(script.ran)
    code, out, _ = run()
    assert (code, script.ran) == (0, first)
    assert "0 of 8 jobs run, 8 were there" in out


def test_a_run_of_which_nothing_is_at_hand_is_refused_but_a_shard_is_not(run, script):
    script.unavailable = {"dataset d is not at hand; type: get d": 8}
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: nothing to measure: dataset d is not at hand; type: get d"
    assert script.ran == []
    script.act, script.unavailable = lambda job: "unavailable", {"no d": 99}
    code, out, err = run("--shard", "1/2")
    assert code == 0
    assert "jobs will have rows of status unavailable: no d" in err
    assert "--retry-failed" in out
    assert len(script.ran) > 0


def test_only_available_leaves_out_what_is_not_at_hand_and_says_so(run, script, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LEAKBENCH_DATA", str(tmp_path / "data"))
    text = Path("small.yaml").read_text()
    Path("mixed.yaml").write_text(text.replace("dataset: digits", "dataset: [digits, svhn], batch: [4, 4000]"))
    code, out, _ = run("--only-available", suite="mixed.yaml")
    assert code == 0
    assert len(script.ran) == 8
    assert {line.split(": ")[0] for line in out.splitlines()[1:-2]} == {"16 jobs left out", "8 jobs left out"}
    assert "hf download --repo-type dataset ufldl-stanford/svhn" in out
    assert json.loads(run("--only-available", "--json", suite="mixed.yaml")[1])["planned"] == 8
    Path("none.yaml").write_text(text.replace("dataset: digits", "dataset: svhn"))
    code, _, err = run("--only-available", suite="none.yaml")
    assert code == 2
    assert "ufldl-stanford/svhn" in err


def test_shards_together_do_every_job_once(run, script):
    run("--shard", "1/2")
    left = status()["left"]
    run("--shard", "2/2")
    assert 0 < left < 8
    assert len(script.ran) == len(set(script.ran)) == 8
    assert status()["left"] == 0


def test_workers_bound_the_jobs_at_work(run, script):
    def slow(job):
        time.sleep(0.02)
        return "ok"

    script.act = slow
    run("--workers", "3")
    assert 1 < script.most_at_once <= 3


def test_a_failed_job_exits_1_until_it_is_retried(run, script):
    script.act = lambda job: "timeout" if job.start == 2 and job.attack.name == "random_labels" else "ok"
    code, out, _ = run()
    assert code == 1
    assert "1 failed; trials: 14 ok, 2 timeout" in out
    assert "--retry-failed" in out
    assert "random_labels / none [2:4]: why" in out
    assert run()[0] == 1, "a failure stays one"
    assert status() == {"planned": 8, "done": 8, "failed": 1, "left": 0}
    script.act = lambda job: "ok"
    assert run("--retry-failed")[0] == 0
    assert len(script.ran) == 9


@pytest.mark.parametrize("word", ["not_applicable", "unavailable"])
def test_what_nobody_did_wrong_is_no_failure(run, script, word):
    script.act = lambda job: word
    assert run()[0] == 0
    run("--retry-failed")
    assert len(script.ran) == (16 if word == "unavailable" else 8)


def test_rows_of_other_code_stop_a_run_and_cost_nothing(run, script):
    run()
    script.code = "code-2"
    code, _, err = run()
    assert code == 2
    assert err.startswith("error: --out runs/small: 8 of 8 jobs")
    assert "--fresh" in err
    assert "--keep" in err
    assert len(script.ran) == 8
    assert run("--keep")[0] == 0
    assert len(script.ran) == 8
    assert run("--fresh")[0] == 0
    assert len(script.ran) == 16
    assert run()[0] == 0


def test_an_interrupt_keeps_what_is_finished_and_says_how_to_resume(run, script, monkeypatch):
    interrupted = threading.Event()

    def act(job):
        if len(script.ran) == 3:
            interrupted.set()
            raise KeyboardInterrupt
        assert not interrupted.is_set(), "nothing new starts after an interrupt"
        return "ok"

    script.act = act
    monkeypatch.setattr("sys.argv", ["leakbench", "run", "small.yaml"])
    code, _, err = run("--workers", "1")
    assert code == 130
    assert "resume with: leakbench run small.yaml" in err
    assert "Traceback" not in err
    script.act = lambda job: "ok"
    assert run()[0] == 0
    assert len(script.ran) == len(set(script.ran)) == 8


def test_a_full_disk_stops_the_run_with_one_line_and_loses_nothing(run, script):
    def act(job):
        if len(script.ran) == 2:
            raise UserError("--out runs/small: cannot write x.parquet (No space left on device); use another --out")
        return "ok"

    script.act = act
    code, _, err = run("--workers", "1")
    assert code == 2
    assert "No space left" in err.splitlines()[-1]
    assert len(script.ran) == 2
    script.act = lambda job: "ok"
    assert run()[0] == 0
    assert len(script.ran) == len(set(script.ran)) == 8


def test_given_attacks_and_defenses_replace_those_of_the_suite(run, script):
    run("--attack", "llg", "--defense", "none", "--defense", "topk(p=0.5)", "--trials", "2")
    assert len(script.ran) == 2


def test_jobs_of_another_suite_in_the_same_directory_are_not_counted(run, script, tmp_path):
    run("--out", "both")
    text = (tmp_path / "small.yaml").read_text().replace("mlp", "lenet5").replace("small", "other")
    (tmp_path / "other.yaml").write_text(text.replace("digits", "mnist"))
    run("--out", "both", suite="other.yaml")
    assert status("both") == {"planned": 8, "done": 8, "failed": 0, "left": 0}


def test_status_counts_against_the_plan_of_the_last_run(run, script, capfd):
    def act(job):
        if len(script.ran) == 3:
            raise KeyboardInterrupt
        return "ok" if script.ran else "oom"

    script.act = act
    run("--workers", "1")
    with pytest.raises(SystemExit) as end:
        cli.main(["status", "runs/small"])
    out = capfd.readouterr().out
    assert end.value.code == 0
    assert "3 of 8 jobs done, 1 failed, 5 left" in out
    assert "2 trials oom" in out
    assert "resume with: " in out


@pytest.mark.parametrize("name", ["development.key", "my season.key", ".hidden"])
def test_a_season_needs_a_name_of_its_own(run, script, tmp_path, name):
    (tmp_path / name).write_bytes(b"0123456789abcdef0123456789abcdef")
    code, _, err = run("--season-key", name)
    assert code == 2
    assert "rename it" in err
    assert script.ran == []


def test_a_seasons_rows_are_apart_and_its_key_is_written_nowhere(run, script, tmp_path):
    (tmp_path / "spring.key").write_bytes(b"0123456789abcdef0123456789abcdef")
    run()
    assert run("--season-key", "spring.key")[0] == 0
    assert len(script.ran) == len(set(script.ran)) == 16
    for path in (tmp_path / "runs").rglob("*"):
        assert path.is_dir() or b"0123456789abcdef" not in path.read_bytes()


def test_resume_of_an_empty_plan_is_empty(tmp_path):
    assert resume([], tmp_path, "code").todo == []


def test_no_jobs_are_no_work(script):
    assert run_jobs([], None, None, workers=4).done == 0

"""Kills, interrupts, shards and resume, with the real runner."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from leakbench.results import load_rows, read_job_status

SUITE = """
name: small
version: 1
description: a test
trials: 20
trials_per_job: 2
model_draws: per_trial
grids:
  - dataset: digits
    architecture: mlp
    batch: {size: 4, sampler: unbalanced}
    attacks: [llg, random_labels]
    defenses: [none, gaussian_noise(std=0.01)]
"""
JOBS = 40
VARYING = ["wall_seconds", "client_seconds", "prepare_seconds", "peak_memory_bytes", "utc", "git_sha", "git_dirty"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.yaml").write_text(SUITE)

    def call(out, *options):
        command = [sys.executable, "-c", "from leakbench.cli import main; main()", "run", "small.yaml", "--out", out]
        # A shell's background job ignores interrupts, and so would what it starts.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([*command, *options], cwd=tmp_path, stdout=-1, stderr=-1, text=True, preexec_fn=heed)

    return call


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def files(out: Path) -> dict[Path, tuple[int, int]]:
    """Return every file under its final name, with what tells whether it was written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*/*/[!.]*.parquet")}


def stop_after_one_more(process, out, how):
    before = len(files(out))
    until = time.monotonic() + 240
    while len(files(out)) == before:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    kept = files(out)
    assert before < len(kept) < JOBS, "the run was stopped in its middle"
    for path in kept:
        job = read_job_status(path)
        assert job is not None, "a file under its final name is whole"
        assert set(job.statuses) == {"ok"}, "being stopped is no failure of an entry"
    return kept


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=VARYING).sort_values(["attack", "defense", "trial"]).reset_index(drop=True)


def test_rows_do_not_depend_on_kills_interrupts_shards_workers_or_other_attacks(start, tmp_path):
    finish(start("whole", "--workers", "2"))
    cut = tmp_path / "cut"
    finish(start("cut", "--workers", "1", "--shard", "1/4", "--attack", "llg"))
    first = files(cut)
    assert 0 < len(first) < JOBS // 2

    second = stop_after_one_more(start("cut", "--workers", "1"), cut, signal.SIGKILL)
    process = start("cut", "--workers", "2")
    third = stop_after_one_more(process, cut, signal.SIGINT)
    assert process.returncode == 130
    assert f"{JOBS - len(third)} of {JOBS} jobs run, {len(third)} were there" in finish(start("cut", "--workers", "2"))

    last = files(cut)
    for earlier in (first, second, third):
        assert {path: last[path] for path in earlier} == earlier, "no finished job is repeated"
    assert len(last) == JOBS
    assert not list(cut.rglob(".*.tmp")), "what a killed writer left behind is cleaned up"
    pd.testing.assert_frame_equal(comparable(load_rows(cut)), comparable(load_rows(tmp_path / "whole")))

"""The laws of DESIGN.md 2.1 by name, on real jobs behind the real boundary."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from leakbench.keys import DEVELOPMENT, Season
from leakbench.results import load_rows
from leakbench.runner.artefacts import Artefacts
from leakbench.runner.bubblewrap import bubblewrap_works
from leakbench.runner.execute import Runner
from leakbench.runner.plan import plan, shard
from leakbench.runner.pool import run_jobs
from leakbench.runner.progress import PlainDisplay
from leakbench.runner.scene import Scenes
from leakbench.suites import load_suite
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

TIMES = ["wall_seconds", "client_seconds", "prepare_seconds", "device_seconds", "peak_memory_bytes", "utc"]
SUITE = """
name: laws
version: 1
description: a test
trials: 12
trials_per_job: {block}
model_draws: {draws}
grids:
  - dataset: digits
    architecture: mlp
    batch: {{size: 4, sampler: unbalanced}}
    threat_model: {{auxiliary: 30}}
    attacks: [{attacks}]
    defenses: [{defenses}]
"""
ATTACKS = ["llg", "llg_plus(rounds=2)", "random_labels"]
DEFENSES = ["none", "gaussian_noise(std=0.01)"]
PROBE = """
import torch
from leakbench import Attack, Recovery


class Probe(Attack):
    recovers = frozenset({"labels"})

    def run(self, observation):
        counts = torch.zeros(observation.trials, 1, observation.num_classes, dtype=torch.int64)
        values = observation.update[f"{observation.model.head}.bias"]
        return Recovery(label_counts=counts, visible_loss=(values * torch.arange(1, 11)).sum(-1))


class HeadProbe(Probe):
    reads = ("head.bias",)


class Drawn(Probe):
    def prepare(self, knowledge):
        return {"drawn": knowledge.randn(1)[:, 0]}

    def run(self, observation):
        counts = super().run(observation).label_counts
        return Recovery(label_counts=counts, visible_loss=observation.prepared["drawn"].expand(observation.trials))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("laws")
        patch.setenv("LEAKBENCH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "probe.py").write_text(PROBE)
        load_suite(
            suite(folder, attacks=[*ATTACKS, "prior_labels", "bias_count", "probe.py:Probe", "probe.py:HeadProbe"])
        )
        yield folder


def suite(folder: Path, name: str = "all", *, attacks=ATTACKS, defenses=DEFENSES, block: int = 4, draws="per_trial"):
    path = folder / f"{name}.yaml"
    lists = {"attacks": ", ".join(attacks), "defenses": ", ".join(defenses)}
    path.write_text(SUITE.format(**lists, block=block, draws=draws))
    return str(path)


def jobs_of(folder: Path, name: str = "all", season: Season = DEVELOPMENT, **changes):
    return plan(load_suite(suite(folder, name, **changes)).expand(), season)


class Lab:
    """A runner whose output folder can be changed, so that tests share its server."""

    def __init__(self, runner: Runner, folder: Path) -> None:
        self.runner, self.folder, self.number = runner, folder, 0

    def new_out(self) -> Path:
        self.number += 1
        return self.folder / f"out{self.number}"

    def measure(self, jobs, *, workers: int = 1, out: Path | None = None) -> pd.DataFrame:
        self.runner._out = out or self.new_out()
        with open(os.devnull, "w") as nothing:
            run_jobs(jobs, self.runner, PlainDisplay(nothing, len(jobs)), workers=workers)
        return load_rows(self.runner._out)


@pytest.fixture(scope="module")
def lab(place):
    folder = place / "lab"
    with Runner(folder, season=DEVELOPMENT, isolation="process", workers=4, files=[place / "probe.py"]) as runner:
        yield Lab(runner, folder)


@pytest.fixture(scope="module")
def reference(place, lab):
    rows = lab.measure(jobs_of(place))
    assert set(rows.status) == {"ok"}, rows.error.dropna().unique()
    assert len(rows) == 12 * len(ATTACKS) * len(DEFENSES)
    return rows


def same(first: pd.DataFrame, second: pd.DataFrame, *, apart_from: tuple[str, ...] = ()) -> None:
    """Assert bit-equal rows, times apart."""
    tables = [
        rows.drop(columns=[*TIMES, *apart_from]).sort_values(["job_id", "trial"]).reset_index(drop=True)
        for rows in (first, second)
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_two_runs_give_equal_rows(place, reference):
    with Runner(place / "again", season=DEVELOPMENT, isolation="process") as runner:
        same(Lab(runner, place / "again").measure(jobs_of(place)), reference)


def test_rows_do_not_depend_on_sharding(place, lab, reference):
    jobs = jobs_of(place)
    parts = [shard(jobs, index, 2) for index in (1, 2)]
    assert all(parts)
    outs = [lab.new_out(), lab.new_out()]
    for part, out in zip(parts, outs, strict=True):
        lab.measure(part, out=out)
    same(load_rows(outs), reference)


def test_rows_do_not_depend_on_workers_or_order(place, lab, reference):
    jobs = jobs_of(place)
    random.Random(4).shuffle(jobs)
    same(lab.measure(jobs, workers=4), reference)


def test_adding_an_attack_changes_no_other_row(place, lab, reference):
    more = jobs_of(place, "more", attacks=["prior_labels", *ATTACKS, "bias_count"])
    rows = lab.measure(more)
    assert len(rows) > len(reference)
    same(rows[rows.attack.isin(reference.attack)], reference)


def test_victims_do_not_depend_on_model_attack_or_defense(reference):
    of_a_trial = reference.groupby("trial")[["distinct_labels", "max_label_count", "checkpoint_sha256"]].nunique()
    assert (of_a_trial == 1).all(axis=None)
    scenes = Scenes(DEVELOPMENT)
    base = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=4))
    changes = [
        {"architecture": Architecture(name="lenet5")},
        {"stage": "early"},
        {"normalise": False},
        {"target": "inputs"},
        {"version": 2},
        {"threat_model": ThreatModel(labels=True)},
        {"protocol": Protocol(sends="delta", local_steps=5, batches="same")},
    ]
    drawn = scenes.victims(base, range(8)).indices
    for change in changes:
        assert np.array_equal(scenes.victims(base.model_copy(update=change), range(8)).indices, drawn), change
    assert np.array_equal(scenes.victims(base, [5, 2]).indices, drawn[[5, 2]])
    assert not np.array_equal(Scenes(Season("other", b"x" * 16)).victims(base, range(8)).indices, drawn)


def test_defense_noise_does_not_depend_on_its_strength_or_on_the_attack(place, lab):
    strengths = {"none": 0.0, "gaussian_noise(std=0.1)": 0.1, "gaussian_noise(std=0.2)": 0.2}
    jobs = jobs_of(place, "noise", attacks=["probe.py:Probe", "probe.py:HeadProbe"], defenses=list(strengths))
    rows = lab.measure(jobs).set_index(["defense_params", "trial"]).sort_index()
    assert set(rows.status) == {"ok"}, rows.error.dropna().unique()
    seen = {
        std: rows.xs(params).groupby("trial").visible_loss.unique()
        for params, std in (("{}", 0.0), ('{"relative":false,"std":0.1}', 0.1), ('{"relative":false,"std":0.2}', 0.2))
    }
    assert all(len(values) == 1 for per_trial in seen.values() for values in per_trial), "depends on what is read"
    clean, weak, strong = (np.array([values[0] for values in seen[std]]) for std in (0.0, 0.1, 0.2))
    assert np.abs(weak - clean).min() > 1e-3
    np.testing.assert_allclose(strong - clean, 2 * (weak - clean), rtol=1e-3)


def test_rows_of_another_block_size_agree_within_tolerance(place, lab, reference):
    attacks = ["llg", "probe.py:Probe"]
    blocks = {size: jobs_of(place, f"block{size}", attacks=attacks, block=size) for size in (4, 5, 12)}
    tables = {
        size: lab.measure(jobs).sort_values(["attack", "defense", "trial"]).reset_index(drop=True)
        for size, jobs in blocks.items()
    }
    names = ["trial", "instance_recall", "distinct_labels", "checkpoint_sha256", "draw"]
    for rows in (tables[5], tables[12]):
        pd.testing.assert_frame_equal(rows[names], tables[4][names], check_exact=True)
        np.testing.assert_allclose(rows.visible_loss, tables[4].visible_loss, rtol=1e-4, atol=1e-6)


def test_what_is_prepared_for_a_model_does_not_depend_on_the_others_of_its_block(place, lab):
    drawn = []
    for size in (4, 5):
        jobs = jobs_of(place, f"drawn{size}", attacks=["probe.py:Drawn"], defenses=["none"], block=size)
        drawn.append(lab.measure(jobs).set_index("trial").visible_loss.sort_index())
    assert drawn[0].nunique() == len(drawn[0])
    pd.testing.assert_series_equal(*drawn)


def test_process_and_bwrap_and_none_give_the_same_rows(place, reference):
    levels = ["none"] + (["bwrap"] if bubblewrap_works() else [])
    for level in levels:
        with Runner(place / level, season=DEVELOPMENT, isolation=level) as runner:
            rows = Lab(runner, place / level).measure(jobs_of(place))
        assert set(rows.isolation) == {level}
        same(rows, reference, apart_from=("isolation", "isolation_detail"))


def test_artefact_is_computed_once(place, lab):
    jobs = jobs_of(place, "prepared", attacks=["llg_plus(rounds=3)"], defenses=["none"], draws="one")
    assert len(jobs) == 3
    rows = lab.measure(jobs, workers=3)
    assert rows.prepare_seconds.nunique() == 1, "jobs at work at the same time computed it twice"
    lab.runner._shop.artefacts = Artefacts(lab.folder / "artefacts")  # as a later run finds them
    again = lab.measure(jobs)
    assert set(again.prepare_seconds) == set(rows.prepare_seconds), "a later run computed it again"
    same(again, rows)


def test_sigkill_at_any_moment_loses_nothing(place, reference):
    out = place / "killed"
    command = [sys.executable, "-c", "from leakbench.cli import main; main()", "run", suite(place)]
    command += ["--out", str(out), "--workers", "1", "--isolation", "process"]
    moments = random.SystemRandom()
    enough, pause = moments.randrange(1, 12), moments.uniform(0, 0.1)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while len(_files(out)) < enough and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        family = _descendants(process.pid)
        process.send_signal(signal.SIGKILL)
    assert family, "it was killed too late to tell anything"
    assert _end(family), "the child server or its children outlived the run"
    finished = _files(out)
    assert enough <= len(finished) < len(reference) // 4
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert finished.items() <= _files(out).items(), "a finished job was done again"
    assert not list(out.rglob("*.tmp"))
    same(load_rows(out), reference, apart_from=("suite",))


def _files(out: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*/*/[!.]*.parquet")}


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _end(pids: list[int], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)

"""Rows of image jobs: who judges features, what the gallery holds, and the bar of exact attacks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from leakbench.attack import Recovery
from leakbench.entries import resolve
from leakbench.federation.inputs import to_inputs
from leakbench.grids import Cell
from leakbench.keys import DEVELOPMENT
from leakbench.lock import read_lock, tasks_folder
from leakbench.models import stages
from leakbench.provenance import provenance
from leakbench.runner.plan import plan
from leakbench.runner.rows import Outcome, job_rows
from leakbench.runner.scene import Scenes
from leakbench.tasks import Architecture, BatchSpec, Task

MLP = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=3), target="inputs")
LENET = MLP.model_copy(update={"architecture": Architecture(name="lenet_zhu")})
TRIALS = 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Have an empty cache, and no training."""

    def refuse(*_, **__):
        raise AssertionError("a metric trains no net")

    monkeypatch.setattr(stages, "train", refuse)
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "image_rows"))


def rows_of(task, noise=0.0, *, recovered=True, exact=False, scenes=None):
    (spec,) = resolve("attack", "mean_image")
    spec = replace(spec, description=spec.description.model_copy(update={"exact": exact}))
    (job,) = plan([Cell("", task, spec, (), TRIALS, TRIALS)], DEVELOPMENT)
    scenes = scenes or Scenes(DEVELOPMENT)
    victims = scenes.victims(task, job.trials)
    true = to_inputs(victims.inputs, scenes.dataset(task).input_spec, task.normalise).flatten(1, 2)
    generator = torch.Generator().manual_seed(1)
    moved = (true + noise * torch.randn(true.shape, generator=generator)).flip(1)
    outcome = Outcome("ok", recovery=Recovery(inputs=moved, model_evaluations=0))
    if not recovered:
        outcome.fail("error", "died")
    known = {**provenance(), "isolation": "none", "isolation_detail": None}
    return job_rows(job, outcome, scenes, victims, None, known), victims


def test_exact_images_are_at_no_distance_and_identified():
    rows, victims = rows_of(LENET)
    private = Scenes(DEVELOPMENT).dataset(LENET).rows("private")[:1000]
    for row, indices in zip(rows, victims.indices.reshape(TRIALS, -1), strict=True):
        assert (row["identification_rank"], row["identified"], row["recovered"]) == (1, 1, 1)
        assert row["identification_gallery"] == len(set(private) | set(indices))
        assert row["feature_distance"] < 1e-6 < row["feature_distance_floor"]
        assert row["identification_rank_floor"] > 50 > 1 > row["identified_floor"]
        assert row["lpips"] is None
        assert row["lpips_floor"] is None  # 8x8 images


def test_features_are_those_of_another_architecture_whose_weights_are_official():
    pins = {
        file["file"].partition("-converged")[0]: file["sha256"]
        for stage in read_lock(tasks_folder())["checkpoints"].values()
        for file in stage.values()
        if file["file"].partition("converged-")[2].startswith("0-")
    }
    for task, judge in ((LENET, "mlp"), (MLP, "lenet_zhu-uniform0.5")):
        assert {row["feature_checkpoint"] for row in rows_of(task)[0]} == {f"{judge}:{pins[judge]}"}


def test_without_a_checkpoint_at_hand_the_distance_is_null_and_nothing_is_trained(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), y=np.arange(60) % 3)
    rows, _ = rows_of(MLP.model_copy(update={"dataset": str(tmp_path / "mine.npz")}))
    for row in rows:
        assert row["feature_checkpoint"] is row["feature_distance"] is row["feature_distance_floor"] is None
        assert row["identification_rank"] == 1
        assert row["identification_gallery"] == 36  # the private split of 60: all victims are in it


def test_the_cache_is_searched_once_per_process(monkeypatch):
    asked = []
    monkeypatch.setattr("leakbench.runner.scene.checkpoint_at_hand", lambda *a, **_: asked.append(a))
    scenes = Scenes(DEVELOPMENT)
    for _ in range(2):
        rows_of(MLP, scenes=scenes)
    assert len(asked) == 4  # every judge of another architecture


def test_an_attack_that_declares_itself_exact_has_a_higher_bar():
    near = {exact: rows_of(MLP, noise=0.05, exact=exact)[0] for exact in (False, True)}
    assert all(20 < row["psnr"] < 40 for row in near[False])
    assert {row["recovered"] for row in near[False]} == {1}
    assert {row["recovered"] for row in near[True]} == {0}
    assert {row["recovered"] for row in rows_of(MLP, noise=0.001, exact=True)[0]} == {1}


def test_a_failed_job_has_the_floors_of_the_others_and_no_values():
    good, _ = rows_of(MLP, noise=0.3)
    failed, _ = rows_of(MLP, recovered=False)
    floors = [name for name in good[0] if name.endswith("_floor")]
    assert len(floors) == 8
    for a, b in zip(good, failed, strict=True):
        assert [b[name] for name in floors] == [a[name] for name in floors]
        assert all(b[name.removesuffix("_floor")] is None for name in floors)


def test_entries_are_not_exact_unless_they_say_so(tmp_path):
    source = """
from leakbench import Attack, Recovery
class Plain(Attack):
    recovers = frozenset({"inputs"})
    def run(self, observation): return Recovery()
class Exact(Plain):
    exact = True
"""
    (tmp_path / "mine.py").write_text(source)
    described = [resolve("attack", f"{tmp_path}/mine.py:{name}")[0].description for name in ("Plain", "Exact")]
    assert [json.loads(d.model_dump_json())["exact"] for d in described] == [False, True]

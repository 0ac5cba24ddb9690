"""What `leakbench verify` says of rows of several jobs that cannot be right together."""

from __future__ import annotations

import datetime as dt
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
from forging import refused, rewrite

import leakbench.tasks as tasks
from leakbench import evaluate
from leakbench.metrics import METRICS
from leakbench.submitting.across import COLUMNS, contradictions, remarks
from leakbench.submitting.verify import verify

TASK = tasks.Task(
    dataset="digits",
    architecture=tasks.Architecture(name="mlp"),
    batch=tasks.BatchSpec(size=4, sampler="unbalanced"),
)


@pytest.fixture(scope="module")
def twice(tmp_path_factory, one_cache):
    """The first trials of an attack twice, in a narrow and a wide job: of each trial boards show one row."""
    out = tmp_path_factory.mktemp("twice") / "rows"
    for trials in (2, 3):
        evaluate("llg", TASK, trials=trials, isolation="none", out=out)
    return out


def test_trials_in_two_jobs_have_to_agree(twice, tmp_path):
    folder = shutil.copytree(twice, tmp_path / "rows")
    found = verify([folder])
    assert found.problems == []
    assert sum("its trials are in another job" in note.text for note in found.notes) == 2
    shorter = min((p for p in folder.glob("*/*/*.parquet")), key=lambda p: len(pq.read_table(p)))
    rewrite(shorter, {"instance_recall": 0.5, "utc": dt.datetime.now(dt.UTC)})
    assert sum("another instance_recall in another job" in text for text in refused(folder)) == 2


def across(**columns):
    """Return what is said of a dozen rows of three jobs, of which the last has other values in some columns."""
    same = dict.fromkeys(COLUMNS, "x") | dict.fromkeys(METRICS, 0.5) | {"status": "ok", "trial": 0, "draw": 0}
    rows = [same | {"attack": f"a{i}", "checkpoint_origin": "init", "_where": f"job {i}"} for i in range(3)]
    rows[2] |= columns
    rows = pd.DataFrame([row | {"trial": trial} for row in rows for trial in range(4)])
    return [*contradictions(rows)], [*remarks(rows)]


def test_a_dataset_a_model_and_a_key_are_the_same_in_every_job():
    assert across() == ([], [])
    for columns, says in (
        ({"dataset_fingerprint": "y"}, "dataset_fingerprint"),
        ({"checkpoint_sha256": "y"}, "checkpoint_sha256"),
        ({"season": "y"}, "the key of its season"),
    ):
        ((where, text),) = across(**columns)[0]
        assert where == "job 2"
        assert says in text
    assert across(dataset_fingerprint="y", dataset="y", checkpoint_sha256="y", task_hash="y") == ([], [])
    assert across(dataset_fingerprint=None, checkpoint_sha256=None) == ([], [])  # failed before it was read
    # Another processor may draw other bits, and training on it does.
    assert across(checkpoint_sha256="y", host_kind="y")[0] == []


def test_models_trained_twice_are_noted():
    trained = {"checkpoint_origin": "local", "attack": "a1"}
    rows = pd.DataFrame(
        [
            dict.fromkeys(COLUMNS, "x") | trained | {"host_kind": kind, "checkpoint_sha256": kind, "_where": kind}
            for kind in ("one", "two")
        ]
    ).assign(**dict.fromkeys(METRICS, 0.5))
    assert [*contradictions(rows)] == []
    assert any("trained more than once" in text for _, text in remarks(rows))

"""What `leakbench verify` says of rows of several jobs that cannot be right together."""

from __future__ import annotations

import datetime as dt
import json
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
from forging import refused, rewrite

import leakbench.tasks as tasks
from leakbench import evaluate
from leakbench.metrics import METRICS
from leakbench.submitting.across import COLUMNS, contradictions, remarks
from leakbench.submitting.known import Declared, unknown, wrong_names
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


@pytest.fixture
def chain(one_cache, tmp_path):
    """A folder with one job of an attack against a chain of defenses, and its file."""
    evaluate("random_labels", TASK, "gaussian_noise+topk", trials=2, isolation="none", out=tmp_path / "rows")
    (path,) = (tmp_path / "rows").glob("*/*/*.parquet")
    return tmp_path / "rows", path


def test_what_a_source_at_hand_declares_cannot_be_told_otherwise(chain):
    folder, path = chain
    row = pq.read_table(path).to_pylist()[0]

    def wrong(**columns):
        declared = Declared()
        declared.add("here", row | columns)
        return [text for _, text in declared.wrong()]

    assert [*wrong(), *wrong_names(row), *unknown(row, ())] == []
    assert len(json.loads(row["defense_adaptive"])) == 2
    for columns in ({"attack_version": 9}, {"defense_adaptive": "[[],[]]"}, {"defense_strength": "[null, null]"}):
        (text,) = wrong(**columns)
        assert text.startswith(f"forged: {next(iter(columns))} is ")
    # Of other code, or of an entry elsewhere, nothing is known.
    assert wrong(attack_source_sha256="a" * 64, attack_version=9) == []
    rewrite(path, {"defense_adaptive": "[[],[]]"})
    assert any("defense_adaptive is [[],[]], but the source" in text for text in refused(folder))


def test_an_entry_that_is_nowhere_is_noted_and_a_path_is_no_name(chain):
    folder, path = chain
    row = pq.read_table(path).to_pylist()[0]
    invented = row | {"attack": "my_invention", "attack_source_sha256": "a" * 64}
    (text,) = unknown(invented, ())
    assert text.startswith("attack my_invention: is not at hand, and nothing shows that it exists")
    assert [*unknown(invented, {"a" * 64})] == []
    assert any("source has changed" in text for text in unknown(row | {"attack_source_sha256": "a" * 64}, ()))
    assert any("no source_sha256" in text for text in unknown(row | {"attack_source_sha256": None}, ()))
    assert any(text.startswith("measure guess: is not") for text in unknown({"measure": "guess"}, ()))
    rewrite(path, {"attack": "../../x"})
    assert "attack '../../x' is no name of an entry" in refused(folder)

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leakbench import results
from leakbench.errors import UserError
from leakbench.metrics import METRICS
from leakbench.tasks import Architecture, Protocol, Task, ThreatModel

TASK = Task(dataset="digits", architecture=Architecture(name="mlp", params={"width": 32}))
DEFAULTS = {pa.string(): "x", pa.int64(): 1, pa.float64(): 0.5, pa.bool_(): False}
WRITTEN = datetime(2026, 1, 1, tzinfo=UTC)


def row(**changes):
    required = {f.name: DEFAULTS.get(f.type, WRITTEN) for f in results.ROW_FIELDS if not f.nullable}
    fixed = {"season": "development", "job_id": "ab12", "status": "ok", "block_start": 0, "block_stop": 2, "trial": 0}
    return required | results.blank_row() | results.task_columns(TASK) | fixed | changes


def job(job_id="ab12", trials=range(2), **changes):
    block = {"block_start": min(trials), "block_stop": max(trials) + 1}
    return [row(job_id=job_id, trial=t, **(block | changes)) for t in trials]


def old_file(out: Path, version="0", name="cd34"):
    path = out / "development" / name[:2] / f"{name}.parquet"
    path.parent.mkdir(parents=True)
    note = {
        "leakbench.complete": "true",
        "leakbench.rows": "1",
        "leakbench.job_id": name,
        "leakbench.season": "development",
        "leakbench.schema_version": version,
        "leakbench.code_sha256": "c",
        "leakbench.statuses": "{}",
    }
    pq.write_table(pa.table({"trial": [0]}).replace_schema_metadata(note), path)
    return path


def test_rows_come_back_as_written(tmp_path):
    rows = job(instance_recall=0.75, knows_labels=True, error=None)
    results.write_job(tmp_path, "ab12", "development", rows)
    back = results.load_rows(tmp_path)
    assert list(back.columns) == [f.name for f in results.ROW_FIELDS]
    assert back["trial"].tolist() == [0, 1]
    assert back["instance_recall"].tolist() == [0.75, 0.75]
    assert back["knows_labels"].all()
    assert back["psnr"].isna().all()
    assert back["utc"].iloc[0] == WRITTEN


def test_footer_tells_what_a_file_holds(tmp_path):
    rows = job(trials=range(3))
    rows[2] |= {"status": "oom", "error": "out of memory"}
    path = results.write_job(tmp_path, "ab12", "development", rows)
    done = results.completed_jobs(tmp_path, "development")["ab12"]
    assert (done.path, done.rows, done.statuses, done.code_sha256) == (path, 3, {"ok": 2, "oom": 1}, "x")


def test_a_job_of_another_season_is_not_done(tmp_path):
    results.write_job(tmp_path, "ab12", "development", job())
    assert results.completed_jobs(tmp_path, "2026") == {}


def test_a_file_cut_at_any_byte_is_not_complete(tmp_path):
    path = results.write_job(tmp_path, "ab12", "development", job())
    whole = path.read_bytes()
    for length in [0, 1, 4, *range(100, len(whole), 499), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert not results.is_complete(path)
        assert results.completed_jobs(tmp_path, "development") == {}
    path.write_bytes(whole)
    assert results.is_complete(path)


def test_a_foreign_parquet_file_is_not_a_result(tmp_path):
    path = tmp_path / "development" / "ab" / "ab.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), path)
    assert not results.is_complete(path)
    assert results.completed_jobs(tmp_path, "development") == {}


def test_a_writer_killed_before_the_rename_leaves_no_job_and_the_next_write_cleans_up(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from leakbench import results, store\n"
        "from test_results import job\n"
        "store.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"results.write_job(Path({str(tmp_path)!r}), 'ab12', 'development', job())"
    )
    here = str(Path(__file__).parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=here, check=False).returncode == -9
    (left,) = tmp_path.rglob("*.tmp")
    assert results.completed_jobs(tmp_path, "development") == {}
    with left.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as if its writer were still at it
        results.write_job(tmp_path, "ab12", "development", job())
        assert left.exists()
    results.write_job(tmp_path, "ab12", "development", job())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["ab12.parquet"]


def test_of_two_measurements_of_a_trial_the_widest_then_latest_block_counts(tmp_path):
    later = {"utc": WRITTEN + timedelta(hours=1)}
    results.write_job(tmp_path, "a1", "development", job("a1", range(4), instance_recall=0.1))
    results.write_job(tmp_path, "a2", "development", job("a2", range(4), instance_recall=0.2, **later))
    results.write_job(tmp_path, "a3", "development", job("a3", range(2), instance_recall=0.3, **later))
    results.write_job(tmp_path, "a4", "development", job("a4", range(2), instance_recall=0.4, attack_params="y"))
    rows = results.load_rows(tmp_path)
    assert rows["instance_recall"].tolist() == [0.2] * 4 + [0.4] * 2


def test_a_failure_without_data_and_the_later_success_are_one_trial_and_missing_data_is_no_news(tmp_path):
    shown = {"dataset_fingerprint": "d" * 64, "checkpoint_sha256": "c" * 64}
    hours = [{"utc": WRITTEN + timedelta(hours=h)} for h in range(3)]
    results.write_job(tmp_path / "a", "a1", "development", job("a1", status="error", **hours[0]))
    results.write_job(tmp_path / "b", "a1", "development", job("a1", instance_recall=0.5, **shown, **hours[1]))
    results.write_job(tmp_path / "c", "a1", "development", job("a1", status="unavailable", **hours[2]))
    rows = results.load_rows([tmp_path / name for name in "abc"])
    assert rows["instance_recall"].tolist() == [0.5, 0.5]
    results.write_job(tmp_path / "d", "a1", "development", job("a1", status="error", **hours[2]))
    assert results.load_rows([tmp_path / "d", tmp_path / "b"])["status"].tolist() == ["error"] * 2
    other = job("a1", instance_recall=0.7, **shown | {"dataset_fingerprint": "e" * 64})
    results.write_job(tmp_path / "e", "a1", "development", other)
    assert len(results.load_rows([tmp_path / "b", tmp_path / "e"])) == 4


def test_rows_of_several_directories_are_one_frame(tmp_path):
    results.write_job(tmp_path / "a", "a1", "development", job("a1", range(2)))
    results.write_job(tmp_path / "b", "a2", "development", job("a2", range(2, 4)))
    assert sorted(results.load_rows([tmp_path / "a", tmp_path / "b"])["trial"]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "schema lacks.*surprise"),
        ({"attack": None}, "not be null.*attack"),
        ({"status": "fine"}, "status: expected"),
        ({"psnr": "high"}, "does not fit"),
        ({"job_id": "other"}, "another job"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        results.write_job(tmp_path, "ab12", "development", [row() | change])
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_missing_column_is_refused(tmp_path):
    short = row()
    del short["psnr"]
    with pytest.raises(ValueError, match=r"lacks columns.*psnr"):
        results.write_job(tmp_path, "ab12", "development", [short])


def test_rows_of_another_schema_version_are_named(tmp_path):
    old_file(tmp_path)
    for read in (results.load_rows, lambda out: results.completed_jobs(out, "development")):
        with pytest.raises(UserError, match=f"expected {results.SCHEMA_VERSION}, got 0; use another --out"):
            read(tmp_path)


def test_a_missing_or_empty_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="no directory"):
        results.load_rows(tmp_path / "absent")
    with pytest.raises(UserError, match="no result rows"):
        results.load_rows(tmp_path)


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for attempt in (
        lambda out: results.prepare_out(out),
        lambda out: results.write_job(out, "ab12", "development", job()),
    ):
        with pytest.raises(UserError, match=r"--out .*use another --out") as error:
            attempt(tmp_path / "file" / "out")
        assert "\n" not in str(error.value)


def test_every_part_of_a_task_is_a_column():
    columns = results.task_columns(TASK)
    assert set(columns) <= {f.name for f in results.ROW_FIELDS}
    assert set(Protocol.model_fields) <= set(columns)
    threat = ThreatModel().content()
    assert sum(name.startswith(("knows_", "may_")) for name in columns) == sum(type(v) is bool for v in threat.values())


def test_every_column_and_metric_is_documented():
    names = [f.name for f in results.ROW_FIELDS]
    assert len(names) == len(set(names))
    assert all(f.doc for f in results.ROW_FIELDS)
    assert all(name in names and spec.reference in names for name, spec in METRICS.items())
    table = results.schema_markdown().splitlines()
    assert len(table) == len(names) + 2
    assert all(line.replace(r"\|", "").count("|") == 5 for line in table)


def test_the_schema_changes_only_on_purpose():
    golden = Path(__file__).parent / "test_results_schema.txt"
    types = [f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in results.ROW_FIELDS]
    lines = [f"schema version {results.SCHEMA_VERSION}", *types]
    assert lines == golden.read_text().splitlines(), "raise SCHEMA_VERSION and write the new columns to the golden file"


def test_the_store_does_not_import_torch():
    code = "import sys, leakbench.results; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})

"""Compacted rows: nothing is lost, every command reads them as it reads the run, and forgeries show as before."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

import leakbench.tasks as tasks
from leakbench import evaluate
from leakbench.board.origins import origins
from leakbench.compact import compact
from leakbench.errors import UserError
from leakbench.gallery import FOLDER as PICTURES
from leakbench.gallery import read_gallery
from leakbench.results import completed_jobs, load_rows
from leakbench.store import COMPACTED, JOBS, job_files, read_compacted, result_folders, unreadable, write_parquet
from leakbench.submitting.drift import drift
from leakbench.submitting.rerun import find_job
from leakbench.submitting.verify import verify

pytestmark = pytest.mark.usefixtures("one_cache")

TASK = tasks.Task(
    dataset="digits",
    architecture=tasks.Architecture(name="mlp"),
    batch=tasks.BatchSpec(size=1),
    target="inputs",
    threat_model=tasks.ThreatModel(labels=True),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_cache):
    """Rows of two attacks and of a defense, with pictures."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    evaluate("analytic", TASK, trials=3, isolation="none", out=out)
    evaluate("random_image", TASK, trials=3, isolation="none", out=out)
    evaluate("analytic", TASK, "topk(p=0.5)", trials=3, isolation="none", out=out)
    (out / "plan.json").write_text(json.dumps({"command": "leakbench run tiny"}))
    return out


@pytest.fixture(scope="module")
def compacted(run, tmp_path_factory):
    """The same, compacted."""
    return compact([run], tmp_path_factory.mktemp("results") / "tiny").out


def rewrite(path, change, **footer):
    """Write a compacted file again with other columns or another footer."""
    table = pq.read_table(path)
    notes = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    pq.write_table(change(table).replace_schema_metadata(notes | footer), path)


def test_rows_are_those_of_the_run_and_its_pictures_too(run, compacted):
    ours, theirs = (load_rows(f).sort_values(["job_id", "trial"], ignore_index=True) for f in (compacted, run))
    pd.testing.assert_frame_equal(ours, theirs)
    assert len(ours) == 9
    cells = [read_gallery(folder) for folder in (compacted, run)]
    assert cells[0] == cells[1] != []
    footers = [{job.job_id: job.footer for job in job_files(folder)} for folder in (compacted, run)]
    assert footers[0] == footers[1]
    assert [path.name for path in compacted.rglob("*") if path.is_file()] == [COMPACTED, "pictures.parquet"]


def test_boards_are_those_of_the_run_also_through_the_folder_above(run, compacted, leakbench):
    told = [leakbench("board", folder, "--json") for folder in (run, compacted, compacted.parent)]
    assert told[0][0] == 0
    assert told[0] == told[1] == told[2]


def test_verify_checks_every_job_of_a_compacted_file(compacted, tmp_path):
    assert verify([compacted]).problems == []
    assert verify([compacted]).rows == 9
    copy = shutil.copytree(compacted, tmp_path / "tiny")

    def forged(table):
        at = table.column_names.index("psnr")
        values = [*table["psnr"].to_pylist()[:-1], 99.0]
        return table.set_column(at, table.schema.field(at), pa.array(values, type=pa.float64()))

    rewrite(copy / COMPACTED, forged)
    (problem,) = verify([copy]).problems
    assert "the rows are not those that were written" in problem.text
    last = read_compacted(copy / COMPACTED)[-1].job_id
    assert problem.where.endswith(f"job {last[:12]}")


def test_a_job_twice_and_rows_that_do_not_add_up_are_refused(compacted, tmp_path):
    assert any(p.text.startswith("duplicate") for p in verify([compacted, compacted]).problems)
    notes = json.loads(pq.read_metadata(compacted / COMPACTED).metadata[JOBS.encode()])
    copy = shutil.copytree(compacted, tmp_path / "tiny")
    rewrite(copy / COMPACTED, lambda table: table.slice(1))
    assert ["no whole result file" in p.text for p in verify([copy]).problems] == [True]
    rewrite(copy / COMPACTED, lambda table: table, **{JOBS: json.dumps(notes[1:])})
    assert read_compacted(copy / COMPACTED) is None
    swapped = shutil.copytree(compacted, tmp_path / "swapped")
    rewrite(swapped / COMPACTED, lambda table: table, **{JOBS: json.dumps(notes[::-1])})
    assert all("whose place is another" in p.text or "are not those" in p.text for p in verify([swapped]).problems)
    assert verify([swapped]).problems


def test_a_row_is_found_by_its_id_and_runs_are_not_resumed_there(run, compacted):
    for job in job_files(run):
        rows = find_job(f"{job.job_id[:12]}:2", [compacted.parent])
        assert {row["job_id"] for row in rows} == {job.job_id}
        assert len(rows) == 3
    assert completed_jobs(compacted, "development") == {}


def test_old_rows_beside_it_do_not_hide_a_row(run, compacted, tmp_path):
    job = next(job_files(run))
    old = tmp_path / "old" / "development" / job.job_id[:2] / f"{'0' * 64}.parquet"
    old.parent.mkdir(parents=True)
    table = pq.read_table(job.path)
    notes = job.footer | {"leakbench.schema_version": "1", "leakbench.job_id": "0" * 64}
    pq.write_table(table.replace_schema_metadata(notes), old)
    assert len(find_job(job.job_id, [tmp_path, compacted])) == 3
    with pytest.raises(UserError, match="of schema version 1, this leakbench has"):
        find_job("0" * 64, [tmp_path, compacted])


def test_shards_become_one_and_rows_that_would_be_lost_are_kept(run, compacted, tmp_path):
    paths = [job.path for job in job_files(run)]
    for number, path in enumerate(paths[:2]):
        place = tmp_path / f"shard{number}" / path.relative_to(run)
        place.parent.mkdir(parents=True)
        shutil.copyfile(path, place)
    out = tmp_path / "both"
    assert compact([tmp_path / "shard0", tmp_path / "shard1"], out).jobs == {"attacks": 2}
    with pytest.raises(UserError, match=r"1 jobs that are in none of the runs; to keep those, name .*both"):
        compact([tmp_path / "shard0"], out)
    assert compact([run], out).jobs == {"attacks": 3}
    compact([out, tmp_path / "shard0"], out)
    pd.testing.assert_frame_equal(
        *(load_rows(f).sort_values(["job_id", "trial"], ignore_index=True) for f in (out, compacted))
    )


def test_other_rows_of_the_same_job_are_not_chosen_from(run, compacted, tmp_path):
    other = shutil.copytree(compacted, tmp_path / "other")
    (note, *rest) = json.loads(pq.read_metadata(other / COMPACTED).metadata[JOBS.encode()])
    rewrite(other / COMPACTED, lambda t: t, **{JOBS: json.dumps([note | {"leakbench.rows_sha256": "a" * 64}, *rest])})
    with pytest.raises(
        UserError, match=rf"job {note['leakbench.job_id'][:12]}\.\.\.: expected the same rows in .*other"
    ):
        compact([run, other], tmp_path / "both")
    assert not list((tmp_path / "both").iterdir())


def test_compacted_folders_become_one_with_the_pictures_of_all(run, compacted, tmp_path):
    of = {job.job_id: job.path for job in job_files(run)}
    shown = pq.read_table(compacted / PICTURES / "pictures.parquet").to_pylist()
    assert len({line["job_id"] for line in shown}) == 3
    halves = []
    for number, ids in enumerate((list(of)[:1], list(of)[1:])):
        for path in (path for name in ids for path in (of[name], run / PICTURES / f"{name}.parquet")):
            place = tmp_path / f"run{number}" / path.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        halves.append(compact([tmp_path / f"run{number}"], tmp_path / f"half{number}").out)
    both = compact(halves, tmp_path / "both").out
    assert pq.read_table(both / PICTURES / "pictures.parquet").to_pylist() == shown
    for half, text in zip(halves, ("a", "b"), strict=True):
        (half / "claims.md").write_text(text)
    with pytest.raises(UserError, match=r"claims\.md with other content"):
        compact(halves, tmp_path / "more")
    (halves[0] / "claims.md").write_text("b")
    compact(halves, both)
    assert (both / "claims.md").read_text() == "b"
    other = halves[0] / PICTURES / "pictures.parquet"
    pq.write_table(pa.table({"job_id": ["a"]}), other)
    with pytest.raises(UserError, match="expected pictures as this leakbench writes them"):
        compact(halves, tmp_path / "more")
    other.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pictures cannot be read"):
        compact(halves, tmp_path / "more")
    assert not list((tmp_path / "more").iterdir())


def test_a_damaged_file_is_not_left_out_in_silence(run, compacted, tmp_path, leakbench):
    copy = shutil.copytree(run, tmp_path / "runs" / "tiny")
    path = next(job_files(copy)).path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"damaged files of rows \(1, first {path}\)"):
        compact([copy], tmp_path / "out")
    for command in ("board", "rows", "provenance"):
        code, out, err = leakbench(command, copy.parent)
        assert (code, err) == (0, f"warning: 1 damaged file of rows left out, first {path}\n")
        assert out
    cut = tmp_path / "cut" / COMPACTED
    cut.parent.mkdir()
    cut.write_bytes((compacted / COMPACTED).read_bytes()[:-100])
    assert f"1 damaged file of rows left out, first {cut}" in leakbench("board", run, cut.parent)[2]
    with pytest.raises(UserError, match="damaged files of rows"):
        compact([run], cut.parent)
    assert unreadable(run) == unreadable(compacted) == []


def test_one_process_at_a_time_writes_a_folder(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def write(table, path):
        monkeypatch.undo()
        with pytest.raises(UserError, match="another leakbench compact writes there"):
            compact([run], out)
        write_parquet(table, path)

    monkeypatch.setattr("leakbench.compact.write_parquet", write)
    assert compact([run], out).rows == {"attacks": 9}
    assert compact([run], out).rows == {"attacks": 9}


def test_a_run_below_a_run_is_read_by_all_commands_alike(compacted, run, tmp_path):
    first, *others = [job.path for job in job_files(run)]
    place = tmp_path / "nest" / "below" / first.relative_to(run)
    place.parent.mkdir(parents=True)
    shutil.copyfile(first, place)
    shutil.copytree(run / PICTURES, tmp_path / "nest" / "below" / PICTURES)
    for path in others:
        (tmp_path / "nest" / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / "nest" / path.relative_to(run))
    folders = result_folders([tmp_path / "nest"])
    assert folders == [tmp_path / "nest", tmp_path / "nest" / "below"]
    assert len(load_rows(folders)) == verify([tmp_path / "nest"]).rows == 9
    assert verify([tmp_path / "nest"]).problems == []


def test_what_holds_no_rows_is_refused(run, tmp_path):
    for folder in (tmp_path, tmp_path / "none", run.parent):
        with pytest.raises(UserError, match="expected the output directory of one run"):
            compact([folder], tmp_path / "out")
    assert result_folders([tmp_path, run.parent]) == [tmp_path, run]


def test_how_rows_were_made_is_told_of_runs_and_of_compacted_rows(run, compacted, leakbench, tmp_path):
    (line,) = origins([compacted.parent]).to_dict("records")
    assert (line["jobs"], line["rows"], line["failed"], line["commands"]) == (3, 9, 0, "leakbench run tiny")
    rows = load_rows(run)
    wanted = (rows["wall_seconds"] + rows["client_seconds"]).sum() / 60
    assert line["computing_minutes"] == pytest.approx(wanted)
    assert line["datasets"] == f"digits {rows['dataset_fingerprint'][0][:10]}"
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- leakbench provenance: begin -->\n<!-- leakbench provenance: end -->\nb\n")
    assert leakbench("provenance", compacted, "--into", path)[0] == 0
    assert "| tiny | attacks | 3 | 9 | 0 |" in path.read_text()
    assert leakbench("provenance", tmp_path / "none")[0] == 2


def test_drift_is_any_number_that_the_same_job_gave_otherwise(run, compacted, tmp_path, leakbench):
    code, out, _ = leakbench("drift", compacted, run)
    assert (code, out.splitlines()[-1].split(",")[0]) == (0, "3 jobs in both")
    copy = shutil.copytree(compacted, tmp_path / "tiny")

    def shifted(table):
        at = table.column_names.index("psnr")
        return table.set_column(at, table.schema.field(at), pa.compute.add(table["psnr"], 1e-9))

    rewrite(copy / COMPACTED, shifted)
    found = drift([run], [copy])
    assert {line.metric for _, line in found.off} == {"psnr"}
    assert len(found.off) == 9  # bit by bit: nothing about the machine differs

    def elsewhere(table):
        at = table.column_names.index("torch")
        return table.set_column(at, table.schema.field(at), pa.array(["0.0"] * len(table)))

    rewrite(copy / COMPACTED, elsewhere)
    assert drift([run], [copy]).off == []
    with pytest.raises(UserError, match="no folder"):
        drift([run], [tmp_path / "none"])

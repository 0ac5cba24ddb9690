"""`leakbench verify`, seals, reruns and badges, on rows of a real run and on forgeries of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import UTC, datetime

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forging import refused, rewrite

import leakbench.tasks as tasks
from leakbench import evaluate
from leakbench.errors import UserError
from leakbench.results import ROWS_SHA256, load_rows
from leakbench.schema import task_columns
from leakbench.store import job_files, result_folders
from leakbench.submitting.badges import Statement, Statements, badges, least, read_statements, sealed_jobs
from leakbench.submitting.identity import task_of, wrong_task_columns
from leakbench.submitting.plausible import ENTRIES, shared_labels, wrong_labels
from leakbench.submitting.rerun import compare, find_job, is_row_id, rerun
from leakbench.submitting.seal import NAMESPACE, SEAL, write_seal
from leakbench.submitting.verify import verify
from leakbench.suites import read_suite, suite_paths

pytestmark = pytest.mark.usefixtures("one_cache")

TASK = tasks.Task(
    dataset="digits",
    architecture=tasks.Architecture(name="mlp"),
    batch=tasks.BatchSpec(size=4, sampler="unbalanced"),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory, one_cache):
    """Rows of two attacks on one task, one of them against a chain of defenses."""
    out = tmp_path_factory.mktemp("results") / "rows"
    evaluate("llg", TASK, trials=3, isolation="none", out=out)
    evaluate("random_labels", TASK, "gaussian_noise+topk", trials=3, isolation="none", out=out)
    return out


@pytest.fixture
def copy(results, tmp_path):
    return shutil.copytree(results, tmp_path / "rows")


def job(folder, attack="llg"):
    """Return the file of an attack's rows."""
    (path,) = (p for p in folder.glob("*/*/*.parquet") if pq.read_table(p)["attack"][0].as_py() == attack)
    return path


def test_honest_rows_are_not_refused(results):
    found = verify([results])
    assert found.problems == []
    assert (found.files, found.rows) == (2, 6)
    assert any("no SHA256SUMS" in note.text for note in found.notes)


FORGED = [
    ({"instance_recall": 0.123}, False, "forged or damaged"),
    ({"instance_recall": 1.5}, True, "is no share"),
    ({"task_hash": "f" * 64}, True, "task_hash is ffffffffffff"),
    ({"batch_size": 8}, True, "but the task in its columns has"),
    ({"task": "mnist-lenet"}, True, "contradict the task"),
    ({"lane": None}, True, "lane contradict"),
    ({"attack_source_sha256": "a" * 64}, True, "job id"),
    ({"attack": "ilrg"}, True, "job id"),
    ({"attack_version": 9}, True, "job id"),
    ({"attack_params": '{"x":1}'}, True, "job id"),
    ({"threads": 8}, True, "job id"),
    ({"season_commitment": "b" * 64}, True, "another key"),
    ({"season": "spring"}, True, "season 'spring' with the commitment of another key"),
    ({"job_id": "c" * 64}, True, "whose place is another"),
    ({"max_label_count": 1}, True, "max_label_count of a victim"),
    ({"trial": 0}, True, "duplicate: trial 0 has 3 rows"),
    ({"status": "timeout"}, True, "with a value"),
    ({"instance_recall_chance": -5.0}, True, "instance_recall_chance = -5.0 is no share"),
    ({"instance_recall_chance": 0.0}, True, "instance_recall_chance of a task differs"),
    ({"l1_count_error": float("inf")}, True, "l1_count_error = inf is no number"),
    ({"l1_count_error": float("nan")}, True, "l1_count_error = nan is no number"),
    ({"wall_seconds": -5.0}, True, "wall_seconds = -5.0 is no number of at least 0"),
    ({"peak_memory_bytes": -1}, True, "peak_memory_bytes = -1"),
    ({"utc": datetime(2999, 1, 1, tzinfo=UTC)}, True, "utc: expected days from 2020-01-01"),
    ({"utc": 1 << 61}, False, "utc: expected days"),
    ({"utc": datetime(2019, 1, 1, tzinfo=UTC)}, True, "utc: expected days"),
    ({"attack_label": "</script>official record"}, True, "attack_label '</script>official record' is not that"),
    ({"defense_label": "topk"}, True, "defense_label 'topk' is not that"),
    ({"suite": "labels\nX"}, True, "suite: 'labels\\nX' is no line"),
    ({"host_kind": "a\u202eb"}, True, "host_kind: "),
    ({"inserted": "x" * 100_000}, True, "inserted: a text of 100,000 characters"),
    ({"benchmark_version": "0.1"}, True, "rows of another version: benchmark 0.1"),
]


@pytest.mark.parametrize(("values", "hash_again", "says"), FORGED, ids=[next(iter(f[0])) + f[2][:9] for f in FORGED])
def test_a_forged_row_is_refused_and_why_is_said(copy, values, hash_again, says):
    rewrite(job(copy), values, hash_again=hash_again)
    assert any(says in text for text in refused(copy)), refused(copy)


def test_rows_under_another_season_are_there_twice(copy):
    path = job(copy)
    other = copy / "spring" / path.parent.name / path.name
    other.parent.mkdir(parents=True)
    shutil.copy(path, other)
    rewrite(other, {"season": "spring"}, **{"leakbench.season": "spring"})
    assert any(text.startswith("duplicate: ") for text in refused(copy)), refused(copy)


def test_a_footer_that_does_not_say_what_its_rows_were_is_refused(copy):
    path = job(copy)
    table = pq.read_table(path)
    notes = {key: value for key, value in table.schema.metadata.items() if key != ROWS_SHA256.encode()}
    pq.write_table(table.replace_schema_metadata(notes), path)
    assert any(text.startswith("forged or damaged") for text in refused(copy)), refused(copy)


def test_labels_may_leave_out_parameters_but_have_no_others():
    def wrong(label, params, name="a+b"):
        return [*wrong_labels({"defense": name, "defense_label": label, "defense_params": json.dumps(params)})]

    chain = [{"x": 1, "y": "p, q=2)"}, {"z": 0.5}]
    for label in ("a+b", "a(x=1)+b(z=0.5)", "a(y='p, q=2)', x=1)+b", "a(y='p, q=2)')+b(z=0.5)"):
        assert wrong(label, chain) == []
    for label in ("a", "a+c", "a+b ", "a(x=2)+b", "a(x=1, x=1)+b", "a()+b", "a(x=1+b", "a(x=1)", "b+a", "a+b(z=0.50)"):
        assert len(wrong(label, chain)) == 1, label
    assert wrong("none", {}, "none") == []
    assert wrong("none", 5, "none") != []


def test_one_label_does_not_stand_for_two_sets_of_parameters():
    one = dict.fromkeys(ENTRIES, "x") | {"defense_source_sha256": None}
    rows = pd.DataFrame([one | {"_where": "a"}, one | {"_where": "b"}, one | {"attack": "y", "_where": "c"}])
    assert [*shared_labels(rows)] == []
    rows.loc[2, "attack_params"] = "{}"
    assert [*shared_labels(rows)] == []
    rows.loc[1, "defense_params"] = "{}"
    assert {where for where, text in shared_labels(rows) if "defense_label" in text} == {"a", "b", "c"}


def test_a_row_of_another_schema_is_refused(copy):
    rewrite(job(copy), {}, **{"leakbench.schema_version": "1"})
    assert any("rows of another version: schema 1" in text for text in refused(copy))


def test_a_job_that_is_there_twice_is_refused(copy, results):
    shutil.copytree(copy, copy / "again", ignore=shutil.ignore_patterns("again"))
    assert any(text.startswith("duplicate: ") for text in refused(copy))
    assert any(problem.text.startswith("duplicate: ") for problem in verify([copy, results]).problems)


def test_a_cut_file_and_one_of_another_tool_are_refused(copy):
    path = job(copy)
    pq.read_table(path).to_pandas().to_parquet(job(copy, "random_labels"))
    path.write_bytes(path.read_bytes()[:-100])
    assert sum("no whole result file" in text for text in refused(copy)) == 2


def test_an_added_column_or_a_missing_one_is_refused(copy):
    path = job(copy)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["lr"]).append_column("mine", pa.array([1] * len(table))), path)
    texts = refused(copy)
    assert "lacks the column 'lr'" in texts
    assert "has the unknown column 'mine'" in texts


def test_a_seal_tells_a_changed_a_missing_and_an_added_file(copy, leakbench):
    assert leakbench("verify", copy, "--seal")[0] == 0
    sealed = {line.split("  ")[1] for line in (copy / SEAL).read_text().splitlines()}
    assert sealed == {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} - {SEAL}
    assert len(sealed) == 2
    assert str(copy) in verify([copy]).sealed
    # The rows of a careful forger agree with themselves, so that only the seal can tell.
    rewrite(job(copy), {"instance_recall": 0.25, "instance_precision": 0.25})
    other = job(copy, "random_labels")
    other.rename(other.with_name("more.parquet"))
    code, out, _ = leakbench("verify", copy)
    assert code == 1
    assert "is not the file that was sealed" in out
    assert "it was taken away" in out
    assert "it was added after sealing" in out


def test_a_seal_covers_reports_and_pictures(copy):
    write_seal(copy)
    (copy / "claims.json").write_text("{}")
    assert any("added after sealing" in text for text in refused(copy))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with the private keys ``ours`` and ``theirs``, and the file ``signers`` of the former."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "signers").write_text("scorer@example.org " + (folder / "ours.pub").read_text())
    return folder


def sign(folder, key):
    (folder / f"{SEAL}.sig").unlink(missing_ok=True)
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", NAMESPACE, folder / SEAL]
    subprocess.run(command, check=True, capture_output=True)


def test_a_signature_tells_who_sealed(copy, keys):
    write_seal(copy)
    signers = keys / "signers"
    sign(copy, keys / "ours")
    assert verify([copy], signers=signers).sealed == {str(copy): "scorer@example.org"}
    sign(copy, keys / "theirs")
    assert any("no signature by" in text for text in refused(copy, signers=signers))
    sign(copy, keys / "ours")
    (copy / SEAL).write_text((copy / SEAL).read_text() + "\n")
    assert any("is not scorer@example.org's signature" in text for text in refused(copy, signers=signers))


def test_every_task_of_every_suite_is_found_again_from_its_columns():
    known = {h: task for path in suite_paths().values() for h, task in read_suite(path).tasks().items()}
    assert len(known) > 100
    for task in known.values():
        row = task_columns(task)
        assert task_of(row) == task
        assert wrong_task_columns(row, task) == []


def test_a_row_runs_again_bit_by_bit_and_a_changed_one_does_not(copy):
    path = job(copy)
    row_id = f"{path.stem[:12]}:1"
    found = rerun(row_id, [copy], isolation="none")
    assert found.agrees
    assert found.differs == []
    assert {line.trial for line in found.lines} == {1}
    assert any(line.metric == "instance_recall" and line.tolerance == 0 for line in found.lines)
    now = find_job(row_id, [copy])
    rewrite(path, {"instance_recall": 0.123})
    then = find_job(row_id, [copy])
    again = compare(row_id, "job", then, now, 1)
    assert [line.metric for line in again.lines if not line.agrees] == ["instance_recall"]


def test_another_machine_has_a_tolerance_and_it_ends(results):
    rows = find_job(job(results).stem, [results])

    def moved(by, **columns):
        return [row | columns | {"instance_recall": row["instance_recall"] + by} for row in rows]

    near, far = moved(5e-7, torch="0.0"), moved(2e-4, torch="0.0")
    assert compare("a", "job", rows, near).agrees
    assert not compare("a", "job", rows, far).agrees
    assert not compare("a", "job", rows, moved(5e-7)).agrees


def test_a_row_whose_entry_has_changed_is_not_run_as_if_it_had_not(copy):
    rewrite(job(copy), {"attack_source_sha256": "a" * 64, "job_id": "c" * 64})
    with pytest.raises(UserError, match="the code of attack llg has changed since"):
        rerun(job(copy).stem, [copy], isolation="none")


def test_row_ids_are_told_from_papers():
    assert all(map(is_row_id, ("3fa9c2d1", "3fa9c2d1:17", "a" * 64)))
    assert not any(map(is_row_id, ("ilrg", "dlm", "3fa9")))
    for text in ("3fa9c2d1:", "deadbeef:x", "3fa9c2d1:9999999999"):  # meant as one, and not right
        assert is_row_id(text)
        with pytest.raises(UserError, match="expected JOB or JOB:TRIAL"):
            find_job(text, [])


def test_badges_follow_from_rows_seals_and_statements(results):
    rows = load_rows(results)
    every = set(rows["job_id"])
    assert set(badges(rows, sealed=every)) == {"claimed"}  # the key of the development season is public
    named = rows.assign(season="spring", isolation="bwrap", git_dirty=False)
    assert set(badges(named, sealed=every)) == {"claimed"}  # the public key by another name
    official = named.assign(season_commitment="b" * 64)
    assert set(badges(official, sealed=set())) == {"claimed"}
    assert set(badges(official, sealed=every)) == {"rerun"}
    elsewhere = official.assign(host_kind="another")
    assert set(badges(official, sealed=every, again=official)) == {"rerun"}
    assert set(badges(official, sealed=every, again=elsewhere)) == {"reproduced"}
    other = elsewhere.assign(instance_recall=elsewhere["instance_recall"] + 0.01)
    assert set(badges(official, sealed=every, again=other)) == {"rerun"}
    version = int(rows.loc[rows["attack"] == "llg", "attack_version"].iloc[0])
    said = Statement(kind="attack", name="llg", version=version, by="its author", link="https://example.org/1")
    of = official["attack"]
    found = badges(official, sealed=every, statements=Statements(confirmed=[said]))
    assert found.groupby(of).unique().map(list).to_dict() == {"llg": ["confirmed"], "random_labels": ["rerun"]}
    chain = Statement(kind="defense", name="topk", version=2, by="a reader", link="https://example.org/2")
    found = badges(official, sealed=every, statements=Statements(disputed=[chain]))
    assert found.groupby(of).unique().map(list).to_dict() == {"llg": ["rerun"], "random_labels": ["rerun disputed"]}
    settled = Statements(disputed=[chain.model_copy(update={"settled": True})])
    assert set(badges(official, sealed=every, statements=settled)) == {"rerun"}


def test_only_jobs_under_a_signed_seal_that_holds_count_as_sealed(copy, tmp_path, keys):
    every = set(load_rows(copy)["job_id"])
    signers = keys / "signers"
    assert sealed_jobs([copy], signers) == set()
    write_seal(copy)
    assert sealed_jobs([copy], signers) == set()  # anybody can seal
    sign(copy, keys / "theirs")
    assert sealed_jobs([copy], signers) == set()
    sign(copy, keys / "ours")
    assert sealed_jobs([copy], signers) == every
    assert sealed_jobs([copy]) == set()  # in no checkout that says who may sign
    loose = shutil.copytree(copy, tmp_path / "loose" / "rows")
    (loose / SEAL).unlink()
    assert sealed_jobs([copy, loose], signers) == set()  # which of the two would be shown?
    rewrite(job(copy), {"instance_recall": 0.25})
    assert sealed_jobs([copy], signers) == set()
    with pytest.raises(UserError, match="expected a file of allowed signers"):
        sealed_jobs([copy], tmp_path / "none")


def test_signers_are_those_of_the_checkout_not_of_a_folder_of_rows(copy, keys):
    every = set(load_rows(copy)["job_id"])
    for place in (copy, copy.parent):
        (place / ".github").mkdir()
    shutil.copy(keys / "signers", copy / ".github" / "allowed_signers")
    write_seal(copy)
    sign(copy, keys / "ours")
    (copy.parent / ".git").mkdir()
    assert sealed_jobs([copy]) == set()
    shutil.copy(keys / "signers", copy.parent / ".github" / "allowed_signers")
    assert sealed_jobs([copy]) == every


def test_hidden_rows_are_nobodys_and_no_seal_covers_them(copy, results, keys):
    hidden = copy / ".more"
    shutil.copytree(results, hidden)
    shutil.move(hidden / "development", copy / ".development")
    shutil.copytree(results / "development", hidden / "development")
    assert result_folders([copy]) == [copy]
    assert {path.path.parents[1].name for path in job_files(copy)} == {"development"}
    write_seal(copy)
    sign(copy, keys / "ours")
    assert sealed_jobs([hidden], keys / "signers") == set()
    assert sealed_jobs([copy], keys / "signers") == set(load_rows(copy)["job_id"])


def test_cells_have_the_least_badge_of_their_rows():
    assert least(["rerun", "reproduced"]) == "rerun"
    assert least(["claimed", "rerun disputed"]) == "claimed disputed"
    assert least(["confirmed"]) == "confirmed"


def test_statements_are_read_beside_rows_and_above_them(tmp_path):
    said = "- {kind: attack, name: llg, version: 1, by: me, link: https://example.org/1}\n"
    (tmp_path / "quick").mkdir()
    (tmp_path / "statements.yaml").write_text(f"confirmed:\n{said}")
    (tmp_path / "quick" / "statements.yaml").write_text(f"disputed:\n{said}")
    found = read_statements([tmp_path / "quick"])
    assert (len(found.confirmed), len(found.disputed)) == (1, 1)
    (tmp_path / "statements.yaml").write_text("confirmed: [{kind: attack, link: 'javascript:alert(1)'}]\n")
    with pytest.raises(UserError, match=r"statements.yaml: confirmed.0"):
        read_statements([tmp_path / "quick"])

"""`leakbench verify`: whether rows are whole, of this version, what their hashes say, and there once. No torch here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from leakbench.errors import UserError
from leakbench.keys import DEVELOPMENT
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.metrics import METRICS
from leakbench.provenance import code_sha256
from leakbench.schema import BENCHMARK_VERSION, ROW_FIELDS, SCHEMA_VERSION, STATUSES, Field, arrow_schema
from leakbench.store import (
    COMPACTED,
    MEASURES_FOLDER,
    UTILITY_FOLDER,
    JobFile,
    job_path,
    read_compacted,
    read_job_status,
    read_jobs,
    rows_sha256,
    stores,
)
from leakbench.submitting.across import COLUMNS, contradictions, remarks
from leakbench.submitting.identity import (
    TASK_COLUMNS,
    Doubt,
    class_names,
    doubt,
    task_of,
    wrong_task_columns,
)
from leakbench.submitting.known import unknown, wrong_names
from leakbench.submitting.plausible import ENTRIES, impossible, shared_labels, wrong_days
from leakbench.submitting.seal import SEAL, SIGNATURE, broken_seal, signer_of
from leakbench.submitting.trainings import AtHand, KeptUpdates, explains_training, job_doubt, wrong_training_values
from leakbench.utility.rows import UTILITY_FIELDS

MOST_BYTES = 64 << 20
"""Greatest file of one job, or of the jobs of a run; one of 64 trials has 100 KB, 40,000 compacted rows some 10 MB."""

_PER_ROW = frozenset(
    {"trial", "draw", "checkpoint_sha256", "distinct_labels", "max_label_count", "identification_gallery", "notes"}
)
"""Columns in front of the outcome that differ within a job."""
_VICTIM = ("season_commitment", "task_hash", "dataset_fingerprint", "trial")
_TRUTH = ("distinct_labels", "max_label_count", "inference_truth")
"""What is a property of the victim, whoever attacks it."""
_FLOORS = tuple(s.reference for s in METRICS.values() if s.target == "inputs")
_GUESS = ("season_commitment", "task_hash", "dataset_fingerprint", "_each")
_CHANCES = tuple(s.reference for s in METRICS.values() if s.target == "labels")
"""What is a property of the task, and of whether counts are claimed client by client."""

_DOUBTS = {
    "file": "does not follow from the columns: a column was changed, or an entry was given by a file that is not at "
    "hand; name it with --entry FILE:CLASS",
    "forged": "does not follow from the columns: one of them was changed (entry, parameters, hash, block, budget)",
}
_NOTED = {
    "labels": "job id not recomputed: the label attack that runs inside has other code now",
    "kept": "job id not recomputed: it covers updates that were kept during training, which are not at hand; name the "
    "folder of leakbench utility, too",
    "budget": "job id not recomputed: the budget of the suite is not a column of these rows",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or row, or worth knowing.

    Args:
        where: File, and row where it is one.
        text: One line.
    """

    where: str
    text: str


@dataclass
class Verified:
    """What `verify` found.

    Args:
        problems: Reasons to refuse.
        notes: What was not checked, or is of another code.
        files: Files read.
        rows: Rows read.
        sealed: Folders with a seal that holds, and who signed it (None: not checked).
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    files: int = 0
    rows: int = 0
    sealed: dict[str, str | None] = field(default_factory=dict)


def verify(
    folders: Sequence[Path], *, entries: Sequence[str] = (), signers: Path | None = None, seals: bool = True
) -> Verified:
    """Check every row under folders of results.

    Args:
        folders: Output directories of `leakbench run`, or folders of them.
        entries: ``FILE`` or ``FILE:CLASS`` of entries that were given by path.
        signers: Allowed signers; None: signatures are not checked.
        seals: Whether seals are looked at; not where a new one is to be written.

    Raises:
        UserError: A folder is missing or holds no rows, or an entry cannot be described.
    """
    found = Verified()
    hand = AtHand(class_names(entries), KeptUpdates(folders))
    parts: list[pd.DataFrame] = []
    seen: dict[tuple[str, str, str], str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no directory {folder}: expected results; make some with: leakbench run quick")
        there = stores(folder)
        if not there:
            raise UserError(f"no rows under {folder}; make some with: leakbench run quick --out {folder}")
        for store in there:
            for path in _files(store, there):
                _file(path, store, found, hand, seen, parts)
        if seals:
            _check_seals(folder, found, signers)
    found.problems += [Problem(*text) for text in hand.declared.wrong()]
    if parts:
        _check_across(pd.concat(parts, ignore_index=True), found)
    return found


def _files(store: Path, there: Sequence[Path]) -> list[Path]:
    """Return the files of a folder's jobs, without those of the measures, trainings and other runs below it."""
    below = (store / MEASURES_FOLDER, store / UTILITY_FOLDER, *(s for s in there if store in s.parents))
    found = sorted(path for path in store.glob("*/*/[!.]*.parquet") if not any(map(path.is_relative_to, below)))
    return [*found, *([store / COMPACTED] if (store / COMPACTED).is_file() else [])]


def _file(
    path: Path,
    store: Path,
    found: Verified,
    hand: AtHand,
    seen: dict[tuple[str, str, str], str],
    parts: list[pd.DataFrame],
) -> None:
    """Check one file, and keep what is compared with other files."""
    found.files += 1
    jobs = None
    if path.stat().st_size <= MOST_BYTES and not path.is_symlink():
        compacted = path.name == COMPACTED and path.parent == store
        single = None if compacted else read_job_status(path)
        jobs = read_compacted(path) if compacted else None if single is None else [single]
    if jobs is None:
        text = "is no whole result file: cut off, damaged, or written by another tool"
        found.problems.append(Problem(str(path), text))
        return
    versions = {job.schema_version for job in jobs} - {SCHEMA_VERSION}
    if versions:
        text = f"rows of another version: schema {min(versions)}, this leakbench has {SCHEMA_VERSION}; run again"
        found.problems.append(Problem(str(path), text))
        return
    try:
        for job, table in read_jobs(jobs):
            _rows(job, table, store, found, hand, seen, parts)
    except (OSError, pa.ArrowException) as error:
        found.problems.append(Problem(str(path), f"cannot be read: {' '.join(str(error).split())[:200]}"))


def _rows(
    job: JobFile,
    table: pa.Table,
    store: Path,
    found: Verified,
    hand: AtHand,
    seen: dict[tuple[str, str, str], str],
    parts: list[pd.DataFrame],
) -> None:
    """Check the rows of one job, and keep what is compared with other jobs."""
    where = str(job.path)
    if job.path.name == COMPACTED:
        where += f" job {job.job_id[:12]}"
    fields = {MEASURES_FOLDER: MEASURE_FIELDS, UTILITY_FOLDER: UTILITY_FIELDS}.get(store.name, ROW_FIELDS)
    problems = [*_schema(table, fields)] or [*wrong_days(table)]
    if not problems:
        rows = table.to_pylist()
        found.rows += len(rows)
        problems = [*_job(job, store, table, rows), *impossible(table, rows)]
        if not any("another version" in text for text in problems):
            problems += _identity(rows, hand, found, where, fields)
        key = (store.name if fields is not ROW_FIELDS else "", rows[0]["season_commitment"], job.job_id)
        if key in seen:
            problems.append(f"duplicate: the rows of this job are in {seen[key]}, too")
        seen.setdefault(key, where)
        if fields is ROW_FIELDS and not problems:
            names = [*_VICTIM, *_TRUTH, *_FLOORS, *_CHANCES, "num_classes", "isolation", "git_dirty"]
            names = list(dict.fromkeys([*names, *ENTRIES, "clients", "attributed", *COLUMNS]))
            parts.append(table.select(names).to_pandas().assign(_where=where))
    found.problems += [Problem(where, text) for text in problems]


def _schema(table: pa.Table, fields: Sequence[Field]) -> Iterator[str]:
    expected = arrow_schema(fields)
    for name in [f.name for f in fields if f.name not in table.column_names][:5]:
        yield f"lacks the column {name!r}"
    for name in [name for name in table.column_names if name not in expected.names][:5]:
        yield f"has the unknown column {name!r}"
    for f in fields:
        if f.name in table.column_names:
            column = table.column(f.name)
            if column.type != f.type:
                yield f"column {f.name!r}: expected {f.type}, got {column.type}"
            elif column.null_count and not f.nullable:
                yield f"column {f.name!r}: holds nulls, which it may not"
    if not table.num_rows:
        yield "holds no rows"


def _job(job: JobFile, store: Path, table: pa.Table, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with the rows of one job as such."""
    first = rows[0]
    versions = set(table.column("benchmark_version").to_pylist()) - {BENCHMARK_VERSION}
    if versions:
        yield f"rows of another version: benchmark {min(versions)}, this leakbench has {BENCHMARK_VERSION}; run again"
        return
    if job.rows_sha256 != rows_sha256(table):
        yield "forged or damaged: the rows are not those that were written (rows_sha256 of the file's footer differs)"
    measured = "measure" in first or "attack" not in first
    names = [f.name for f in (ROW_FIELDS if not measured else ()) if f.name not in _PER_ROW]
    outcome = names[names.index("status") :] if names else []
    provenance = ("code_sha256", "benchmark_version", "isolation", "host_kind", "device", "torch", "threads")
    for name in [n for n in names if n not in outcome] + list(provenance):
        if name in table.column_names and len(table.column(name).unique()) > 1:
            yield f"rows of one job differ in {name!r}"
    place = store / COMPACTED, job_path(store, first["job_id"], first["season"])
    if (first["job_id"], first["season"]) != (job.job_id, job.season) or job.path not in place:
        yield f"holds the rows of job {first['job_id'][:12]}... of season {first['season']!r}, whose place is another"
    if (first["season"] == DEVELOPMENT.name) != (first["season_commitment"] == DEVELOPMENT.commitment):
        yield f"season {first['season']!r} with the commitment of another key: the public one is 'development'"
    if measured:
        if "measure" not in first:
            yield from wrong_training_values(first)
        return
    trials, wanted = [row["trial"] for row in rows], list(range(first["block_start"], first["block_stop"]))
    if twice := [trial for trial, count in Counter(trials).items() if count > 1]:
        yield f"duplicate: trial {twice[0]} has {trials.count(twice[0])} rows"
    elif trials != wanted:
        yield f"expected one row for each of the trials {first['block_start']} to {first['block_stop'] - 1}, in order"
    if job.statuses != Counter(row["status"] for row in rows):
        yield "the statuses of its rows are not those of its footer"
    for row in rows:
        yield from (f"trial {row['trial']}: {text}" for text in _values(row))


def _values(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values of a row that none can have."""
    if row["status"] not in STATUSES:
        yield f"unknown status {row['status']!r}"
    measured = [name for name in METRICS if row[name] is not None]
    if row["status"] != "ok" and any(METRICS[name].target != "stealth" for name in measured):
        yield f"status {row['status']!r} with a value of {measured[0]}"
    if row["status"] == "ok" and row["error"] is not None:
        yield "status 'ok' with an error"


def _identity(
    rows: Sequence[Mapping[str, Any]], hand: AtHand, found: Verified, where: str, fields: Sequence[Field]
) -> Iterator[str]:
    """Yield what the hashes of a job's rows contradict; what cannot be told is noted."""
    row = rows[0]
    if row["code_sha256"] != code_sha256():
        found.notes.append(Problem(where, "made by other code of leakbench than this (code_sha256)"))
    reason: Doubt | None = None
    try:
        if fields is UTILITY_FIELDS:
            reason = None if explains_training(row, hand.classes) else doubt(row)
        else:
            task = task_of(row)
            shown = [name for name in wrong_task_columns(row, task) if name in TASK_COLUMNS]
            if shown:
                yield f"forged: {', '.join(shown)} contradict the task in the other columns"
            reason = job_doubt(rows, hand)
    except (ValueError, TypeError, KeyError) as error:
        yield f"forged: {error}"
        return
    if reason in _NOTED:
        found.notes.append(Problem(where, _NOTED[reason]))
    elif reason is not None:
        yield f"forged or unknown: job id {row['job_id'][:12]}... {_DOUBTS[reason]}"
    yield from wrong_names(row)
    hand.declared.add(where, row)
    found.notes += [Problem(where, text) for text in unknown(row, hand.classes)]


def _check_across(rows: pd.DataFrame, found: Verified) -> None:
    """Compare what every attack must have been shown alike."""
    found.problems += [Problem(*text) for text in contradictions(rows)]
    found.notes += [Problem(*text) for text in remarks(rows)]
    found.problems += [Problem(*text) for text in shared_labels(rows)]
    rows = rows.dropna(subset=["dataset_fingerprint"])
    rows = rows.assign(_each=(rows["attributed"] == True) & (rows["clients"] > 1))  # noqa: E712
    groups = rows.groupby(list(_VICTIM), sort=False)
    for name in _TRUTH:
        bad = groups[name].transform("nunique") > 1
        for where in rows.loc[bad, "_where"].drop_duplicates():
            found.problems.append(Problem(where, f"forged: {name} of a victim differs from that in other jobs"))
    tasks = rows.groupby(list(_GUESS), sort=False)
    for own, names, of in ((groups, _FLOORS, "victim"), (tasks, _CHANCES, "task")):
        for name in names:
            low, high = own[name].transform("min"), own[name].transform("max")
            bad = (high - low) > 1e-6 + 1e-3 * high.abs()
            for where in rows.loc[bad, "_where"].drop_duplicates():
                found.problems.append(Problem(where, f"forged: {name} of a {of} differs from that in other jobs"))
    for text, bad in (
        ("isolation 'none': for debugging, never published", rows["isolation"] == "none"),
        (
            "made from a checkout with uncommitted changes (git_dirty)",
            rows["git_dirty"].fillna(value=False).astype(bool),
        ),
    ):
        found.notes += [Problem(where, text) for where in rows.loc[bad, "_where"].drop_duplicates()]


def _check_seals(folder: Path, found: Verified, signers: Path | None) -> None:
    seals = sorted({folder / SEAL, *folder.rglob(SEAL)})
    for seal in seals:
        if not seal.is_file():
            text = f"no {SEAL}: nothing shows that numbers are as they were measured; write one with --seal"
            found.notes.append(Problem(str(folder), text))
            continue
        broken = [Problem(str(seal.parent / name), text) for name, text in broken_seal(seal.parent)]
        found.problems += broken
        signer = None
        if signers is not None:
            try:
                signer = signer_of(seal.parent, signers)
            except UserError as error:
                found.problems.append(Problem(str(seal), str(error)))
                continue
        elif (seal.parent / SIGNATURE).is_file():
            found.notes.append(Problem(str(seal), "is signed, but by whom was not checked; give --signers FILE"))
        if not broken:
            found.sealed[str(seal.parent)] = signer


def summary(found: Verified, most: int = 20) -> list[str]:
    """Return the report as lines: problems file by file, notes counted."""
    lines = [f"refused: {problem.where}: {problem.text}" for problem in found.problems[:most]]
    if len(found.problems) > most:
        lines.append(f"refused: and {len(found.problems) - most} problems more: --json")
    counts = Counter(note.text for note in found.notes)
    lines += [f"note: {text} ({count} {'file' if count == 1 else 'files'})" for text, count in counts.items()]
    for folder, signer in found.sealed.items():
        lines.append(f"sealed: {folder}{f', signed by {signer}' if signer else ''}")
    verdict = f"{len(found.problems)} problems" if found.problems else "nothing to refuse"
    lines.append(f"{found.files} files, {found.rows} rows: {verdict}")
    return lines


def content(found: Verified) -> dict[str, Any]:
    """Return the report as a JSON-able mapping."""
    plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda part: part.__dict__))
    return plain

"""`leakbench verify`: whether rows are whole, of this version, what their hashes say, and there once. No torch here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.errors import UserError
from leakbench.keys import DEVELOPMENT
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.metrics import METRICS
from leakbench.provenance import code_sha256
from leakbench.results import MEASURES_FOLDER, ROWS_SHA256, job_path, read_job_status, rows_sha256
from leakbench.schema import BENCHMARK_VERSION, ROW_FIELDS, SCHEMA_VERSION, STATUSES, Field, arrow_schema
from leakbench.sources import sources
from leakbench.submitting.identity import (
    TASK_COLUMNS,
    class_names,
    doubt,
    explains_job_id,
    task_of,
    wrong_task_columns,
)
from leakbench.submitting.seal import SEAL, SIGNATURE, broken_seal, signer_of
from leakbench.utility.rows import UTILITY_FIELDS

MOST_BYTES = 64 << 20
"""Greatest file of one job; those of 64 trials have 100 KB."""
UTILITY_FOLDER = "utility"

_PER_ROW = frozenset(
    {"trial", "draw", "checkpoint_sha256", "distinct_labels", "max_label_count", "identification_gallery", "notes"}
)
"""Columns in front of the outcome that differ within a job."""
_FRACTIONS = tuple(
    s.name for s in METRICS.values() if s.unit == "1" and s.higher_is_better and s.target in ("labels", "inference")
)
_VICTIM = ("season_commitment", "task_hash", "dataset_fingerprint", "trial")
_TRUTH = ("distinct_labels", "max_label_count", "inference_truth")
"""What is a property of the victim, whoever attacks it."""
_FLOORS = tuple(s.reference for s in METRICS.values() if s.target == "inputs")

_DOUBTS = {
    "file": "does not follow from the columns: a column was changed, or an entry was given by a file that is not at "
    "hand; name it with --entry FILE:CLASS",
    "forged": "does not follow from the columns: one of them was changed (entry, parameters, hash, block, budget)",
}
_NOTED = {
    "labels": "job id not recomputed: the label attack that runs inside has other code now",
    "kept": "job id not recomputed: it covers updates that were kept during training",
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
    classes = class_names(entries)
    parts: list[pd.DataFrame] = []
    seen: dict[tuple[str, str, str], str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no directory {folder}: expected results; make some with: leakbench run quick")
        stores = _stores(folder)
        if not stores:
            raise UserError(f"no rows under {folder}; make some with: leakbench run quick --out {folder}")
        for store in stores:
            for path in sorted(store.glob("*/*/[!.]*.parquet")):
                if path.is_relative_to(store / MEASURES_FOLDER) or path.is_relative_to(store / UTILITY_FOLDER):
                    continue
                _file(path, store, found, classes, seen, parts)
        if seals:
            _check_seals(folder, found, signers)
    if parts:
        _check_across(pd.concat(parts, ignore_index=True), found)
    return found


def _stores(folder: Path) -> list[Path]:
    """Return the folders with the layout SEASON/xx/JOB.parquet, the deepest of which are jobs'."""
    stores = {path.parents[2] for path in folder.rglob("*.parquet") if re.fullmatch(r"[0-9a-f]{2}", path.parent.name)}
    return sorted(stores)


def _file(
    path: Path,
    store: Path,
    found: Verified,
    classes: Mapping[str, str],
    seen: dict[tuple[str, str, str], str],
    parts: list[pd.DataFrame],
) -> None:
    """Check one file, and keep what is compared with other files."""
    found.files += 1
    where = str(path)
    status = read_job_status(path) if path.stat().st_size <= MOST_BYTES and not path.is_symlink() else None
    if status is None:
        found.problems.append(Problem(where, "is no whole result file: cut off, damaged, or written by another tool"))
        return
    if status.schema_version != SCHEMA_VERSION:
        text = (
            f"rows of another version: schema {status.schema_version}, this leakbench has {SCHEMA_VERSION}; run again"
        )
        found.problems.append(Problem(where, text))
        return
    fields = {MEASURES_FOLDER: MEASURE_FIELDS, UTILITY_FOLDER: UTILITY_FIELDS}.get(store.name, ROW_FIELDS)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        found.problems.append(Problem(where, f"cannot be read: {' '.join(str(error).split())[:200]}"))
        return
    problems = [*_schema(table, fields)]
    if not problems:
        rows = table.to_pylist()
        found.rows += len(rows)
        note = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        problems = [*_job(path, store, status.statuses, table, rows, note)]
        if not any("another version" in text for text in problems):
            problems += _identity(rows[0], classes, found, where, fields)
        key = (store.name if fields is not ROW_FIELDS else "", status.season, status.job_id)
        if key in seen:
            problems.append(f"duplicate: the rows of this job are in {seen[key]}, too")
        seen.setdefault(key, where)
        if fields is ROW_FIELDS and not problems:
            names = [*_VICTIM, *_TRUTH, *_FLOORS, "num_classes", "isolation", "git_dirty"]
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


def _job(
    path: Path,
    store: Path,
    statuses: Mapping[str, int],
    table: pa.Table,
    rows: Sequence[Mapping[str, Any]],
    note: Mapping[str, str],
) -> Iterator[str]:
    """Yield what is wrong with the rows of one job as such."""
    first = rows[0]
    versions = set(table.column("benchmark_version").to_pylist()) - {BENCHMARK_VERSION}
    if versions:
        yield f"rows of another version: benchmark {min(versions)}, this leakbench has {BENCHMARK_VERSION}; run again"
        return
    if ROWS_SHA256 in note and note[ROWS_SHA256] != rows_sha256(table):
        yield "forged or damaged: the rows are not those that were written (rows_sha256 of the file's footer differs)"
    measured = "measure" in first or "attack" not in first
    names = [f.name for f in (ROW_FIELDS if not measured else ()) if f.name not in _PER_ROW]
    outcome = names[names.index("status") :] if names else []
    provenance = ("code_sha256", "benchmark_version", "isolation", "host_kind", "device", "torch", "threads")
    for name in [n for n in names if n not in outcome] + list(provenance):
        if name in table.column_names and len(table.column(name).unique()) > 1:
            yield f"rows of one job differ in {name!r}"
    if path != job_path(store, first["job_id"], first["season"]):
        yield f"holds the rows of job {first['job_id'][:12]}... of season {first['season']!r}, whose place is another"
    if first["season"] == DEVELOPMENT.name and first["season_commitment"] != DEVELOPMENT.commitment:
        yield "season 'development' with the commitment of another key"
    if measured:
        return
    trials, wanted = [row["trial"] for row in rows], list(range(first["block_start"], first["block_stop"]))
    if twice := [trial for trial, count in Counter(trials).items() if count > 1]:
        yield f"duplicate: trial {twice[0]} has {trials.count(twice[0])} rows"
    elif trials != wanted:
        yield f"expected one row for each of the trials {first['block_start']} to {first['block_stop'] - 1}, in order"
    if statuses != Counter(row["status"] for row in rows):
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
    for name in _FRACTIONS:
        value = row[name]
        # Bits of a claim have no lower end.
        if value is not None and not (value <= 1 and (value >= 0 or name == "inference_bits")):
            yield f"{name} = {value} is no share"


def _identity(
    row: Mapping[str, Any], classes: Mapping[str, str], found: Verified, where: str, fields: Sequence[Field]
) -> Iterator[str]:
    """Yield what the hashes of a job's rows contradict; what cannot be told is noted."""
    if row["code_sha256"] != code_sha256():
        found.notes.append(Problem(where, "made by other code of leakbench than this (code_sha256)"))
    if fields is UTILITY_FIELDS:
        return
    try:
        task = task_of(row)
    except (ValueError, TypeError, KeyError) as error:
        yield f"forged: {error}"
        return
    shown = [name for name in wrong_task_columns(row, task) if name in TASK_COLUMNS]
    if shown:
        yield f"forged: {', '.join(shown)} contradict the task in the other columns"
    try:
        explained = explains_job_id(row, classes)
    except (ValueError, TypeError, KeyError):
        explained = False
    if not explained:
        reason = doubt(row)
        if reason in _NOTED:
            found.notes.append(Problem(where, _NOTED[reason]))
        else:
            yield f"forged or unknown: job id {row['job_id'][:12]}... {_DOUBTS[reason]}"
    for kind in ("attack", "defense") if fields is ROW_FIELDS else ("defense",):
        for text in _other_code(row, kind):
            found.notes.append(Problem(where, text))


def _other_code(row: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Yield which entries have other code here than when the row was made."""
    names = [] if row[kind] == "none" else row[kind].split("+")
    known = sources("attack" if kind == "attack" else "defense")
    for name, sha in zip(names, (row[f"{kind}_source_sha256"] or "").split("+"), strict=False):
        if name in known and sha and known.get(name).sha256 != sha:
            yield f"{kind} {name}: its source has changed since (source_sha256); the row is of the older one"


def _check_across(rows: pd.DataFrame, found: Verified) -> None:
    """Compare what every attack must have been shown alike."""
    rows = rows.dropna(subset=["dataset_fingerprint"])
    groups = rows.groupby(list(_VICTIM), sort=False)
    for name in _TRUTH:
        bad = groups[name].transform("nunique") > 1
        for where in rows.loc[bad, "_where"].drop_duplicates():
            found.problems.append(Problem(where, f"forged: {name} of a victim differs from that in other jobs"))
    for name in _FLOORS:
        low, high = groups[name].transform("min"), groups[name].transform("max")
        bad = (high - low) > 1e-6 + 1e-3 * high.abs()
        for where in rows.loc[bad, "_where"].drop_duplicates():
            found.problems.append(Problem(where, f"forged: {name} of a victim differs from that in other jobs"))
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

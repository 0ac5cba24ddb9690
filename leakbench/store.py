"""The Parquet store of rows: jobs, one file each, or compacted into one file. No torch here.

A job is one Parquet file, ``<out>/<season>/<first two digits of the job id>/<job id>.parquet``, with one row per
planned trial. It is written to a temporary name, flushed to disk and renamed, so a file under its final name is whole.
`leakbench compact` joins those of a folder into ``<out>/rows.parquet``, which is read as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.errors import UserError
from leakbench.schema import ROW_FIELDS, SCHEMA_VERSION, Field, arrow_schema, check_rows

COMPACTED = "rows.parquet"
"""Name of the one file of a folder's jobs after `leakbench compact`."""

JOBS = "leakbench.jobs"
"""Key in its footer: what the footers of the files of its jobs said, in the order of the rows."""

COMMANDS = "leakbench.commands"
"""Key in its footer: what was typed to make the rows."""

ROWS_SHA256 = "leakbench.rows_sha256"
"""Key in a file's footer of `rows_sha256`, by which `leakbench verify` notices a changed number."""

MEASURES_FOLDER = "measures"
"""Folder of an output directory that holds the rows of measures, in the same layout."""

UTILITY_FOLDER = "utility"
"""Folder of an output directory that holds the rows of federated trainings, in the same layout."""


def job_path(out: Path, job_id: str, season: str) -> Path:
    """Return where the rows of a job belong."""
    return out / season / job_id[:2] / f"{job_id}.parquet"


def prepare_out(out: Path) -> None:
    """Create the output directory and see that it can be written.

    Raises:
        UserError: It cannot be created or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out}: expected a directory that can be written ({error.strerror}); use another --out"
        ) from None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_job(
    out: Path,
    job_id: str,
    season: str,
    rows: Sequence[Mapping[str, Any]],
    fields: Sequence[Field] = ROW_FIELDS,
    *,
    statuses: Mapping[str, int] | None = None,
) -> Path:
    """Write the rows of a job: all of them or, on a crash at any moment, none.

    Args:
        out: Output directory; created if need be.
        job_id: Identity of the job; the rows carry the same.
        season: Season of the rows.
        rows: One mapping per trial with every column; see `blank_row`.
        fields: The columns.
        statuses: Trials per status; of rows that are one per trial, counted from them.

    Raises:
        ValueError: A row has an unknown, missing or wrongly typed column.
        UserError: The directory cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", job_id) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", season):
        raise ValueError(f"job id and season must be plain file names, got {job_id!r} and {season!r}")
    check_rows(rows, fields)
    if {(row["job_id"], row["season"]) for row in rows} != {(job_id, season)}:
        raise ValueError(f"rows of another job or season than {job_id}, {season}")
    try:
        table = pa.Table.from_pylist(list(rows), schema=arrow_schema(fields))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"row does not fit the schema: {error}") from None
    path = job_path(out, job_id, season)
    job = JobFile(
        path=path,
        job_id=job_id,
        season=season,
        rows=len(rows),
        schema_version=SCHEMA_VERSION,
        code_sha256=str(rows[0]["code_sha256"]),
        statuses=dict(statuses or Counter(row["status"] for row in rows)),
        rows_sha256=rows_sha256(table),
    )
    try:
        write_parquet(table.replace_schema_metadata(job.footer), path)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write {path.name} ({error.strerror}); use another --out") from None
    return path


def rows_sha256(table: pa.Table) -> str:
    """Return the sha256 (hex) over the columns and values of a table, however it is stored."""
    text = json.dumps(table.to_pydict(), default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a file that is whole as soon as it has its name, and remove what writers of it left that were killed.

    Raises:
        OSError: The directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # until it has its name; a writer that was killed holds none
        pq.write_table(table, file, compression="zstd", write_statistics=False)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only the owner reads; results are to be shared
        os.replace(name, path)
    _sync_directory(path.parent)
    for left in path.parent.glob(f".{path.stem}.*.tmp"):
        try:
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        except OSError:
            continue  # another writer is at it, or done


@dataclass(frozen=True)
class JobFile:
    """What a result file's footer says.

    Args:
        path: The file, of this job alone or compacted.
        job_id: Identity of the job.
        season: Season of its rows.
        rows: Number of rows.
        schema_version: Schema of the writer.
        code_sha256: Hash of the writer's number-moving modules.
        statuses: Trials per status.
        rows_sha256: `rows_sha256` of the rows as they were written; None in files of older leakbench.
    """

    path: Path
    job_id: str
    season: str
    rows: int
    schema_version: int
    code_sha256: str
    statuses: dict[str, int]
    rows_sha256: str | None

    @classmethod
    def of(cls, path: Path, note: Mapping[str, Any]) -> JobFile:
        """Read a footer.

        Args:
            path: Where it is from.
            note: Its entries.

        Raises:
            KeyError: It is no footer of a job.
            ValueError: It is damaged.
        """
        return cls(
            path=path,
            job_id=note["leakbench.job_id"],
            season=note["leakbench.season"],
            rows=int(note["leakbench.rows"]),
            schema_version=int(note["leakbench.schema_version"]),
            code_sha256=note["leakbench.code_sha256"],
            statuses=json.loads(note["leakbench.statuses"]),
            rows_sha256=note.get(ROWS_SHA256),
        )

    @property
    def footer(self) -> dict[str, str]:
        """What `of` reads."""
        note = {
            "leakbench.complete": "true",
            "leakbench.job_id": self.job_id,
            "leakbench.season": self.season,
            "leakbench.rows": str(self.rows),
            "leakbench.schema_version": str(self.schema_version),
            "leakbench.code_sha256": self.code_sha256,
            "leakbench.statuses": json.dumps(self.statuses),
        }
        return note if self.rows_sha256 is None else note | {ROWS_SHA256: self.rows_sha256}


def read_job_status(path: Path) -> JobFile | None:
    """Return what the footer says, or None where the file is missing, cut off, damaged or not of one job."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _job_status(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1 << 16)  # commands read the footers of a run several times
def _job_status(path: Path, _size: int, _written: int, _inode: int) -> JobFile | None:
    try:
        footer = pq.read_metadata(path)
        note = {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
        job = JobFile.of(path, note)
        return job if note.get("leakbench.complete") == "true" and footer.num_rows == job.rows else None
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def read_compacted(path: Path) -> list[JobFile] | None:
    """Return the jobs of a compacted file in the order of their rows; None where it is not such a file, or damaged."""
    try:
        footer = pq.read_metadata(path)
        notes = json.loads((footer.metadata or {})[JOBS.encode()])
        jobs = [JobFile.of(path, note) for note in notes]
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return None
    return jobs if sum(job.rows for job in jobs) == footer.num_rows else None


def read_jobs(jobs: Iterable[JobFile]) -> Iterator[tuple[JobFile, pa.Table]]:
    """Yield the rows of jobs, as they were written; of a compacted file in its order, read once.

    Args:
        jobs: The jobs; those of a compacted file one after the other, not necessarily all.

    Raises:
        OSError: A file cannot be read.
        ArrowException: A file is damaged.
    """
    for path, own in groupby(jobs, key=lambda job: job.path):
        wanted = {(job.season, job.job_id): job for job in own}
        table, start = pq.read_table(path).replace_schema_metadata(), 0
        for job in read_compacted(path) or wanted.values():
            if (job.season, job.job_id) in wanted:
                yield job, table.slice(start, job.rows)
            start += job.rows


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a whole result file; reads the footer only."""
    return read_job_status(path) is not None


def any_job_files(out: Path) -> Iterator[JobFile]:
    """Yield what `job_files` does, of any schema version."""
    yield from read_compacted(out / COMPACTED) or ()
    # "[!.]" leaves out the temporary files of running and killed jobs.
    yield from filter(None, (read_job_status(path) for path in sorted(out.glob("[!.]*/[!.]*/[!.]*.parquet"))))


def job_files(out: Path) -> Iterator[JobFile]:
    """Yield the jobs under an output directory: those of its compacted file, then those in files of their own.

    Raises:
        UserError: One holds rows of another schema version.
    """
    for job in any_job_files(out):
        if job.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"--out {out}: holds rows of another schema version, expected {SCHEMA_VERSION}, "
                f"got {job.schema_version}; use another --out"
            )
        yield job


def unreadable(run: Path) -> list[Path]:
    """Return the files of a run, of attacks, measures and trainings, that hold no whole job and are read as absent."""
    found: list[Path] = []
    for store in (run, run / MEASURES_FOLDER, run / UTILITY_FOLDER):
        files = sorted(store.glob("*/[0-9a-f][0-9a-f]/[!.]*.parquet"))
        found += [path for path in files if read_job_status(path) is None]
        if (store / COMPACTED).exists() and read_compacted(store / COMPACTED) is None:
            found.append(store / COMPACTED)
    return found


def completed_jobs(out: Path, season: str) -> dict[str, JobFile]:
    """Return the whole result files of a season under ``out`` by job id; empty where there are none.

    Runs are resumed from files of single jobs only; a compacted file is for reading.

    Raises:
        UserError: It holds rows of another schema version.
    """
    return {job.job_id: job for job in job_files(out) if job.season == season and job.path.name != COMPACTED}


def stores(folder: Path) -> list[Path]:
    """Return the folders with jobs, of attacks, measures or trainings, at or below a folder; hidden ones are not."""
    single = {path.parents[2] for path in folder.rglob("[0-9a-f][0-9a-f]/[!.]*.parquet")}
    found = single | {path.parent for path in folder.rglob(COMPACTED)}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def result_folders(paths: Iterable[Path]) -> list[Path]:
    """Return the folders of runs at or below those named; one without any is returned as it is.

    Args:
        paths: Output directories, or folders of them such as ``results``.
    """
    found: list[Path] = []
    for path in paths:
        runs = {
            store.parent if store.name in (MEASURES_FOLDER, UTILITY_FOLDER) and store != path else store
            for store in stores(path)
        }
        found += sorted(runs) or [path]
    return list(dict.fromkeys(found))

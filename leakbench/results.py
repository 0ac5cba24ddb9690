"""The Parquet store of result rows. No torch here.

A job is one Parquet file, ``<out>/<season>/<first two digits of the job id>/<job id>.parquet``, with one row per
planned trial. It is written to a temporary name, flushed to disk and renamed, so a file under its final name is whole.
The columns are documented in `leakbench.schema`, whose names are importable from here as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.errors import UserError
from leakbench.schema import (
    BENCHMARK_VERSION,
    FAILURES,
    ROW_FIELDS,
    SCHEMA_VERSION,
    STATUSES,
    Field,
    arrow_schema,
    blank_row,
    check_rows,
    schema_markdown,
    task_columns,
)

__all__ = [
    "BENCHMARK_VERSION",
    "FAILURES",
    "ROW_FIELDS",
    "SCHEMA_VERSION",
    "STATUSES",
    "Field",
    "JobFile",
    "arrow_schema",
    "blank_row",
    "completed_jobs",
    "holds_measures",
    "holds_rows",
    "holds_utility",
    "is_complete",
    "job_path",
    "load_measures",
    "load_rows",
    "load_utility",
    "no_rows",
    "prepare_out",
    "read_job_status",
    "schema_markdown",
    "task_columns",
    "write_job",
    "write_parquet",
]


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
    summary = {
        "leakbench.complete": "true",
        "leakbench.job_id": job_id,
        "leakbench.season": season,
        "leakbench.rows": str(len(rows)),
        "leakbench.schema_version": str(SCHEMA_VERSION),
        "leakbench.code_sha256": str(rows[0]["code_sha256"]),
        "leakbench.statuses": json.dumps(statuses or Counter(row["status"] for row in rows)),
    }
    try:
        table = pa.Table.from_pylist(list(rows), schema=arrow_schema(fields))
        table = table.replace_schema_metadata(summary | {ROWS_SHA256: rows_sha256(table)})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"row does not fit the schema: {error}") from None
    path = job_path(out, job_id, season)
    try:
        write_parquet(table, path)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write {path.name} ({error.strerror}); use another --out") from None
    return path


ROWS_SHA256 = "leakbench.rows_sha256"
"""Key in a file's footer of `rows_sha256`, by which `leakbench verify` notices a changed number."""


def rows_sha256(table: pa.Table) -> str:
    """Return the sha256 (hex) over the columns and values of a table, however it is stored."""
    text = json.dumps(table.to_pydict(), default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a file that is whole as soon as it has its name, and remove what killed writers of it left.

    Raises:
        OSError: The directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        pq.write_table(table, file, compression="zstd", write_statistics=False)
        file.flush()
        os.fsync(file.fileno())
    _publish(Path(name), path)
    _sync_directory(path.parent)
    for leftover in path.parent.glob(f".{path.stem}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner reads; results are to be shared
        os.replace(temporary, path)
    except FileNotFoundError:
        # Another process finished the same job at the same moment and cleaned up; its rows are as good.
        if not path.exists():
            raise


@dataclass(frozen=True)
class JobFile:
    """What a result file's footer says.

    Args:
        path: The file.
        job_id: Identity of the job.
        season: Season of its rows.
        rows: Number of rows.
        schema_version: Schema of the writer.
        code_sha256: Hash of the writer's number-moving modules.
        statuses: Trials per status.
    """

    path: Path
    job_id: str
    season: str
    rows: int
    schema_version: int
    code_sha256: str
    statuses: dict[str, int]


def read_job_status(path: Path) -> JobFile | None:
    """Return what the footer says, or None where the file is missing, cut off, damaged or not a result."""
    try:
        footer = pq.read_metadata(path)
        note = {key.decode(): value.decode() for key, value in (footer.metadata or {}).items()}
        if note.get("leakbench.complete") != "true" or footer.num_rows != int(note["leakbench.rows"]):
            return None
        return JobFile(
            path=path,
            job_id=note["leakbench.job_id"],
            season=note["leakbench.season"],
            rows=footer.num_rows,
            schema_version=int(note["leakbench.schema_version"]),
            code_sha256=note["leakbench.code_sha256"],
            statuses=json.loads(note["leakbench.statuses"]),
        )
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a whole result file; reads the footer only."""
    return read_job_status(path) is not None


def job_files(out: Path) -> Iterator[JobFile]:
    """Yield the whole result files under an output directory.

    Raises:
        UserError: One holds rows of another schema version.
    """
    # "[!.]" leaves out the temporary files of running and killed jobs.
    for path in sorted(out.glob("*/*/[!.]*.parquet")):
        job = read_job_status(path)
        if job is None:
            continue
        if job.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"--out {out}: holds rows of another schema version, expected {SCHEMA_VERSION}, "
                f"got {job.schema_version}; use another --out"
            )
        yield job


def completed_jobs(out: Path, season: str) -> dict[str, JobFile]:
    """Return the whole result files of a season under ``out`` by job id; empty where there are none.

    Raises:
        UserError: It holds rows of another schema version.
    """
    return {job.job_id: job for job in job_files(out) if job.season == season}


MEASURES_FOLDER = "measures"
"""Folder of an output directory that holds the rows of measures, in the same layout."""

UTILITY_FOLDER = "utility"
"""Folder of an output directory that holds the rows of federated trainings, in the same layout."""

_SAME_MODEL = (
    *("season", "season_commitment", "benchmark_version"),
    *("task_hash", "dataset_fingerprint", "checkpoint_sha256", "model_draws", "draw"),
    *("defense", "defense_version", "defense_params", "defense_source_sha256"),
)
_SAME_TRIAL = (
    *_SAME_MODEL,
    *("attack", "attack_version", "attack_params", "attack_source_sha256"),
    *("budget_model_evaluations", "budget_wall_seconds", "trial"),
)
_SAME_VALUE = (*_SAME_MODEL, "measure", "measure_version", "measure_params", "quantity", "layer", "trial")


def load_rows(out: Path | Iterable[Path]) -> pd.DataFrame:
    """Return the rows under one or several output directories, one per trial.

    Where a trial was measured in several jobs, the row of the widest and then latest block is kept.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no rows at all.
    """
    return _latest(read_files([out] if isinstance(out, Path) else list(out), "run"), _SAME_TRIAL)


def holds_rows(out: Path) -> bool:
    """Whether there are rows of attacks under an output directory."""
    return next(job_files(out), None) is not None


def holds_measures(out: Path) -> bool:
    """Whether there are rows of measures under an output directory."""
    return holds_rows(out / MEASURES_FOLDER)


def holds_utility(out: Path) -> bool:
    """Whether there are rows of federated trainings under an output directory."""
    return holds_rows(out / UTILITY_FOLDER)


def no_rows() -> pd.DataFrame:
    """Return rows of attacks, of which there are none."""
    rows: pd.DataFrame = arrow_schema().empty_table().to_pandas()
    return rows


def load_measures(out: Path | Iterable[Path]) -> pd.DataFrame:
    """Return the rows of measures under one or several output directories, one per layer, quantity and trial.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no such rows at all.
    """
    directories = [out] if isinstance(out, Path) else list(out)
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected results; make some with: leakbench measure quick")
    found = [directory / MEASURES_FOLDER for directory in directories if (directory / MEASURES_FOLDER).is_dir()]
    if not found:
        listed = " ".join(map(str, directories))
        raise UserError(f"no rows of measures under {listed}; make some with: leakbench measure quick --out {listed}")
    return _latest(read_files(found, "measure"), _SAME_VALUE)


def load_utility(out: Path | Iterable[Path]) -> pd.DataFrame:
    """Return the rows of federated trainings under one or several output directories, one per setting, defense, seed.

    Of every defense those at the learning rate that it chose, beside the undefended training of the same seed: the
    columns of `leakbench.utility.rows.UTILITY_FIELDS` and `leakbench.utility.summary.COMPARED`.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no such rows at all.
    """
    from leakbench.utility.summary import compared

    directories = [out] if isinstance(out, Path) else list(out)
    found = [directory / UTILITY_FOLDER for directory in directories if holds_utility(directory)]
    if not found:
        listed = " ".join(map(str, directories))
        raise UserError(f"no rows of trainings under {listed}; make some with: leakbench utility SUITE --out {listed}")
    return compared(read_files(found, "utility"))


def read_files(directories: Sequence[Path], command: str) -> pd.DataFrame:
    """Return all rows under several directories as they are.

    Args:
        directories: Where to look.
        command: What makes such rows, for the error.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no rows at all.
    """
    tables = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected results; make some with: leakbench {command} quick")
        tables += [pq.read_table(job.path) for job in job_files(directory)]
    if not tables:
        listed = ", ".join(map(str, directories))
        raise UserError(f"no result rows under {listed}; make some with: leakbench {command} quick --out {listed}")
    rows: pd.DataFrame = pa.concat_tables([table.replace_schema_metadata() for table in tables]).to_pandas()
    return rows


def latest_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, of the rows of attacks on the same trial, that of the widest and then latest block."""
    return _latest(rows, _SAME_TRIAL)


def _latest(rows: pd.DataFrame, same: Sequence[str]) -> pd.DataFrame:
    """Keep, of the rows that agree in ``same``, that of the widest and then latest block."""
    few = rows[[*same, "utc"]].reset_index(drop=True)
    few["_width"] = (rows["block_stop"] - rows["block_start"]).to_numpy()
    # Failed measures have no trial: one row stands for its block.
    few["_block"] = rows["block_start"].where(rows["status"] != "ok", -1).to_numpy() if "measure" in rows else 0
    order = few.sort_values(["_width", "utc"], kind="stable")
    kept = order.drop_duplicates([*same, "_block"], keep="last").index
    if len(kept) < len(rows):
        rows = rows.iloc[kept.sort_values()]
    return rows.reset_index(drop=True)

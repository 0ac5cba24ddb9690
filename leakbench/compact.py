"""`leakbench compact`: the jobs of runs as one file, with pictures and reports, small enough to publish. No torch.

Nothing is lost of a row: the file's footer keeps the footers of the jobs, with the hashes that `leakbench verify`
checks. Updates that `leakbench utility` kept stay where they are.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.errors import UserError
from leakbench.gallery import FOLDER as PICTURES
from leakbench.gallery import SCHEMA as PICTURE_SCHEMA
from leakbench.store import (
    COMMANDS,
    COMPACTED,
    JOBS,
    MEASURES_FOLDER,
    UTILITY_FOLDER,
    JobFile,
    job_files,
    prepare_out,
    read_jobs,
    stores,
    unreadable,
    write_parquet,
)

REPORTS = tuple(f"{stem}.{kind}" for stem in ("reproduction", "claims") for kind in ("json", "csv", "md"))
"""What `leakbench reproduce` writes beside rows."""

FOLDERS = {"attacks": "", "measures": MEASURES_FOLDER, "utility": UTILITY_FOLDER}
"""Where the rows of each kind are in an output directory."""

_ORDER = ("task", "attack_label", "measure_label", "defense_label", "block_start", "job_id")


@dataclass
class Compacted:
    """What `compact` wrote.

    Args:
        out: The folder.
        jobs: Jobs per kind of `FOLDERS` that there is.
        rows: Rows per kind.
        pictures: Lines of the gallery.
        bytes: Size of all its files.
    """

    out: Path
    jobs: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    pictures: int = 0
    bytes: int = 0


def compact(runs: Sequence[Path], out: Path) -> Compacted:
    """Write the rows of runs as one Parquet file per kind, beside their pictures and reports.

    Args:
        runs: Output directories of `leakbench run`, `measure`, `utility` or `reproduce`, left as they are. A job may
            be in several with the same rows.
        out: Folder to write; rows that it holds already have to be among those of the runs.

    Raises:
        UserError: A folder holds no rows, or those of another schema version; rows in ``out`` would be lost; runs have
            other rows of the same job, or reports of one name with other content; another process writes ``out``; or
            files are damaged, or cannot be read or written.
    """
    for run in runs:
        if not run.is_dir() or not set(stores(run)) & {run / folder for folder in FOLDERS.values()}:
            raise UserError(f"no rows in {run}: expected the output directory of one run, such as runs/quick")
    damaged = [path for folder in dict.fromkeys([*runs, out]) for path in unreadable(folder)]
    if damaged:
        raise UserError(
            f"damaged files of rows ({len(damaged)}, first {damaged[0]}): expected whole ones; delete them, and run "
            "those jobs again"
        )
    prepare_out(out)
    done = Compacted(out)
    try:
        with _locked(out):
            pictures, reports = _pictures(runs), _reports(runs)
            for kind, folder in FOLDERS.items():
                jobs = _once(job for run in runs for job in job_files(run / folder))
                _keeps([(job.season, job.job_id) for job in job_files(out / folder)], jobs, out)
                if jobs:
                    table = _joined(jobs.values(), [command for run in runs for command in commands(run / folder)])
                    write_parquet(table, out / folder / COMPACTED)
                    done.jobs[kind], done.rows[kind] = len(jobs), len(table)
            if pictures is not None:
                write_parquet(pictures, out / PICTURES / "pictures.parquet")
                done.pictures = len(pictures)
            for name, content in reports.items():
                (out / name).write_bytes(content)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"--out {out}: rows or pictures cannot be read or written ({str(error)[:200]})") from None
    done.bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return done


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Let one process at a time write a folder: what another has just written would be lost unseen."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--out {out}: another leakbench compact writes there; wait, or use another --out") from None
    finally:
        os.close(folder)


def _once(found: Iterable[JobFile]) -> dict[tuple[str, str], JobFile]:
    """Return jobs by season and id."""
    jobs: dict[tuple[str, str], JobFile] = {}
    for job in found:
        other = jobs.setdefault((job.season, job.job_id), job)
        if other.rows_sha256 != job.rows_sha256:
            raise UserError(
                f"job {job.job_id[:12]}...: expected the same rows in {other.path} and {job.path}; compare them with "
                "leakbench drift, and name the one that counts"
            )
    return jobs


def _keeps(there: Iterable[tuple[str, str]], jobs: dict[tuple[str, str], JobFile], out: Path) -> None:
    lost = [key for key in there if key not in jobs]
    if lost:
        raise UserError(
            f"--out {out}: holds {len(lost)} jobs that are in none of the runs; to keep those, name {out} as a run, "
            "too, else use another --out"
        )


def _joined(wanted: Iterable[JobFile], commands: Sequence[str]) -> pa.Table:
    """Return the rows of jobs as one table with their footers, those of one cell together."""
    parts = list(read_jobs(wanted))
    keys = [name for name in _ORDER if name in parts[0][1].column_names]
    parts.sort(key=lambda part: [part[1][key][0].as_py() for key in keys])
    notes = {JOBS: json.dumps([job.footer for job, _ in parts]), COMMANDS: json.dumps(list(dict.fromkeys(commands)))}
    return pa.concat_tables([table for _, table in parts]).combine_chunks().replace_schema_metadata(notes)


def commands(store: Path) -> list[str]:
    """Return what was typed for the rows of a store: those of its compacted file, and of its last plan."""
    try:
        planned = [str(json.loads((store / "plan.json").read_bytes())["command"])]
    except (OSError, ValueError, KeyError, TypeError):
        planned = []
    return [*commands_of(store / COMPACTED), *planned]


def commands_of(path: Path) -> list[str]:
    """Return the commands that a compacted file says its rows were made with; none where it says nothing."""
    try:
        return [str(command) for command in json.loads((pq.read_metadata(path).metadata or {})[COMMANDS.encode()])]
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return []


def _pictures(runs: Sequence[Path]) -> pa.Table | None:
    """Return the galleries of runs as one; None where there are no pictures."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for path in (path for run in runs for path in sorted((run / PICTURES).glob("[!.]*.parquet"))):
        table = pq.read_table(path)
        if not table.schema.equals(PICTURE_SCHEMA):
            raise UserError(f"{path}: expected pictures as this leakbench writes them, got other columns; delete it")
        lines |= {(line["job_id"], line["rule"]): line for line in table.to_pylist()}
    if not lines:
        return None
    joined = pa.Table.from_pylist(list(lines.values()), schema=PICTURE_SCHEMA)
    order = [(key, "ascending") for key in ("task", "attack_label", "defense_label", "job_id", "rule")]
    return joined.sort_by(order)


def _reports(runs: Sequence[Path]) -> dict[str, bytes]:
    """Return the reports of runs by name."""
    found: dict[str, bytes] = {}
    for file in (run / name for run in runs for name in REPORTS):
        if file.is_file() and found.setdefault(file.name, file.read_bytes()) != file.read_bytes():
            raise UserError(
                f"{file}: another run has a {file.name} with other content, of which one would be lost; compact these "
                "runs into folders of their own"
            )
    return found

"""`leakbench drift`: whether the same jobs still give the same numbers. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leakbench.errors import UserError
from leakbench.store import job_files, read_jobs, result_folders
from leakbench.submitting.identity import Row
from leakbench.submitting.rerun import Line, compare


@dataclass
class Drift:
    """What came of comparing rows with later ones.

    Args:
        jobs: Jobs in both.
        missing: Jobs that were not run again under the same identity.
        numbers: Numbers compared.
        differs: Columns of `rerun.SAME_MACHINE` that differ: (name, then, now).
        off: (job, number) of every number beyond its tolerance.
    """

    jobs: int = 0
    missing: int = 0
    numbers: int = 0
    differs: set[tuple[str, str, str]] = field(default_factory=set)
    off: list[tuple[str, Line]] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        off = [{"job": job, **vars(line)} for job, line in self.off]
        differs = [dict(zip(("column", "then", "now"), item, strict=True)) for item in sorted(self.differs)]
        return {**vars(self), "differs": differs, "off": off}

    def lines(self, most: int = 20) -> list[str]:
        """Return it as text."""
        shown = [f"{name}: then {then}, now {now}" for name, then, now in sorted(self.differs)]
        for job, line in self.off[:most]:
            shown.append(f"DIFFERS {job[:16]}:{line.trial} {line.metric}: then {line.then}, now {line.now}")
        if len(self.off) > most:
            shown.append(f"and {len(self.off) - most} numbers more: --json")
        left = f"; {self.missing} jobs were not run again, or their entries have changed" if self.missing else ""
        return [*shown, f"{self.jobs} jobs in both, {self.numbers} numbers, {len(self.off)} differ{left}"]


def drift(then: Sequence[Path], now: Sequence[Path]) -> Drift:
    """Compare rows of attacks with those that the same jobs gave later.

    Args:
        then: Folders of runs, or folders of such folders.
        now: The same of the later rows.

    Raises:
        UserError: A folder is not there or holds no jobs, or there is no job that is in both.
    """
    for folder in (*then, *now):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: expected rows, such as runs/quick")
        if not any(True for one in result_folders([folder]) for _ in job_files(one)):
            raise UserError(f"no rows of attacks in {folder}: expected the output of leakbench run")
    later = _rows(now, None)
    found, seen = Drift(), set[tuple[str, str]]()
    for key, rows in _rows(then, set(later)).items():
        compared = compare(key[1], key[1], rows, later[key])
        seen.add(key)
        found.jobs += 1
        found.numbers += len(compared.lines)
        found.differs |= set(compared.differs)
        found.off += [(key[1], line) for line in compared.lines if not line.agrees]
    if not found.jobs:
        raise UserError(
            f"no job is both under {', '.join(map(str, then))} and {', '.join(map(str, now))}: their entries or the "
            "benchmark have changed; measure the first again"
        )
    every = {(job.season, job.job_id) for folder in result_folders(then) for job in job_files(folder)}
    found.missing = len(every - seen)
    return found


def _rows(folders: Sequence[Path], wanted: set[tuple[str, str]] | None) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of jobs by season and job."""
    jobs = [job for folder in result_folders(folders) for job in job_files(folder)]
    kept = (job for job in jobs if wanted is None or (job.season, job.job_id) in wanted)
    return {(job.season, job.job_id): table.to_pylist() for job, table in read_jobs(kept)}

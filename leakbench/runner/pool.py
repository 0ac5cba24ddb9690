"""The run loop: which jobs are left, N at a time, and what became of them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from leakbench.errors import UserError
from leakbench.results import FAILURES, completed_jobs
from leakbench.runner.plan import Job

OtherCode = Literal["stop", "fresh", "keep"]
"""What to do with rows that other code made: stop, measure them again, keep them."""


class JobOutcome(Protocol):
    """What became of one job."""

    @property
    def job(self) -> Job:
        """The job."""

    @property
    def statuses(self) -> Mapping[str, int]:
        """Trials per status."""

    @property
    def error(self) -> str | None:
        """One line; None where every trial is ok."""


class Executor(Protocol):
    """Runs one job and writes its rows; called from several threads."""

    def run(self, job: Job) -> JobOutcome:
        """Run ``job`` and write its Parquet file."""


class Progress(Protocol):
    """Hears of the run."""

    def finished(self, outcome: JobOutcome) -> None:
        """One more job is done."""


@dataclass(frozen=True)
class Resume:
    """Planned jobs, sorted by what is known of them.

    Args:
        todo: Jobs to run.
        skipped: Jobs whose rows are there.
        failed: Those of ``skipped`` in which a trial failed.
    """

    todo: list[Job]
    skipped: list[Job]
    failed: list[Job]


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Args:
        done: Jobs run, failed ones included.
        failed: Outcomes of the jobs run in which a trial failed.
        statuses: Trials run per status.
    """

    done: int
    failed: list[JobOutcome]
    statuses: dict[str, int]


def has_failed(statuses: Mapping[str, int]) -> bool:
    """Whether a job with these trials per status counts as failed."""
    return any(statuses.get(status) for status in FAILURES)


def resume(
    jobs: Sequence[Job], out: Path, code_sha256: str, *, other_code: OtherCode = "stop", retry_failed: bool = False
) -> Resume:
    """Find out which of ``jobs`` are left to do.

    Args:
        jobs: The plan.
        out: Where the rows are.
        code_sha256: Hash of leakbench's number-moving modules as they are now.
        other_code: What to do with rows of another hash.
        retry_failed: Whether to run again what failed or was unavailable.

    Raises:
        UserError: Rows are there that other code made, or that have another schema version.
    """
    there = {
        key: file for season in {job.season.name for job in jobs} for key, file in completed_jobs(out, season).items()
    }
    known = {job.id: there[job.id] for job in jobs if job.id in there}
    other = {key for key, file in known.items() if file.code_sha256 != code_sha256}
    if other and other_code == "stop":
        raise UserError(
            f"--out {out}: {len(other)} of {len(jobs)} jobs have rows that another version of leakbench's code made; "
            "expected one code for all: --fresh measures them again, --keep keeps them, or use another --out"
        )
    again = set(other) if other_code == "fresh" else set()
    if retry_failed:
        again |= {k for k, file in known.items() if has_failed(file.statuses) or file.statuses.get("unavailable")}
    skipped = [job for job in jobs if job.id in known and job.id not in again]
    return Resume(
        todo=[job for job in jobs if job.id not in known or job.id in again],
        skipped=skipped,
        failed=[job for job in skipped if has_failed(known[job.id].statuses)],
    )


def run_jobs(jobs: Sequence[Job], runner: Executor, progress: Progress, *, workers: int = 1) -> Summary:
    """Run ``jobs``, ``workers`` at a time, in order.

    Every finished job is on disk before the next one of its worker starts, so an interrupt loses only jobs at work.

    Raises:
        UserError: Rows cannot be written; the jobs at work are finished, the others dropped.
        KeyboardInterrupt: The user stopped the run; jobs may still be at work, the others are dropped.
    """
    done, failed, statuses = 0, [], dict[str, int]()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="leakbench-worker")
    pending: set[Future[JobOutcome]] = {executor.submit(runner.run, job) for job in jobs}
    try:
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in finished):
                done += 1
                if has_failed(outcome.statuses):
                    failed.append(outcome)
                for status, trials in outcome.statuses.items():
                    statuses[status] = statuses.get(status, 0) + trials
                progress.finished(outcome)
    except BaseException as error:
        executor.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    executor.shutdown()
    return Summary(done, failed, statuses)

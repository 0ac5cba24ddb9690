"""One job from victims to rows. This is the parent of DESIGN.md 2.1: it holds truth, seeds, scoring and the clock."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from leakbench.data import Victims
from leakbench.errors import InvalidOutput, LeakbenchError, NotApplicable, Unavailable, UserError
from leakbench.gallery import Entry, write_gallery
from leakbench.keys import Season
from leakbench.provenance import provenance
from leakbench.results import prepare_out, write_job
from leakbench.runner.children import ChildFailed
from leakbench.runner.exchange import Exchange
from leakbench.runner.grant import granted_names, read_names
from leakbench.runner.isolate import choose_level
from leakbench.runner.pictures import pictures
from leakbench.runner.plan import Job
from leakbench.runner.rows import Outcome, job_rows
from leakbench.runner.scene import Weights
from leakbench.runner.workshop import Workshop

_log = logging.getLogger(__name__)

Progress = Callable[[Job, dict[str, Any]], None]


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job.

    Args:
        job: The job.
        path: Its Parquet file.
        statuses: Rows by status.
        seconds: Wall time of the whole job.
        error: One line where rows failed.
        output: What the entries printed, untrusted text.
    """

    job: Job
    path: Path
    statuses: dict[str, int]
    seconds: float
    error: str | None = None
    output: str = ""


class Failing(Protocol):
    """What a job came to."""

    def fail(self, status: str, error: str) -> None:
        """Note why nothing came of it."""


@contextmanager
def failures(outcome: Failing) -> Iterator[list[str]]:
    """Note on ``outcome`` what was lacking, declined or done wrong by an entry; yields what the entry then printed."""
    printed: list[str] = []
    try:
        yield printed
    except Unavailable as error:
        outcome.fail("unavailable", str(error))
    except NotApplicable as error:
        outcome.fail("not_applicable", str(error))
    except ChildFailed as error:
        outcome.fail(error.status, str(error))
        printed.append(error.output)
    except InvalidOutput as error:
        outcome.fail("invalid", str(error))


class Runner:
    """Executes jobs on this machine. A context manager; `run` may be called from several threads.

    Args:
        out: Output directory.
        isolation: ``auto``, ``none``, ``process`` or ``bwrap``.
        device: ``cpu`` or a CUDA device such as ``cuda:0``; children compute there.
        workers: Jobs that will run at once; each gets an equal share of the memory.
        season: Key of the victims.
        files: Entry files and packages that children may read besides the installed ones.
        local: Instances by entry name, for entries without a file (isolation ``none`` only).
        on_progress: Receives an attack's progress reports.

    Raises:
        UserError: The directory cannot be written, the isolation or the device cannot be had.
    """

    def __init__(
        self,
        out: Path,
        *,
        season: Season,
        isolation: str = "auto",
        device: str = "cpu",
        workers: int = 1,
        files: Iterable[Path] = (),
        local: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        prepare_out(out)
        self.level = choose_level(isolation)
        self._shop = Workshop(
            level=self.level,
            device=_checked_device(device),
            workers=workers,
            season=season,
            artefacts=out / "artefacts",
            files=files,
            local=local or {},
        )
        self._out = out
        self._season = season
        self._on_progress = on_progress
        self._provenance = provenance(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all children; jobs at work are left undone, without rows."""
        self._shop.close()

    # --- before anything runs -------------------------------------------------------------------------------------

    def preflight(self, jobs: Iterable[Job]) -> dict[str, int]:
        """Find what would stop the jobs before any of them runs.

        Returns:
            Why jobs will have rows of status ``unavailable``, and how many for each reason.

        Raises:
            UserError: A dataset is damaged, a net cannot take its inputs, or a block would not fit into the memory.
        """
        checked: dict[tuple[object, ...], str | None] = {}
        reasons: Counter[str] = Counter()
        for job in jobs:
            kind = (job.task.hash, job.stop - job.start, job.attack.label, bool(job.defense))
            if kind not in checked:
                checked[kind] = self._unavailable(job)
            if (reason := checked[kind]) is not None:
                reasons[reason] += 1
        return dict(reasons)

    def _unavailable(self, job: Job) -> str | None:
        try:
            if job.kept:
                self._check_memory(job, self._shop.weights(job))
                return None
            self._shop.scenes.victims(job.task, [job.start])
            trained = job.task.stage not in ("untrained", "pretrained")
            # What is asked does not depend on training, which may take minutes.
            task = job.task.model_copy(update={"stage": "untrained"}) if trained else job.task
            weights = self._shop.inserted(job, self._shop.scenes.weights(task, "one", [0]))
        except Unavailable as error:
            return str(error)
        self._check_memory(job, weights)
        return None

    def _check_memory(self, job: Job, weights: Weights) -> None:
        trials, memory, numbers = len(job.trials), self._shop.memory, weights.numel(weights.parameters)
        # Per trial: the update in the client, in transit and in the attack; its own weights where they are redrawn.
        copies = 3 + (2 if job.model_draws == "per_trial" else 0)
        read = weights.numel(read_names(job.attack.description.reads, weights, job.task.protocol, job.task.target))
        whole = job.model_draws == "per_trial" or job.task.protocol.sends != "gradient" or bool(job.defense)
        per_trial = 4 * copies * (numbers if whole else read)
        if per_trial * trials > memory:
            fits = max(1, memory // max(per_trial, 1))
            raise UserError(
                f"{job.label}: a block of {trials} trials needs about {per_trial * trials / 2**30:.1f} GiB, a worker "
                f"has {memory / 2**30:.1f}; set trials_per_job: {fits} in the suite or use fewer --workers"
            )

    # --- one job --------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> JobOutcome:
        """Execute a job and write its rows; a failure of an entry becomes rows, not an exception.

        Raises:
            UserError: The rows cannot be written.
            LeakbenchError: The runner was closed meanwhile; the job has no rows.
        """
        begun = time.perf_counter()
        torch.set_num_threads(job.threads)
        outcome = Outcome(status="ok")
        victims: Victims | None = None
        weights: Weights | None = None
        with failures(outcome) as printed:
            victims = self._shop.victims(job)
            weights = self._shop.weights(job)
            missing = set(job.attack.description.needs) - granted_names(job.task, weights, job.defense)
            if missing:
                outcome.fail("not_applicable", f"the task does not grant: {', '.join(sorted(missing))}")
            else:
                Exchange(self._shop, job, victims, weights, outcome, partial(self._report, job)).run()
        if any(outcome.planted) and outcome.status == "ok" and victims is not None and weights is not None:
            outcome.stealth = self._shop.stealth(job, weights, victims, outcome.planted)
        if self._shop.closed:
            raise LeakbenchError(f"{job.label}: the runner was closed before the job was done")
        rows = job_rows(job, outcome, self._shop.scenes, victims, weights, self._columns(outcome.isolation))
        if job.task.target == "inputs":
            self._show(job, pictures(job, outcome.recovery, victims, self._shop.scenes, rows))
        path = write_job(self._out, job.id, self._season.name, rows)
        statuses = dict(Counter(row["status"] for row in rows))
        return JobOutcome(job, path, statuses, time.perf_counter() - begun, outcome.error, "".join(printed))

    def _show(self, job: Job, entries: list[Entry]) -> None:
        """Write the pictures of a job, before its rows, so that a job that is done has them."""
        try:
            write_gallery(self._out, job.id, entries)
        except OSError as error:  # the rows are what a run is for
            _log.warning("%s: no pictures: %s: %s", job.label, error.strerror, error.filename)

    def _columns(self, isolation: Mapping[str, Any]) -> dict[str, Any]:
        detail = ", ".join(f"{name}={value}" for name, value in sorted(isolation.items()))
        return {**self._provenance, "isolation": self.level, "isolation_detail": detail or None}

    def _report(self, job: Job, progress: dict[str, Any]) -> None:
        if self._on_progress is not None:
            self._on_progress(job, progress)


def _checked_device(device: str) -> str:
    if device == "cpu":
        return device
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind != "cuda":
        raise UserError(f"--device {device}: expected cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is usable here; type --device cpu")
    return device

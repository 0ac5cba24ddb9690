"""What a run shows: a progress bar on a terminal, one plain line per job elsewhere. No torch here."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import IO, Any, Protocol, Self

from leakbench.runner.plan import Job
from leakbench.runner.pool import JobOutcome, has_failed


class Display(Protocol):
    """Shows a run; a context manager."""

    def finished(self, outcome: JobOutcome) -> None:
        """One more job is done."""

    def report(self, job: Job, values: Mapping[str, Any]) -> None:
        """The attack of ``job`` told how far it is; called from worker threads."""

    def say(self, text: str) -> None:
        """Show one line about the run as a whole."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End."""


class PlainDisplay:
    """One line per finished job.

    Args:
        file: Where to print.
        total: Jobs to run.
    """

    def __init__(self, file: IO[str], total: int) -> None:
        self._file = file
        self._total = total
        self._done = 0

    def finished(self, outcome: JobOutcome) -> None:
        """Print the job, its statuses and its error."""
        self._done += 1
        counts = ", ".join(f"{count} {status}" for status, count in sorted(outcome.statuses.items()))
        detail = f": {outcome.error}" if outcome.error else ""
        print(f"[{self._done}/{self._total}] {outcome.job.label}: {counts}{detail}", file=self._file, flush=True)

    def report(self, job: Job, values: Mapping[str, Any]) -> None:
        """Print nothing: a log is no place for every step."""

    def say(self, text: str) -> None:
        """Print the line."""
        print(text, file=self._file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


class BarDisplay:
    """A progress bar with jobs done, failed and left, time left, and the attack that last reported.

    Args:
        file: Terminal to draw on.
        total: Jobs to run.
    """

    def __init__(self, file: IO[str], total: int) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.completed:.0f} done, {task.fields[failed]} failed, {task.fields[left]} left"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.description}", markup=False),
            console=Console(file=file),
        )
        self._total = total
        self._failed = 0
        self._lock = threading.Lock()
        self._task = self._bar.add_task("reading data, training models", total=total, failed=0, left=total)

    def finished(self, outcome: JobOutcome) -> None:
        """Advance the bar; print a failure above it."""
        with self._lock:
            if has_failed(outcome.statuses):
                self._failed += 1
                self._bar.console.print(f"failed: {outcome.job.label}: {outcome.error}", markup=False, highlight=False)
            left = self._total - int(self._bar.tasks[0].completed) - 1
            self._bar.update(self._task, advance=1, failed=self._failed, left=left)

    def report(self, job: Job, values: Mapping[str, Any]) -> None:
        """Show the job, its step and its objective."""
        self._bar.update(self._task, description=job.label + describe_report(values))

    def say(self, text: str) -> None:
        """Show the line where an attack's progress will be."""
        self._bar.update(self._task, description=text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()


@contextlib.contextmanager
def shown_log(display: Display) -> Iterator[None]:
    """Show what leakbench logs, such as the progress of training a checkpoint, on ``display``."""
    log, handler = logging.getLogger("leakbench"), logging.Handler()
    handler.emit = lambda record: display.say(record.getMessage())  # type: ignore[method-assign]
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def describe_report(values: Mapping[str, Any]) -> str:
    """Return `` step 10/100, objective 0.25, 8.1 it/s, 11 s left`` as far as the values say it.

    The values come from entry code: whatever is no finite number is left out.
    """

    def number(key: str) -> float | None:
        value = values.get(key)
        # An integer may have hundreds of digits, more than a float can hold.
        return value if isinstance(value, int | float) and abs(value) < 1e15 else None

    done, total, loss, rate = number("done"), number("total"), number("loss"), number("rate")
    text = f" step {done:.0f}/{total:.0f}" if done is not None and total is not None else ""
    if loss is not None:
        text += f", objective {loss:.4g}"
    if rate is not None and rate > 0:
        text += f", {rate:.3g} it/s"
        if done is not None and total is not None:
            text += f", {max(0.0, total - done) / rate:.0f} s left"
    return text


def make_display(file: IO[str], total: int) -> Display:
    """Return the display that suits ``file``."""
    return BarDisplay(file, total) if file.isatty() and total else PlainDisplay(file, total)

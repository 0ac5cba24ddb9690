"""One ``leakbench utility``: all learning rates with the first seed, then all seeds at the best. No torch here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from leakbench.errors import Unavailable, UserError
from leakbench.keys import DEVELOPMENT, Season
from leakbench.provenance import code_sha256
from leakbench.results import UTILITY_FOLDER, completed_jobs, prepare_out, read_files
from leakbench.runner.plan import Job
from leakbench.runner.pool import Summary, resume
from leakbench.runner.session import Request, read_season, run_planned, write_plan
from leakbench.suites import load_suite
from leakbench.utility.plan import Setting, best_rate, settings
from leakbench.utility.summary import compared, lines, table


@dataclass
class UtilityReport:
    """What was trained.

    Args:
        out: Directory of the rows.
        planned: Trainings of the plan.
        run: Trainings run now.
        skipped: Trainings whose rows were there.
        failed: What crashed or could not be run, now or before: training and error.
        useless: What diverged or sent what is no update, at the learning rate that was chosen: utility 0.
        rejected: The same at other learning rates.
        next: What to type to attack what was kept, and to see both.
        summary: What `leakbench.utility.summary.table` makes of the rows of the plan.
    """

    out: str
    planned: int = 0
    run: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    useless: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    summary: pd.DataFrame = field(default_factory=pd.DataFrame)

    def content(self) -> dict[str, Any]:
        """Return the report as a JSON-able mapping."""
        shown = self.summary.astype(object).where(self.summary.notna(), None)
        return {**vars(self), "summary": shown.to_dict("records")}

    def text(self) -> str:
        """Return the table and a few lines that end in the next command."""
        there = f", {self.skipped} were there" if self.skipped else ""
        text = [*lines(self.summary), "", f"{self.run} of {self.planned} trainings run{there}"]
        text += [f"  failed: {line}" for line in self.failed]
        text += [f"  utility 0: {line}" for line in self.useless]
        text += [f"  rejected learning rate: {line}" for line in self.rejected]
        return "\n".join([*text, f"rows: {self.out}", *(f"next: {line}" for line in self.next)])


def run_utility(request: Request) -> UtilityReport:
    """Train what ``request`` asks for; its attacks, trials and measures mean nothing here.

    Raises:
        UserError: Anything the user got wrong, found before the first training where possible.
        KeyboardInterrupt: The user stopped it before the first training; later, the process ends with `INTERRUPTED`.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", request.device):
        raise UserError(f"--device {request.device}: expected cpu, cuda or cuda:N, e.g. --device cuda:0")
    season = DEVELOPMENT if request.season_key is None else read_season(request.season_key)
    suite = load_suite(request.suite)
    wanted = settings(suite, request.defenses)
    if request.only_available:
        wanted = _at_hand(wanted)
    out = request.out or Path("runs") / suite.name
    store = out / UTILITY_FOLDER
    prepare_out(store)
    report = UtilityReport(out=str(store))
    candidates = _distinct(job for setting in wanted for job in setting.candidates(season))
    first = _run(candidates, candidates, out, request, season)
    holdout = _holdout(store, season, {job.id for job in candidates})
    final = _distinct(job for setting in wanted for job in _final(setting, holdout, season))
    planned = _distinct((*candidates, *final))
    second = _run([job for job in final if job.id not in holdout], planned, out, request, season)
    report.planned, report.run = len(planned), first.done + second.done
    report.skipped = report.planned - report.run
    rows = read_files([store], "utility")
    # Other rows may be of other budgets.
    rows = rows[rows["job_id"].isin({job.id for job in planned}) & (rows["season"] == season.name)]
    _tell_failures(report, rows, planned, {job.id for job in final})
    report.summary = table(compared(rows))
    report.next = _next(request, out, any(trainings.keep for trainings in suite.utility))
    return report


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    return list({job.id: job for job in jobs}.values())


def _next(request: Request, out: Path, keeps: bool) -> list[str]:
    run = ["leakbench", "run", request.suite, "--out", str(out)]
    run += [word for text in request.defenses for word in ("--defense", text)]
    run += ["--season-key", str(request.season_key)] if request.season_key is not None else []
    run += ["--in-training", str(out)] if keeps else []
    return [shlex.join(run), shlex.join(["leakbench", "board", str(out), "--defenses"])]


def _at_hand(wanted: Sequence[Setting]) -> list[Setting]:
    """Return the settings whose data can be had."""
    from leakbench.data import load_dataset

    missing: dict[str, str] = {}
    for name in dict.fromkeys(setting.task.dataset for setting in wanted):
        try:
            load_dataset(name)
        except Unavailable as error:
            missing[name] = str(error)
    kept = [setting for setting in wanted if setting.task.dataset not in missing]
    if not kept:
        raise UserError(f"--only-available: none of the data is at hand: {'; '.join(missing.values())}")
    return kept


def _final(setting: Setting, holdout: dict[str, float | None], season: Season) -> list[Job]:
    """Return the trainings of all seeds at the best learning rate; none where there is no data."""
    rate = best_rate(setting.candidates(season), holdout)
    return [] if rate is None else setting.jobs(rate, setting.grid.seeds, season)


def _run(jobs: Sequence[Job], planned: Sequence[Job], out: Path, request: Request, season: Season) -> Summary:
    """Run those of ``jobs`` that are left to do."""
    from leakbench.utility.runner import UtilityRunner  # imports torch

    store = out / UTILITY_FOLDER
    state = resume(jobs, store, code_sha256(), other_code=request.other_code, retry_failed=request.retry_failed)
    write_plan(store, planned, season, request.command)
    if not state.todo:
        return Summary(0, [], {})
    return run_planned(UtilityRunner, state.todo, out, store, request, season, whole=not state.skipped)


def _holdout(store: Path, season: Season, wanted: set[str]) -> dict[str, float | None]:
    """Return the accuracy on what was held out by job id."""
    files = [file for key, file in completed_jobs(store, season.name).items() if key in wanted]
    found = (pq.read_table(file.path, columns=["job_id", "accuracy_holdout"]).to_pylist()[0] for file in files)
    return {row["job_id"]: row["accuracy_holdout"] for row in found}


def _tell_failures(report: UtilityReport, rows: pd.DataFrame, planned: Sequence[Job], final: set[str]) -> None:
    """Sort what did not come to its end: only what a defense does to the numbers is no failure of the command."""
    labels = {job.id: job.label for job in planned}
    for row in rows[rows["status"] != "ok"].sort_values("job_id").to_dict("records"):
        name = row["job_id"]
        useless = report.useless if name in final else report.rejected
        where = useless if row["status"] == "invalid" else report.failed
        where.append(f"{labels[name]}: {row['status']}: {row['error']}")

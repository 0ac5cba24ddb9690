"""One ``leakbench run``, from a suite's name to rows on disk, and what ``status`` can say of it. No torch here."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakbench.errors import INTERRUPTED, Unavailable, UserError
from leakbench.grids import Cell
from leakbench.keys import DEVELOPMENT, Season
from leakbench.provenance import code_sha256
from leakbench.results import MEASURES_FOLDER, completed_jobs, prepare_out
from leakbench.runner.plan import Job, plan, shard
from leakbench.runner.pool import OtherCode, Summary, has_failed, resume, run_jobs
from leakbench.runner.progress import make_display, shown_log
from leakbench.suites import load_suite
from leakbench.utility.attacked import kept_cells

if TYPE_CHECKING:
    from leakbench.runner.execute import Runner

PLAN_FILE = "plan.json"
"""Name, in the output directory, of the last plan: what `status` counts the rows against."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line.

    Args:
        suite: Name, or path of a YAML file.
        attacks: Expressions instead of the suite's attacks; empty for those.
        defenses: Expressions instead of the suite's defenses; empty for those.
        trials: Instead of the suite's.
        device: Torch name of a device.
        workers: Jobs at a time; None: as many as there are CPU cores, at most 8, and one on a GPU.
        shard: (i, n): the i-th of n parts, from 1.
        out: Directory of the rows; None: ``runs/SUITE``.
        isolation: ``auto``, ``none``, ``process`` or ``bwrap``.
        season_key: File with a season's key; None: the development season.
        other_code: What to do with rows of other leakbench code.
        retry_failed: Whether to run failed jobs again.
        only_available: Whether to leave out the jobs whose data is not at hand.
        keep_cell: Which cells of the suite to run; all where None.
        measuring: Whether to compute measures instead of running attacks.
        measures: Expressions instead of the suite's measures; empty for those.
        in_training: Output directory of `leakbench utility` whose kept updates are attacked too.
        command: What to type to resume.
    """

    suite: str
    attacks: tuple[str, ...] = ()
    defenses: tuple[str, ...] = ()
    trials: int | None = None
    device: str = "cpu"
    workers: int | None = None
    shard: tuple[int, int] = (1, 1)
    out: Path | None = None
    isolation: str = "auto"
    season_key: Path | None = None
    other_code: OtherCode = "stop"
    retry_failed: bool = False
    only_available: bool = False
    keep_cell: Callable[[Cell], bool] | None = None
    measuring: bool = False
    measures: tuple[str, ...] = ()
    in_training: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Report:
    """What a run did.

    Args:
        out: Directory of the rows.
        board: What to type to read them.
        planned: Jobs of the plan or shard.
        run: Jobs run now.
        skipped: Jobs whose rows were there.
        failed: What failed, now or before: job and error.
        trials: Trials run now, per status.
        left_out: Jobs that are not part of the plan, by the reason.
        not_attacked: Kept updates that no job attacks, by the reason.
    """

    out: str
    board: str
    planned: int
    run: int
    skipped: int
    failed: list[str]
    trials: dict[str, int]
    left_out: dict[str, int]
    not_attacked: dict[str, int] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return the report as a JSON-able mapping."""
        return asdict(self)

    def text(self) -> str:
        """Return the report as a few lines that end in the next command."""
        there = f", {self.skipped} were there" if self.skipped else ""
        trials = ", ".join(f"{count} {status}" for status, count in sorted(self.trials.items()))
        lines = [f"{self.run} of {self.planned} jobs run{there}, {len(self.failed)} failed; trials: {trials or 'none'}"]
        lines += [f"  failed: {line}" for line in self.failed]
        if self.failed:
            lines.append("run the failed ones again with --retry-failed")
        if self.trials.get("unavailable"):
            lines.append("unavailable: where what they lack can be had, get it and run them again with --retry-failed")
        lines += [f"{count} jobs left out: {reason}" for reason, count in self.left_out.items()]
        lines += [f"{count} kept updates not attacked: {reason}" for reason, count in self.not_attacked.items()]
        return "\n".join([*lines, f"rows: {self.out}", f"next: {self.board}"])


def run_suite(request: Request) -> Report:
    """Run what ``request`` asks for.

    Raises:
        UserError: Anything the user got wrong, found before the first job starts where possible.
        KeyboardInterrupt: The user stopped it before the first job; later, the process ends with `INTERRUPTED`.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", request.device):
        raise UserError(f"--device {request.device}: expected cpu, cuda or cuda:N, e.g. --device cuda:0")
    season = DEVELOPMENT if request.season_key is None else read_season(request.season_key)
    suite = load_suite(request.suite)
    if request.measuring:
        cells = suite.expand_measures(measures=request.measures, defenses=request.defenses, trials=request.trials)
    else:
        cells = suite.expand(attacks=request.attacks, defenses=request.defenses, trials=request.trials)
        if not any(grid.attacks for grid in suite.grids):
            raise UserError(f"suite {suite.name!r} has measures only; type: leakbench measure {request.suite}")
    cells = [cell for cell in cells if request.keep_cell is None or request.keep_cell(cell)]
    not_attacked: dict[str, int] = {}
    if request.in_training is not None:
        kept = kept_cells(request.in_training, cells, season, trials=request.trials)
        cells, not_attacked = [*cells, *kept.cells], kept.left_out
    jobs = plan(cells, season)
    left_out: Counter[str] = Counter()
    if request.only_available:
        jobs, left_out = _at_hand(jobs)
    out = request.out or Path("runs") / suite.name
    store = out / MEASURES_FOLDER if request.measuring else out
    prepare_out(store)
    mine = shard(jobs, *request.shard)
    state = resume(mine, store, code_sha256(), other_code=request.other_code, retry_failed=request.retry_failed)
    write_plan(store, jobs, season, request.command)
    whole = request.shard == (1, 1) and not state.skipped
    summary = _run(state.todo, out, request, season, whole=whole) if state.todo else Summary(0, [], {})
    return Report(
        out=str(store),
        board=f"leakbench board {out}" + (" --measures" if request.measuring else ""),
        planned=len(mine),
        run=summary.done,
        skipped=len(state.skipped),
        failed=[f"{o.job.label}: {o.error}" for o in summary.failed] + [job.label for job in state.failed],
        trials=summary.statuses,
        left_out=dict(left_out),
        not_attacked=not_attacked,
    )


def _at_hand(jobs: Sequence[Job]) -> tuple[list[Job], Counter[str]]:
    """Return the jobs whose victims can be drawn, and how many cannot for each reason."""
    from leakbench.data import draw_task, load_dataset

    known: dict[str, str | None] = {}
    for job in jobs:
        task = job.task
        if task.hash not in known:
            try:
                draw_task(load_dataset(task.dataset), task, trials=[0], key=DEVELOPMENT.key)
            except Unavailable as error:
                known[task.hash] = str(error)
            else:
                known[task.hash] = None
    kept = [job for job in jobs if known[job.task.hash] is None]
    missing = Counter(reason for job in jobs if (reason := known[job.task.hash]) is not None)
    if not kept:
        raise UserError(f"--only-available: none of the data is at hand: {'; '.join(missing)}")
    return kept, missing


def read_season(path: Path) -> Season:
    """Read a season key; its name becomes a directory and must not pass for the public season."""
    season = Season.from_file(path)
    if season.name == DEVELOPMENT.name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", season.name):
        raise UserError(
            f"--season-key {path}: expected a file named by the season, in letters, digits, '.', '_' and '-', and not "
            f"{DEVELOPMENT.name}; rename it, e.g. spring.key"
        )
    return season


def _run(jobs: Sequence[Job], out: Path, request: Request, season: Season, *, whole: bool) -> Summary:
    """Run ``jobs`` as attacks or measures; see `run_planned`."""
    from leakbench.runner.execute import Runner  # imports torch

    if not request.measuring:
        return run_planned(Runner, jobs, out, out, request, season, whole=whole)
    from leakbench.runner.measure import MeasureRunner

    return run_planned(MeasureRunner, jobs, out, out / MEASURES_FOLDER, request, season, whole=whole)


def run_planned(
    kind: type[Runner], jobs: Sequence[Job], out: Path, rows: Path, request: Request, season: Season, *, whole: bool
) -> Summary:
    """Run ``jobs``; refuse where they are the whole plan and none of them can give a number.

    A shard may well hold nothing but rows of status ``unavailable``.

    Args:
        kind: What executes a job.
        jobs: What to run.
        out: Output directory.
        rows: Where in there the rows go.
        request: What was asked for.
        season: Key of the draws.
        whole: Whether ``jobs`` are all there are.

    Raises:
        UserError: None of them can give a number, or rows cannot be written.
    """
    workers = request.workers or (min(_cores(), 8) if request.device == "cpu" else 1)
    entries = {entry.source for job in jobs for entry in (job.attack, *job.defense) if entry.source is not None}
    display = make_display(sys.stderr, len(jobs))
    runner = kind(
        out,
        isolation=request.isolation,
        device=request.device,
        workers=workers,
        season=season,
        files=sorted({file for source in entries for file in source.files}),
        on_progress=display.report,
    )
    with runner:
        try:
            with display, shown_log(display):
                display.say(f"{len(jobs)} jobs, {workers} at a time, isolation {runner.level}; rows go to {rows}")
                reasons = runner.preflight(jobs)
                if whole and sum(reasons.values()) == len(jobs):
                    raise UserError("nothing to measure: " + "; ".join(reasons))
                for reason, count in reasons.items():
                    display.say(f"{count} of {len(jobs)} jobs will have rows of status unavailable: {reason}")
                return run_jobs(jobs, runner, display, workers=workers)
        except KeyboardInterrupt:
            # A worker may be in the middle of a long tensor operation; waiting for it would look like a hang.
            runner.close()
            print(interrupted(request.command), file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)


def interrupted(command: str) -> str:
    """Return the last line of a run that the user stopped."""
    return f"interrupted; the rows of finished jobs are kept; resume with: {command}"


def _cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_plan(out: Path, jobs: Sequence[Job], season: Season, command: str) -> None:
    """Note what is to be run, for `status_of`.

    Raises:
        UserError: The directory cannot be written.
    """
    content = {"season": season.name, "command": command, "jobs": {job.id: job.label for job in jobs}}
    try:
        handle, name = tempfile.mkstemp(prefix=".plan.", suffix=".tmp", dir=out)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file)
        os.chmod(name, 0o644)  # mkstemp makes files that only the owner reads
        os.replace(name, out / PLAN_FILE)
    except OSError as error:
        raise UserError(
            f"--out {out}: expected a directory that can be written ({error.strerror}); use another --out"
        ) from None


def planned_jobs(out: Path) -> frozenset[str]:
    """Return the ids of the jobs of the last plan in ``out``.

    Raises:
        UserError: There is no run.
    """
    return frozenset(_read_plan(out)["jobs"])


def _read_plan(out: Path) -> dict[str, Any]:
    try:
        written = json.loads((out / PLAN_FILE).read_bytes())
        return {"season": written["season"], "jobs": dict(written["jobs"]), "command": written["command"]}
    except (OSError, ValueError, KeyError, TypeError):
        if (out / MEASURES_FOLDER / PLAN_FILE).is_file():
            raise UserError(f"no run in {out}, but measures; type: leakbench status {out / MEASURES_FOLDER}") from None
        raise UserError(
            f"no run in {out}: expected a directory with {PLAN_FILE}; start one with: leakbench run quick --out {out}"
        ) from None


def status_of(out: Path) -> dict[str, Any]:
    """Return the state of the last run in ``out``: its command, jobs planned, done, failed and left, trials per status.

    Raises:
        UserError: There is no run.
    """
    written = _read_plan(out)
    season, labels, command = written["season"], written["jobs"], written["command"]
    files = {key: file for key, file in completed_jobs(out, season).items() if key in labels}
    failed = [labels[key] for key, file in files.items() if has_failed(file.statuses)]
    trials: Counter[str] = Counter()
    for file in files.values():
        trials.update(file.statuses)
    return {
        "out": str(out),
        "season": season,
        "command": command,
        "jobs": {"planned": len(labels), "done": len(files), "failed": len(failed), "left": len(labels) - len(files)},
        "trials": dict(sorted(trials.items())),
        "failed": sorted(failed),
    }

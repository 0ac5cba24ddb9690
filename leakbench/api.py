"""`evaluate`: one attack on one task from Python, with the planner, boundary and scoring of `leakbench run`."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd

from leakbench.entries import Description, EntrySpec, resolve
from leakbench.entry import Entry
from leakbench.errors import UserError
from leakbench.grids import Budget, Cell, ModelDraws
from leakbench.keys import DEVELOPMENT, Season
from leakbench.provenance import code_sha256
from leakbench.results import load_rows
from leakbench.runner.plan import plan
from leakbench.sources import Kind
from leakbench.suites import load_task
from leakbench.tasks import Task


def evaluate(
    attack: str | Entry,
    task: str | Task,
    defense: str | Entry | Sequence[Entry] | None = None,
    *,
    trials: int = 64,
    trials_per_job: int = 64,
    model_draws: ModelDraws = "one",
    threads: int = 1,
    budget: Mapping[str, Any] | None = None,
    device: str = "cpu",
    isolation: str = "auto",
    season: Season = DEVELOPMENT,
    out: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Run one attack on one task and return its result rows.

    Args:
        attack: A registered name (with parameters: ``"llg_plus(rounds=5)"``), ``"file.py:Class"``, or an instance. An
            instance is rebuilt in a child from its source file and its keyword arguments; where there is no file, as
            in a notebook cell, it runs in this process with isolation ``none`` and every row says so.
        task: A `Task`, or ``"suite:task-id"``.
        defense: Like ``attack``; None is the undefended client, a sequence of instances a chain.
        trials: Trials, numbered from 0.
        trials_per_job: Trials of one batched block.
        model_draws: ``one`` model for all trials or a fresh draw ``per_trial``.
        threads: Threads per process.
        budget: ``wall_seconds`` and ``model_evaluations`` per trial.
        device: Where children compute.
        isolation: ``auto``, ``none``, ``process`` or ``bwrap``.
        season: Key of the victims.
        out: Directory that keeps the rows and lets a later call resume; a temporary one where None.

    Returns:
        One row per trial, columns as in `leakbench.schema`.

    Raises:
        UserError: A name, a value or a file is not as expected.
    """
    from leakbench.runner.execute import Runner  # imports torch
    from leakbench.runner.pool import resume

    local: dict[str, Entry] = {}
    attacks = _specs("attack", attack, local)
    defenses = () if defense is None else _specs("defense", defense, local)
    if len(attacks) != 1:
        raise UserError(f"attack: expected one attack, got {len(attacks)}")
    if local and isolation not in ("auto", "none"):
        raise UserError(
            f"isolation {isolation!r} needs entries in a file, and {', '.join(local)} has none; save the class in a "
            "file and pass 'file.py:Class', or use isolation='none'"
        )
    if trials < 1 or trials_per_job < 1:
        raise UserError(f"trials and trials_per_job: expected at least 1, got {trials} and {trials_per_job}")
    chosen = task if isinstance(task, Task) else load_task(task)
    if chosen.target not in attacks[0].description.recovers:
        raise UserError(
            f"attack {attacks[0].name!r} recovers {', '.join(attacks[0].description.recovers)}, the task's target is "
            f"{chosen.target}; choose another task"
        )
    cell = Cell(
        suite="",
        task=chosen,
        attack=attacks[0],
        defense=defenses,
        trials=trials,
        trials_per_job=trials_per_job,
        model_draws=model_draws,
        threads=threads,
        budget=Budget(**(budget or {})),
    )
    jobs = plan([cell], season)
    files = [path for spec in (*attacks, *defenses) if spec.source for path in spec.source.files]
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        level = "none" if local else isolation
        runner = stack.enter_context(
            Runner(folder, season=season, isolation=level, device=device, files=files, local=local)
        )
        todo = resume(jobs, folder, code_sha256()).todo
        runner.preflight(todo)
        for job in todo:
            runner.run(job)
        rows = load_rows(folder)
    wanted = {job.id for job in jobs}
    return rows[rows["job_id"].isin(wanted)].sort_values("trial").reset_index(drop=True)


def _specs(kind: Kind, given: str | Entry | Sequence[Entry], local: dict[str, Entry]) -> tuple[EntrySpec, ...]:
    if isinstance(given, str):
        return resolve(kind, given)
    entries = [given] if isinstance(given, Entry) else list(given)
    return tuple(_spec(kind, entry, local) for entry in entries)


def _spec(kind: Kind, entry: object, local: dict[str, Entry]) -> EntrySpec:
    """Describe an instance by its source file; without one, keep it for this process."""
    if not isinstance(entry, Entry):
        raise UserError(f"{kind}: expected a name, 'file.py:Class' or an instance, got {type(entry).__name__}")
    cls, params = type(entry), entry.params()
    try:
        path = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        path = Path()
    if path.is_file() and "<locals>" not in cls.__qualname__:
        found = resolve(kind, f"{path}:{cls.__qualname__}")[0]
        return EntrySpec(found.description, {**found.params, **params}, found.source)
    from leakbench.runner.child import describe_class

    name = getattr(cls, "name", cls.__name__)
    fields = {**describe_class(cls, kind, name), "name": name}
    local[name] = entry
    return EntrySpec(Description.model_validate(fields, strict=False), params, None)

"""`evaluate`: one attack on one task from Python, with the planner, boundary and scoring of `leakbench run`."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from pydantic import ValidationError

from leakbench.entries import Description, EntrySpec, describe, resolve
from leakbench.entry import Entry
from leakbench.errors import InvalidOutput, UserError
from leakbench.grids import Budget, Cell, ModelDraws
from leakbench.keys import DEVELOPMENT, Season
from leakbench.provenance import code_sha256
from leakbench.results import load_rows
from leakbench.runner.plan import plan
from leakbench.sources import Kind, find_source
from leakbench.suites import load_task
from leakbench.tasks import Task


def evaluate(
    attack: str | Entry,
    task: str | Task,
    defense: str | Entry | Sequence[str | Entry] | None = None,
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
        defense: Like ``attack``; None is the undefended client, a sequence a chain.
        trials: Trials, numbered from 0.
        trials_per_job: Trials of one batched block.
        model_draws: ``one`` model for all trials or a fresh draw ``per_trial``.
        threads: Threads per process.
        budget: ``wall_seconds`` and ``model_evaluations`` per trial.
        device: Where children compute.
        isolation: ``auto``, ``none``, ``process`` or ``bwrap``.
        season: Key of the victims.
        out: Directory that keeps the rows and lets a later call resume; a temporary one where None. Entries without a
            file are measured anew by every call: nothing tells whether their code changed.

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
    for name, number in (("trials", trials), ("trials_per_job", trials_per_job), ("threads", threads)):
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{name}: expected a whole number of at least 1, got {number!r}; write {name}=1")
    if model_draws not in get_args(ModelDraws):
        raise UserError(f"model_draws: expected 'one' or 'per_trial', got {model_draws!r}")
    if not isinstance(task, Task | str):
        raise UserError(f"task: expected a Task or 'suite:task-id', got {type(task).__name__}")
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
        budget=_budget(budget or {}),
    )
    jobs = plan([cell], season)
    files = [path for spec in (*attacks, *defenses) if spec.source for path in spec.source.files]
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        level = "none" if local else isolation
        runner = stack.enter_context(
            Runner(folder, season=season, isolation=level, device=device, files=files, local=local)
        )
        todo = jobs if local else resume(jobs, folder, code_sha256()).todo
        runner.preflight(todo)
        for job in todo:
            runner.run(job)
        rows = load_rows(folder)
    wanted = {job.id for job in jobs}
    return rows[rows["job_id"].isin(wanted)].sort_values("trial").reset_index(drop=True)


def _budget(given: Mapping[str, Any]) -> Budget:
    try:
        return Budget.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        raise UserError(
            f"budget: {key}: {detail['msg']}, got {detail['input']!r}; write budget={{'wall_seconds': 60}}"
        ) from None


def _specs(kind: Kind, given: str | Entry | Sequence[str | Entry], local: dict[str, Entry]) -> tuple[EntrySpec, ...]:
    specs: list[EntrySpec] = []
    for entry in given if isinstance(given, list | tuple) else [given]:
        specs += resolve(kind, entry) if isinstance(entry, str) else [_spec(kind, entry, local)]
    return tuple(specs)


def _spec(kind: Kind, entry: object, local: dict[str, Entry]) -> EntrySpec:
    """Describe an instance by its source file; without one, keep it for this process."""
    from leakbench.attack import Attack  # imports torch, which an instance has done already
    from leakbench.defense import Defense

    base = Attack if kind == "attack" else Defense
    if not isinstance(entry, base):
        got = f"the class {entry.__name__}" if isinstance(entry, type) else type(entry).__name__
        raise UserError(f"{kind}: expected a name, 'file.py:Class' or an instance of {base.__name__}, got {got}")
    cls = type(entry)
    try:
        params = entry.params()
    except InvalidOutput as error:
        raise UserError(f"{kind}: {error}") from None
    try:
        path = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        path = Path()
    if path.is_file() and "<locals>" not in cls.__qualname__:
        source = find_source(kind, f"{path}:{cls.__qualname__}")
        return EntrySpec(describe([source])[0], params, source)
    from leakbench.runner.loading import describe_class

    name = getattr(cls, "name", cls.__name__)
    if local.setdefault(name, entry) is not entry:
        raise UserError(
            f"{kind}: two instances without a file are called {name!r}; expected one: @register another name"
        )
    try:
        return EntrySpec(Description.model_validate(describe_class(cls, kind, name), strict=False), params, None)
    except (InvalidOutput, ValidationError) as error:
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{kind} {name!r}: {text}") from None

"""From cells to jobs: which blocks of trials there are, what each is called, who does which. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from leakbench.entries import EntrySpec, chain_label
from leakbench.errors import UserError
from leakbench.grids import Cell, KeptFile, ModelDraws
from leakbench.keys import Season
from leakbench.parts import content_hash
from leakbench.stage import IN_TRAINING
from leakbench.tasks import Task


@dataclass(frozen=True)
class Job:
    """One block of trials of one task under one attack and one defense; its result is one Parquet file.

    Args:
        suite: Name of the suite; a column of the rows, no part of the identity.
        task: The task.
        attack: The attack; of ``leakbench measure`` the measure, which takes its place.
        defense: The chain of defenses; empty for none.
        start: First trial.
        stop: One past the last trial.
        model_draws: Whether all trials share a model or each has its own draw.
        threads: Threads of each process.
        wall_seconds: Wall seconds per trial that the attack may spend; None: unlimited.
        model_evaluations: Gradient evaluations per trial that the attack may spend; None: unlimited.
        season: Name and key of the victims' draw.
        kept: One update for each trial, where no client is asked: stage ``in_training``.
    """

    suite: str
    task: Task
    attack: EntrySpec
    defense: tuple[EntrySpec, ...]
    start: int
    stop: int
    model_draws: ModelDraws
    threads: int
    wall_seconds: float | None
    model_evaluations: int | None
    season: Season
    kept: tuple[KeptFile, ...] = ()

    @property
    def trials(self) -> range:
        """The block's trials."""
        return range(self.start, self.stop)

    @property
    def label(self) -> str:
        """Readable name."""
        cell = f"{self.task.id} / {self.attack.label} / {chain_label(self.defense)}"
        return f"{cell} [{self.start}:{self.stop}]"

    @cached_property
    def id(self) -> str:
        """Sha256 (hex) of everything that decides the rows, except leakbench's own code (a column of the rows)."""
        return content_hash(self.content())

    def content(self) -> dict[str, Any]:
        """Return what the id covers. JSON-able; holds the season's commitment, never its key."""
        from leakbench.results import BENCHMARK_VERSION, SCHEMA_VERSION  # imports pandas

        content: dict[str, Any] = {
            "benchmark_version": BENCHMARK_VERSION,
            "schema_version": SCHEMA_VERSION,
            "season": self.season.commitment,
            "task": self.task.hash,
            "attack": self.attack.id_content(),
            "defense": [part.id_content() for part in self.defense],
            "block": [self.start, self.stop],
            "model_draws": self.model_draws,
            "threads": self.threads,
            "wall_seconds": self.wall_seconds,
            "model_evaluations": self.model_evaluations,
        }
        return content | {"kept": [file.sha256 for file in self.kept]} if self.kept else content


def plan(cells: Iterable[Cell], season: Season) -> list[Job]:
    """Cut every cell into jobs of ``trials_per_job`` trials: job k holds the trials [k*b, min((k+1)*b, trials)).

    Counted from ``cell.first``.

    Returns:
        Distinct jobs, sorted by task, defense, attack and block, so that jobs that share data and models are neighbors.

    Raises:
        UserError: A task is of stage ``in_training`` and there are no updates for it.
    """
    jobs: dict[str, Job] = {}
    for cell in cells:
        if cell.task.stage == IN_TRAINING and not cell.kept:
            raise UserError(
                f"stage {IN_TRAINING}: no model is trained to it; it is of updates that leakbench utility kept; type: "
                "leakbench run SUITE --in-training OUT"
            )
        stop = cell.first + cell.trials
        for start in range(cell.first, stop, cell.trials_per_job):
            end = min(start + cell.trials_per_job, stop)
            job = Job(
                suite=cell.suite,
                task=cell.task,
                attack=cell.attack,
                defense=cell.defense,
                start=start,
                stop=end,
                model_draws=cell.model_draws,
                threads=cell.threads,
                wall_seconds=cell.budget.wall_seconds,
                model_evaluations=cell.budget.model_evaluations,
                season=season,
                kept=cell.kept[start - cell.first : end - cell.first],
            )
            jobs.setdefault(job.id, job)
    return sorted(
        jobs.values(), key=lambda j: (j.task.id, j.task.hash, chain_label(j.defense), j.attack.label, j.start)
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of ``i/n``, the i-th of n shards, counted from 1.

    Raises:
        UserError: It is not of that form, or i is not in 1..n.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--shard {text}: expected I/N with 1 <= I <= N, e.g. --shard 1/2")
    return index, count


def shard(jobs: Iterable[Job], index: int, count: int) -> list[Job]:
    """Return the jobs of the ``index``-th of ``count`` shards (from 1); a job's shard follows from its id alone."""
    return [job for job in jobs if int(job.id, 16) % count == index - 1]

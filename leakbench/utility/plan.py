"""From a suite to trainings: which there are, and which learning rate each defense gets. No torch here.

A training is a `Job` whose ``attack`` holds what is special about it and whose only trial is the seed, so that jobs,
resumption and workers are those of `leakbench run`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from leakbench.entries import NO_DEFENSE, Description, EntrySpec, chain_label, resolve_all
from leakbench.errors import UserError
from leakbench.grids import Budget, Cell, Suite
from leakbench.keys import Season
from leakbench.parts import content_hash
from leakbench.runner.plan import Job, plan
from leakbench.tasks import BatchSpec, Task
from leakbench.utility.spec import UtilityGrid

TRAINING = Description(
    kind="measure", name="utility", class_name="", version=1, reference="", summary="federated training from scratch"
)
"""What stands where other jobs have an attack."""


@dataclass(frozen=True)
class Setting:
    """What one defense is trained in: everything but learning rate and seed.

    Args:
        suite: The suite.
        grid: What it spans.
        task: Dataset, architecture, batch and protocol; the learning rate is replaced.
        partition: How examples are spread over clients.
        defense: The chain of defenses; empty for none.
    """

    suite: Suite
    grid: UtilityGrid
    task: Task
    partition: str
    defense: tuple[EntrySpec, ...] = field(default_factory=tuple)

    @property
    def label(self) -> str:
        """Readable name."""
        return f"{self.task.dataset} / {self.task.architecture.label} / {self.partition} / {chain_label(self.defense)}"

    @property
    def params(self) -> dict[str, Any]:
        """What is special about its trainings, but for the learning rate."""
        grid = self.grid
        return {
            "partition": self.partition,
            "clients": grid.clients,
            "rounds": grid.rounds,
            "holdout": grid.holdout,
            "lr_grid": json.dumps(sorted(set(grid.lr))),
            "planned_seeds": grid.seeds,
            "evaluate_every": grid.evaluate_every,
            "keep": grid.keep,
        }

    @property
    def content(self) -> dict[str, Any]:
        """What tells it from others: a grid's list of defenses is no part of it."""
        return {
            "task": self.task.hash,
            "defense": [part.id_content() for part in self.defense],
            "threads": self.suite.threads_per_job,
            **self.params,
        }

    def jobs(self, lr: float, seeds: int, season: Season) -> list[Job]:
        """Return the trainings with a learning rate, by seed."""
        params = self.params | {"lr": lr}
        task = self.task.model_copy(update={"protocol": self.task.protocol.model_copy(update={"lr": lr})})
        shown = {name: value for name, value in params.items() if name not in ("partition", "lr")}
        cell = Cell(
            suite=self.suite.name,
            task=task,
            attack=EntrySpec(TRAINING.model_copy(update={"params": shown}), params, None),
            defense=self.defense,
            trials=seeds,
            trials_per_job=1,
            model_draws="per_trial",
            threads=self.suite.threads_per_job,
            budget=Budget(wall_seconds=None),
        )
        return plan([cell], season)

    def candidates(self, season: Season) -> list[Job]:
        """Return the trainings by which the learning rate is chosen: all rates with the first seed.

        Of a single rate all seeds, as there is nothing to choose.
        """
        seeds = 1 if len(self.grid.lr) > 1 else self.grid.seeds
        return [job for lr in self.grid.lr for job in self.jobs(lr, seeds, season)]


def settings(suite: Suite, defenses: Sequence[str] = ()) -> list[Setting]:
    """Return what is to be trained, each once; the undefended client first.

    Args:
        suite: The suite.
        defenses: Expressions instead of the suite's.

    Raises:
        UserError: The suite says nothing of utility, or an expression is wrong.
    """
    if not suite.utility:
        raise UserError(
            f"suite {suite.name!r} says nothing of federated training: expected the key utility, e.g. "
            "utility: {dataset: mnist, architecture: lenet5, rounds: 60, lr: [0.1, 0.3]}"
        )
    of_attacks = dict.fromkeys(text for grid in suite.grids for text in grid.defenses)
    chosen = [tuple(dict.fromkeys((NO_DEFENSE, *(defenses or grid.defenses or of_attacks)))) for grid in suite.utility]
    known = resolve_all([("defense", text) for texts in chosen for text in texts])
    found: dict[str, Setting] = {}
    for grid, texts in zip(suite.utility, chosen, strict=True):
        axes = (texts, grid.dataset, grid.architecture, grid.protocol, grid.partition)
        for text, dataset, architecture, protocol, partition in product(*axes):
            task = Task(
                dataset=dataset,
                normalise=grid.normalise,
                architecture=architecture,
                batch=BatchSpec(size=grid.batch_size),
                protocol=protocol,
            )
            setting = Setting(suite, grid, task, partition, known["defense", text])
            found.setdefault(content_hash(setting.content), setting)
    return list(found.values())


def best_rate(jobs: Iterable[Job], holdout: Mapping[str, float | None]) -> float | None:
    """Return the learning rate of the best accuracy on what was held out; of equal ones the first.

    Args:
        jobs: The candidates, in the declared order.
        holdout: That accuracy by job id; of a training that failed the chance level.

    Returns:
        None where nothing could be trained.
    """
    best: tuple[float, float] | None = None
    for job in jobs:
        accuracy = holdout.get(job.id)
        if accuracy is not None and (best is None or accuracy > best[0]):
            best = (accuracy, float(job.attack.params["lr"]))  # type: ignore[arg-type]
    return None if best is None else best[1]

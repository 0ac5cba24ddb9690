"""Grids: what a suite spans, and the cells it expands to. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from leakbench.autoleak import CONTROL, ENSEMBLES, check_budget, is_meant, spelled_out
from leakbench.entries import NO_DEFENSE, EntrySpec, chain_label, resolve_all
from leakbench.errors import UserError
from leakbench.measures.catalogue import DEFAULT, MEASURES, resolve_measure
from leakbench.parts import Axis, Part, axis
from leakbench.stage import Stage
from leakbench.tasks import Architecture, AttributeSpec, BatchSpec, Protocol, Target, Task, ThreatModel
from leakbench.utility.spec import UtilityGrid

ModelDraws = Literal["one", "per_trial"]


class Budget(Part):
    """What an attack may spend on one trial."""

    wall_seconds: Annotated[float, Field(gt=0)] | None = 60.0
    """Wall seconds per trial; a job may take this times its trials."""
    model_evaluations: Annotated[int, Field(ge=1)] | None = None
    """Gradient evaluations per trial; null: unlimited."""


class Grid(Part):
    """Axes of a grid: each is one value or a list, the grid is their product."""

    dataset: Axis[str]
    """Names in leakbench.data or ``.npz`` files."""
    architecture: Annotated[tuple[Architecture, ...], axis("name"), Field(min_length=1)]
    """Names, or mappings with name, init, params."""
    stage: Axis[Stage] = ("untrained",)
    """How far the model was trained."""
    batch: Annotated[tuple[BatchSpec, ...], axis("size"), Field(min_length=1)] = (BatchSpec(),)
    """Batch sizes, or mappings with size, sampler, alpha."""
    protocol: Annotated[tuple[Protocol, ...], axis("sends"), Field(min_length=1)] = (Protocol(),)
    """What is sent (``gradient``), or mappings."""
    threat_model: Annotated[tuple[ThreatModel, ...], axis(), Field(min_length=1)] = (ThreatModel(),)
    """Mappings of what the adversary knows and may do."""
    normalise: Axis[bool] = (True,)
    """Whether inputs are normalised."""
    target: Axis[Target] = ("labels",)
    """What is to be recovered."""
    attribute: Annotated[tuple[AttributeSpec, ...], axis("name")] = ()
    """With target ``attribute``, and no part of the product elsewhere: names, or mappings with name, value, mix."""
    attacks: Annotated[tuple[str, ...], axis()] = ()
    """Attack expressions; may be empty where there are measures. ``autoleak`` stands for its members, which are run
    against ``null_update`` as well, and brings along the attacks that each defense has to face."""
    measures: Annotated[tuple[str, ...], axis()] = ()
    """Measure expressions, for ``leakbench measure``."""
    defenses: Axis[str] = (NO_DEFENSE,)
    """Defense expressions; ``none`` is the undefended client."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Trials of every cell, instead of the suite's."""
    model_draws: ModelDraws | None = None
    """Instead of the suite's."""

    younger: ClassVar[frozenset[str]] = frozenset({"attribute", "measures"})

    @model_validator(mode="after")
    def _every_task_is_one(self) -> Grid:
        if self.attribute and "attribute" not in self.target:
            raise ValueError("attribute: needs target: attribute, which this grid lacks")
        if not (self.attacks or self.measures):
            raise ValueError("expected attacks, measures or both, got neither")
        try:
            list(self.tasks())
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def chosen(self, attacks: Sequence[str] | None) -> Sequence[str]:
        """Return the attacks of this grid, or those given instead; none where the grid is for measures only.

        Members of AutoLeak stand in its place.

        Raises:
            UserError: It has none for the grid's targets.
        """
        return spelled_out(attacks or self.attacks, self.target) if self.attacks else ()

    def tasks(self) -> Iterator[Task]:
        """Yield the tasks of the grid."""
        axes = ("dataset", "architecture", "stage", "batch", "protocol", "threat_model", "normalise")
        asked: list[dict[str, Any]] = []
        for target in self.target:
            specs = (self.attribute or (None,)) if target == "attribute" else (None,)
            asked += [{"target": target, "attribute": spec} for spec in specs]
        for *values, what in product(*(getattr(self, name) for name in axes), asked):
            yield Task(**dict(zip(axes, values, strict=True)), **what)


class KeptFile(NamedTuple):
    """An update that a federated training kept, in a file of its own; see `leakbench.utility.kept`."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Cell:
    """One task under one attack and one defense: all its trials.

    Args:
        suite: Name of the suite; empty where there is none.
        task: The task.
        attack: The attack, or the measure that takes its place.
        defense: The chain of defenses; empty for none.
        trials: Number of trials.
        trials_per_job: Trials of one job.
        model_draws: Whether all trials share a model or each has its own draw.
        threads: Threads per process.
        budget: What the attack may spend.
        kept: One update for each trial, where no client is asked: stage ``in_training``.
        first: Number of the first trial.
    """

    suite: str
    task: Task
    attack: EntrySpec
    defense: tuple[EntrySpec, ...] = ()
    trials: int = 64
    trials_per_job: int = 64
    model_draws: ModelDraws = "one"
    threads: int = 1
    budget: Budget = field(default_factory=Budget)
    kept: tuple[KeptFile, ...] = ()
    first: int = 0

    @property
    def label(self) -> str:
        """Readable name."""
        return f"{self.task.id} / {self.attack.label} / {chain_label(self.defense)}"


class Suite(Part):
    """Grids of tasks, attacks and defenses."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name in rows and on the command line."""
    version: Annotated[int, Field(ge=1)]
    """Raised when a cell changes."""
    description: str
    """One line."""
    trials: Annotated[int, Field(ge=1)]
    """Trials of every cell."""
    trials_per_job: Annotated[int, Field(ge=1)] = 64
    """Trials of one job: the only cut of the work, part of a row's identity."""
    model_draws: ModelDraws = "one"
    """``one``: all trials share a model; ``per_trial``: each has its own draw."""
    threads_per_job: Annotated[int, Field(ge=1)] = 1
    """Threads of each process of a job."""
    budget: Budget = Budget()
    """What an attack may spend."""
    grids: Annotated[list[Grid], Field(min_length=1)]
    """The grids."""
    utility: Annotated[tuple[UtilityGrid, ...], axis()] = ()
    """Federated trainings, for ``leakbench utility``."""

    younger: ClassVar[frozenset[str]] = frozenset({"utility"})

    def tasks(self) -> dict[str, Task]:
        """Return the distinct tasks by hash."""
        return {task.hash: task for grid in self.grids for task in grid.tasks()}

    def expand(
        self,
        *,
        attacks: Sequence[str] | None = None,
        defenses: Sequence[str] | None = None,
        trials: int | None = None,
    ) -> list[Cell]:
        """Return every cell once.

        Args:
            attacks: Expressions that replace the attacks of the grids whose target they recover.
            defenses: Expressions that replace the defenses of every grid.
            trials: Replaces the number of trials of every cell.

        Raises:
            UserError: An expression is wrong, or no grid has a target that one of ``attacks`` recovers.
        """
        if trials is not None and trials < 1:
            raise UserError(f"trials: expected at least 1, got {trials}; try --trials {self.trials}")
        targets = {target for grid in self.grids if grid.attacks for target in grid.target}
        ensembles = [any(map(is_meant, (attacks or grid.attacks) if grid.attacks else ())) for grid in self.grids]
        if attacks:
            attacks = spelled_out(attacks, sorted(targets))
        known = resolve_all(
            [("attack", text) for grid in self.grids for text in grid.chosen(attacks)]
            + [("defense", text) for grid in self.grids for text in (defenses or grid.defenses)]
            + [("defense", CONTROL)] * any(ensembles)
        )
        for text in attacks or ():
            recovers = known["attack", text][0].description.recovers
            if not targets & set(recovers):
                raise UserError(
                    f"attack {text!r} recovers {' and '.join(recovers)}, expected one that recovers "
                    f"{' or '.join(sorted(targets))}, the target of suite {self.name!r}; see: leakbench list attacks"
                )
        cells: dict[str, Cell] = {}
        for grid in self.grids:
            for task, text, chain in product(grid.tasks(), grid.chosen(attacks), defenses or grid.defenses):
                attack = known["attack", text][0]
                if task.target in attack.description.recovers:
                    self._add(cells, grid, task, attack, known["defense", chain], trials)
        for grid in (grid for grid, ensemble in zip(self.grids, ensembles, strict=True) if ensemble):
            chains = [known["defense", chain] for chain in defenses or grid.defenses]
            named = _adaptive(chains, {known["attack", text][0].name for text in grid.chosen(attacks)})
            for task in (task for task in grid.tasks() if task.target in ENSEMBLES):
                check_budget(task.target, self.budget.model_evaluations)
                for text in ENSEMBLES[task.target].members:
                    self._add(cells, grid, task, known["attack", text][0], known["defense", CONTROL], trials)
                for special, parts in named:
                    if task.target in special.description.recovers:
                        self._add(cells, grid, task, special, parts, trials)
        return list(cells.values())

    def expand_measures(
        self,
        *,
        measures: Sequence[str] | None = None,
        defenses: Sequence[str] | None = None,
        trials: int | None = None,
    ) -> list[Cell]:
        """Return every cell of `leakbench measure` once; a measure stands where other cells have an attack.

        Args:
            measures: Expressions that replace the measures of every grid. Without them and in a suite that names none:
                the default ones, on every grid.
            defenses: Expressions that replace the defenses of every grid.
            trials: Replaces the number of trials of every cell.

        Raises:
            UserError: An expression is wrong.
        """
        if trials is not None and trials < 1:
            raise UserError(f"trials: expected at least 1, got {trials}; try --trials {self.trials}")
        given = measures or (() if any(grid.measures for grid in self.grids) else DEFAULT)
        known = resolve_all([("defense", text) for grid in self.grids for text in (defenses or grid.defenses)])
        cells: dict[str, Cell] = {}
        for grid in self.grids:
            for task, text, chain in product(grid.tasks(), given or grid.measures, defenses or grid.defenses):
                self._add(cells, grid, task, resolve_measure(text), known["defense", chain], trials)
        return list(cells.values())

    def _add(
        self,
        cells: dict[str, Cell],
        grid: Grid,
        task: Task,
        attack: EntrySpec,
        defense: tuple[EntrySpec, ...],
        trials: int | None,
    ) -> None:
        """Add a cell, unless it is there with as many trials."""
        count = trials or grid.trials or self.trials
        fitted = attack.description.kind == "measure" and MEASURES.get(attack.name).fitted
        cell = Cell(
            suite=self.name,
            task=task,
            attack=attack,
            defense=defense,
            trials=count,
            trials_per_job=count if fitted else self.trials_per_job,
            model_draws=grid.model_draws or self.model_draws,
            threads=self.threads_per_job,
            budget=self.budget,
        )
        entries = [entry.id_content() for entry in (attack, *defense)]
        same = f"{task.hash} {entries} {cell.model_draws}"
        if same not in cells or cells[same].trials < count:
            cells[same] = cell


def _adaptive(
    chains: Sequence[tuple[EntrySpec, ...]], run: Collection[str]
) -> list[tuple[EntrySpec, tuple[EntrySpec, ...]]]:
    """Return the attacks that defenses have to face, each with the chain that names it, without those that ``run``."""
    pairs = [
        (name, chain)
        for chain in chains
        for name in dict.fromkeys(name for part in chain for name in part.description.adaptive)
        if name not in run
    ]
    known = resolve_all([("attack", name) for name, _ in pairs])
    return [(known["attack", name][0], chain) for name, chain in pairs]

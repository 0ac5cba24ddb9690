"""The engine: an objective, priors, an optimiser and a space, run for all trials and restarts as one tensor program."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leakbench.attack import TRACE_LIMIT, Attack, Recovery
from leakbench.errors import UserError
from leakbench.inversion.labels import LabelSource
from leakbench.inversion.objectives import Objective
from leakbench.inversion.optimisers import Adam, Optimiser
from leakbench.inversion.priors import Prior
from leakbench.inversion.rows import Rows, model_of_rows, spread
from leakbench.inversion.sources import OneStep, Source
from leakbench.inversion.spaces import Pixels, Space
from leakbench.knowledge import Knowledge
from leakbench.models.taps import layer_outputs
from leakbench.observation import Observation


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Search inputs whose gradient looks like the one that was sent.

    Of all iterates the one with the least visible objective (priors included) is kept, of all restarts the one with the
    least distance of gradients; the private inputs are never asked.

    Args:
        objective: Distance of gradients.
        steps: Steps of the optimiser; fewer where the budget of gradient evaluations ends earlier.
        optimiser: Rule of a step.
        priors: Penalties on the inputs.
        restarts: R, random starts; fewer where the budget is below R.
        space: What is optimised, and where it starts.
        source: Where the candidates' gradients come from.
        labels: Label attack that runs first where labels are not granted, or ``joint``.
        stop: A row whose distance falls below this rests from then on; never where None.
        noise: Standard deviation of normal noise that is added to the inputs' gradient (Langevin), times the step size
            of the moment.
        late: Share of the steps after which the priors count; before, the distance alone does. The best iterate is
            sought from then on.
        chunk: Most trials computed at once; by the shapes and the memory at hand where None.

    Raises:
        UserError: ``steps`` or ``restarts`` is below 1, ``late`` is no share, ``noise`` is negative or not on pixels,
            or ``labels`` names no entry.
    """

    objective: Objective
    steps: int
    optimiser: Optimiser = field(default_factory=Adam)
    priors: tuple[Prior, ...] = ()
    restarts: int = 1
    space: Space = field(default_factory=Pixels)
    source: Source = field(default_factory=OneStep)
    labels: str = "llg"
    stop: float | None = None
    noise: float = 0.0
    late: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"expected steps and restarts of at least 1, got {self.steps} and {self.restarts}")
        if not 0 <= self.late < 1:
            raise UserError(f"expected 0 <= late < 1, got {self.late}")
        if self.noise < 0 or (self.noise and not isinstance(self.space, Pixels)):
            raise UserError(f"expected noise of at least 0, on pixels only, got {self.noise}")
        LabelSource(self.labels).check()

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Do what `Attack.prepare` has to do for an inversion: prepare the label attack, decline unsuitable tasks.

        Raises:
            NotApplicable: A part needs what the task does not have.
            NotGranted: A part needs what the threat model withholds.
        """
        self.source.check(knowledge)
        if self.objective.units == "gradient" and knowledge.sends != "gradient":
            _ = knowledge.lr, knowledge.local_steps  # withheld ones decline the task
        for prior in self.priors:
            prior.check(knowledge)
        return LabelSource(self.labels).prepare(knowledge)

    def run(self, observation: Observation) -> Recovery:
        """Recover inputs (T, K * N, *input_shape), and the labels they were recovered with."""
        before = observation.evaluations
        labels = LabelSource(self.labels).labels(observation)
        spent = observation.evaluations - before
        target = self.source.target(observation, self.objective.units)
        target = {name: value for name, value in target.items() if name not in observation.withheld} or target
        steps, restarts = self._within(observation, spent)
        clock = _Clock(observation, steps)
        size = self.chunk or default_chunk(observation, restarts)
        found: list[_Found] = []
        first, trials = 0, observation.trials
        while first < trials:
            last = min(trials, first + size)
            clock.cut(first, last)
            try:
                part = {name: value[first:last] for name, value in target.items()}
                known = None if labels is None else labels[first:last]
                found.append(_Search(self, observation.block(first, last), part, known, restarts).run(steps, clock))
            except (RuntimeError, MemoryError) as error:
                if last - first == 1 or not _out_of_memory(error):
                    raise
                size = math.ceil((last - first) / 2)
                torch.cuda.empty_cache()
                continue
            first = last
        evaluations = restarts * (steps * self.optimiser.evaluations + 1) * self.source.evaluations(observation)
        return Recovery(
            inputs=torch.cat([part.inputs for part in found]),
            label_counts=_counts(torch.cat([part.classes for part in found]), observation.num_classes),
            visible_loss=torch.cat([part.loss for part in found]),
            visible_loss_trace=torch.cat([part.trace for part in found]),
            model_evaluations=evaluations + spent,
            notes={name: torch.cat([part.notes[name] for part in found]) for name in found[0].notes} | {"chunk": size},
        )

    def _within(self, observation: Observation, spent: int) -> tuple[int, int]:
        """Return the steps and restarts that the budget pays for; the last comparison costs one evaluation each."""
        if observation.budget is None:
            return self.steps, self.restarts
        budget = (observation.budget - spent) // self.source.evaluations(observation)
        restarts = min(self.restarts, max(1, budget))
        return max(0, min(self.steps, (budget // restarts - 1) // self.optimiser.evaluations)), restarts


class InversionAttack(Attack):
    """An attack that is an `Inversion` and nothing else; the subclass sets `inversion` in its constructor."""

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size", "weights"})
    inversion: Inversion

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Prepare the label attack, if there is one, and decline unsuitable tasks; see `Inversion.prepare`."""
        return self.fitted(knowledge).prepare(knowledge)

    def run(self, observation: Observation) -> Recovery:
        """Optimise inputs (T, K * N, *input_shape) of all trials and restarts together."""
        return self.fitted(observation).run(observation)

    def fitted(self, knowledge: Knowledge) -> Inversion:  # noqa: ARG002  (neutral default of a hook)
        """Return the inversion for a task.

        Raises:
            NotApplicable: The task does not suit the attack.
        """
        return self.inversion


@dataclass(frozen=True)
class _Found:
    """What one chunk of T trials came to: the chosen restart of each."""

    inputs: Tensor
    classes: Tensor
    loss: Tensor
    trace: Tensor
    notes: dict[str, Tensor]


class _Search:
    """One chunk of trials: leaves, the best iterate so far, and the trace of the visible distance."""

    def __init__(
        self,
        inversion: Inversion,
        observation: Observation,
        target: Mapping[str, Tensor],
        labels: Tensor | None,
        restarts: int,
    ) -> None:
        self.inversion = inversion
        self.priors = () if inversion.late else inversion.priors
        self.observation = observation
        count = observation.total_inputs
        space, dtype = inversion.space, observation.model.dtype
        start = {name: v.to(dtype) for name, v in space.start(observation, restarts, count).items()}
        some = next(iter(start.values()))
        rows = len(some)
        if labels is None:
            start["labels"] = observation.randn(restarts, count, observation.num_classes).flatten(0, 1).to(dtype)
            labels = torch.zeros(rows // restarts, count, dtype=torch.int64, device=some.device)
        like = some.new_zeros(rows)
        self.scalars = {**inversion.source.unknowns(like), **inversion.objective.unknowns(like)}
        self.leaves = {name: value.clone().requires_grad_() for name, value in (start | self.scalars).items()}
        self.rows = Rows(
            observation,
            restarts,
            model_of_rows(observation.model, restarts),
            {name: spread(value, restarts) for name, value in target.items()},
            spread(labels, restarts),
        )
        low, high = observation.bounds
        self.bounds = low.to(some.device, dtype), high.to(some.device, dtype)
        self.best = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        self.least = torch.full_like(like, math.inf)
        self.score = torch.full_like(like, math.inf)
        self.resting = torch.zeros(rows, dtype=torch.bool, device=some.device)
        self.trace: list[Tensor] = []
        self.step_size = 1.0

    def run(self, steps: int, clock: _Clock) -> _Found:
        """Take ``steps`` steps; return the best iterate of the best restart."""
        step = self.inversion.optimiser.start(self.leaves, steps)
        begin = min(math.ceil(self.inversion.late * steps), steps - 1)
        for i in range(steps):
            if i == begin:
                self.priors, self.least = self.inversion.priors, torch.full_like(self.least, math.inf)
            resting = {name: leaf.detach().clone() for name, leaf in self.leaves.items()} if self._rests() else {}
            self.step_size = self.inversion.optimiser.step_size(i, steps)
            step(self._evaluate)
            for name, value in resting.items():
                mask = self.resting.view(-1, *(1,) * (value.dim() - 1))
                with torch.no_grad():
                    self.leaves[name].copy_(torch.where(mask, value, self.leaves[name]))
            self.inversion.space.project(self.leaves, self.bounds)
            self.inversion.source.project(self.leaves)
            if i * (TRACE_LIMIT - 1) % steps < TRACE_LIMIT - 1:
                self.trace.append(self.score)
            clock.tick(i + 1, self.score)
            if self.inversion.stop is not None and bool(self.resting.all()):
                break
        self._evaluate(final=True)
        self.trace.append(self.score)
        return self._chosen(steps)

    def _rests(self) -> bool:
        """Note which rows are good enough; whether there are any."""
        if self.inversion.stop is None:
            return False
        self.resting = self.resting | (self.score < self.inversion.stop)
        return bool(self.resting.any())

    def _evaluate(self, final: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective (Q,) and its gradients; keep the iterates that are the best so far."""
        objective, leaves = self.inversion.objective, self.leaves
        inputs = self.inversion.space.inputs(leaves)
        labels = leaves["labels"].softmax(-1) if "labels" in leaves else self.rows.classes
        compared = self.inversion.source.compare(self.rows, inputs, labels, leaves, elementwise=objective.elementwise)
        distance = objective(compared, leaves)
        penalty = torch.zeros_like(distance)
        for prior in self.priors:
            penalty = penalty + prior(inputs, self.rows)
        with torch.no_grad():
            judge = objective.judge
            score = distance.detach() if judge is objective else judge(compared, leaves)
            visible = (score + penalty).detach()
            better = (visible < self.least) & ~self.resting
            self.least = torch.where(better, visible, self.least)
            self.score = torch.where(better, score, self.score)
            for name, leaf in leaves.items():
                self.best[name] = torch.where(better.view(-1, *(1,) * (leaf.dim() - 1)), leaf, self.best[name])
        if final:
            return distance, {}
        total = distance + penalty
        found = torch.autograd.grad(total.sum(), list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if g is None else g.nan_to_num()
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }
        if self.inversion.noise:
            shape = gradients["inputs"].shape
            draw = self.observation.randn(self.rows.restarts, *shape[1:]).view(shape).to(inputs.dtype)
            gradients["inputs"] = gradients["inputs"] + self.inversion.noise * self.step_size * draw
        return total.detach(), gradients

    def _chosen(self, steps: int) -> _Found:
        """Return, per trial, the restart with the least distance."""
        restarts = self.rows.restarts
        score = self.score.view(-1, restarts)
        rows = torch.arange(len(score), device=score.device) * restarts + score.nan_to_num(math.inf).argmin(1)
        inputs = self.inversion.space.inputs(self.best).detach()[rows].nan_to_num()
        low, high = self.bounds
        classes = self.best["labels"].argmax(-1) if "labels" in self.best else self.rows.classes
        limit = torch.finfo(score.dtype).max
        return _Found(
            inputs.clamp(low, high),
            classes[rows],
            self.score[rows].clamp(max=limit),
            torch.stack(self._trace(steps))[:, rows].T.clamp(max=limit),
            {name: self.best[name][rows] for name in self.scalars},
        )

    def _trace(self, steps: int) -> list[Tensor]:
        """Return the trace; one that ended early goes on with its last value, so that all chunks' are as long."""
        length = 1 + sum(i * (TRACE_LIMIT - 1) % steps < TRACE_LIMIT - 1 for i in range(steps))
        return self.trace + self.trace[-1:] * (length - len(self.trace))


class _Clock:
    """Reports progress over all chunks: steps done, the mean of the best distances, steps per second."""

    def __init__(self, observation: Observation, steps: int) -> None:
        self._observation = observation
        self._steps = max(1, steps)
        self._first = self._size = 0
        self._begun = self._told = time.monotonic()

    def cut(self, first: int, last: int) -> None:
        """Note the chunk at work."""
        self._first, self._size = first, last - first

    def tick(self, step: int, score: Tensor) -> None:
        """Report at most four times a second, and at the end of a chunk."""
        now = time.monotonic()
        if now - self._told < 0.25 and step < self._steps:
            return
        self._told = now
        trials = self._observation.trials
        done = (self._first * self._steps + self._size * step) // trials
        rate = done / max(now - self._begun, 1e-9)
        loss = float(score[score.isfinite()].mean()) if bool(score.isfinite().any()) else None
        self._observation.progress(done, self._steps, loss, rate=rate)


def default_chunk(observation: Observation, restarts: int) -> int:
    """Return the trials computed at once: by shapes alone on a CPU, and by the free memory on a GPU.

    On a CPU a few large nets, or some hundred small ones, are as fast as any number, and a number that does not depend
    on the machine keeps rows bit-equal.
    """
    model = observation.model
    count = observation.total_inputs
    weights = sum(value[0].numel() for value in model.parameters.values())
    # Measured: the target, a gradient and its derivative; five times what the layers return.
    row = restarts * (3 * weights + 5 * count * layer_outputs(model)) * model.dtype.itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return max(1, free // 2 // row)
    return max(1, min(256 // restarts, 2**31 // row))


def _counts(classes: Tensor, num_classes: int) -> Tensor:
    """Return counts (T, 1, C) of classes (T, N)."""
    return torch.nn.functional.one_hot(classes, num_classes).sum(1, keepdim=True)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text

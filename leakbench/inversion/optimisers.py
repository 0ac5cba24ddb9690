"""Optimisers of many independent rows at once: what happens to a row does not depend on the others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from leakbench.errors import UserError

Leaves = Mapping[str, Tensor]
"""What is optimised, (Q, *) by name; changed in place."""
Evaluate = Callable[[], tuple[Tensor, dict[str, Tensor]]]
"""Returns the objective (Q,) and its gradients (Q, *) by name."""
Step = Callable[[Evaluate], None]


class Optimiser(ABC):
    """A rule that moves leaves downhill."""

    evaluations: int = 1
    """Evaluations that one step may take."""

    @abstractmethod
    def start(self, leaves: Leaves, steps: int) -> Step:
        """Return the function that takes one of ``steps`` steps."""

    @abstractmethod
    def step_size(self, step: int, steps: int) -> float:
        """Return the step size at ``step`` of ``steps``."""


@dataclass(frozen=True, kw_only=True)
class Adam(Optimiser):
    """Adam, on the gradient or on its sign.

    Args:
        lr: Step size.
        rates: Other step sizes, by leaf.
        betas: Decay of the moments.
        sign: ``hard`` takes the sign of the inputs' gradient, ``soft`` tanh(s g) / s with s falling from 1 to 0.
        schedule: ``steps`` divides the step size by ten after 3/8, 5/8 and 7/8 of the steps, ``cosine`` lets it fall
            to 0.
        warmup: Steps in which it rises from 0.

    Raises:
        UserError: ``lr`` is not positive.
    """

    lr: float = 0.1
    rates: Mapping[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    sign: Literal["none", "hard", "soft"] = "none"
    schedule: Literal["none", "steps", "cosine"] = "none"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr: expected a positive step size such as 0.1, got {self.lr}")

    def start(self, leaves: Leaves, steps: int) -> Step:
        """Return the function that takes one of ``steps`` steps."""
        groups = [{"params": [leaf], "lr": self.rates.get(name, self.lr)} for name, leaf in leaves.items()]
        adam = torch.optim.Adam(groups, lr=self.lr, betas=self.betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: self.factor(step, steps))

        def step(evaluate: Evaluate) -> None:
            _, gradients = evaluate()
            left = 1 - scheduler.last_epoch / steps
            for name, leaf in leaves.items():
                leaf.grad = self._transform(gradients[name], left) if name == "inputs" else gradients[name]
            adam.step()
            scheduler.step()

        return step

    def step_size(self, step: int, steps: int) -> float:
        """Return the step size at ``step`` of ``steps``."""
        return self.lr * self.factor(step, steps)

    def factor(self, step: int, steps: int) -> float:
        """Return the step size at ``step`` of ``steps`` as a share of the full one."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup)))
        if self.schedule == "steps":
            return float(0.1 ** sum(step >= steps // part for part in (2.667, 1.6, 1.142)))
        return 1.0

    def _transform(self, gradient: Tensor, left: float) -> Tensor:
        if self.sign == "hard":
            return gradient.sign()
        if self.sign == "soft":
            return (left * gradient).tanh() / left
        return gradient


@dataclass(frozen=True, kw_only=True)
class LBFGS(Optimiser):
    """L-BFGS without line search, as `torch.optim.LBFGS` does it, for every row on its own.

    Args:
        lr: Step size; the first step is at most ``lr`` over the gradient's L1 norm.
        inner: Iterations of one step.
        history: Pairs that are kept.
        tolerance_grad: A row rests until the next step where its largest gradient entry is not above this.
        tolerance_change: The same for its move and for the change of the objective.
    """

    lr: float = 1.0
    inner: int = 20
    history: int = 100
    tolerance_grad: float = 1e-7
    tolerance_change: float = 1e-9

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Evaluations that one step may take."""
        return self.inner

    def start(self, leaves: Leaves, steps: int) -> Step:  # noqa: ARG002
        """Return the function that takes one of ``steps`` steps."""
        return _LBFGSRows(self, leaves).step

    def step_size(self, step: int, steps: int) -> float:  # noqa: ARG002
        """Return the step size, which stays as it is."""
        return self.lr


class _LBFGSRows:
    """State of `LBFGS`: each row's curvature pairs, and its last gradient, direction and length."""

    def __init__(self, rule: LBFGS, leaves: Leaves) -> None:
        self.rule = rule
        self.leaves = leaves
        some = next(iter(leaves.values())).detach()
        rows, numbers = len(some), sum(leaf[0].numel() for leaf in leaves.values())
        self.gradient, self.direction = (some.new_zeros(rows, numbers) for _ in range(2))
        self.length = some.new_zeros(rows)
        self.begun = torch.zeros(rows, dtype=torch.bool, device=some.device)
        self.pairs = _Pairs(self.length, rule.history)

    def step(self, evaluate: Evaluate) -> None:
        """Take ``inner`` iterations with as many evaluations."""
        rule = self.rule
        value, gradient = self._evaluate(evaluate)
        resting = gradient.abs().amax(1) <= rule.tolerance_grad
        for inner in range(rule.inner):
            if bool(resting.all()):
                return
            self._aim(gradient, ~resting)
            slope = (gradient * self.direction).sum(1)
            resting = resting | (slope > -rule.tolerance_change)
            move = torch.where(resting, 0, self.length)[:, None] * self.direction
            self._move(move)
            if inner + 1 == rule.inner:
                return
            before = value
            value, gradient = self._evaluate(evaluate)
            small = (gradient.abs().amax(1) <= rule.tolerance_grad) | (move.abs().amax(1) <= rule.tolerance_change)
            resting = resting | small | ((value - before).abs() < rule.tolerance_change) | ~value.isfinite()

    def _aim(self, gradient: Tensor, moving: Tensor) -> None:
        """Update direction and length of the rows that are ``moving``; nothing of the others changes."""
        first, later = moving & ~self.begun, moving & self.begun
        self.pairs.add(self.direction * self.length[:, None], gradient - self.gradient, later)
        newton = -self.pairs.inverse_hessian(gradient)
        self.direction = torch.where(later[:, None], newton, self.direction)
        self.direction = torch.where(first[:, None], -gradient, self.direction)
        self.length = torch.where(later, self.rule.lr, self.length)
        self.length = torch.where(first, self.rule.lr * (1 / gradient.abs().sum(1)).clamp(max=1), self.length)
        self.gradient = torch.where(moving[:, None], gradient, self.gradient)
        self.begun = self.begun | moving

    def _evaluate(self, evaluate: Evaluate) -> tuple[Tensor, Tensor]:
        value, gradients = evaluate()
        return value, torch.cat([gradients[name].reshape(len(value), -1) for name in self.leaves], 1)

    def _move(self, move: Tensor) -> None:
        with torch.no_grad():
            sizes = [leaf[0].numel() for leaf in self.leaves.values()]
            for leaf, part in zip(self.leaves.values(), torch.split(move, sizes, 1), strict=True):
                leaf += part.reshape(leaf.shape)


class _Pairs:
    """The last H moves and changes of the gradient of every row, each row with a ring (H slots) of its own.

    Args:
        like: (Q,).
        history: H.
    """

    def __init__(self, like: Tensor, history: int) -> None:
        self.history = history
        self.moves: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.inverses: list[Tensor] = []
        self.scale = torch.ones_like(like)
        self.counts = torch.zeros_like(like, dtype=torch.int64)

    def add(self, move: Tensor, change: Tensor, wanted: Tensor) -> None:
        """Take in a pair (Q, n) of the rows that ``wanted`` marks, where its curvature is positive."""
        curvature = (change * move).sum(1)
        valid = wanted & (curvature > 1e-10)
        slots = self.counts % self.history
        for slot in torch.unique(slots[valid]).tolist():
            here = valid & (slots == slot)
            if slot == len(self.moves):
                for kept, like in ((self.moves, move), (self.changes, move), (self.inverses, curvature)):
                    kept.append(torch.zeros_like(like))
            self.moves[slot] = torch.where(here[:, None], move, self.moves[slot])
            self.changes[slot] = torch.where(here[:, None], change, self.changes[slot])
            self.inverses[slot] = torch.where(here, 1 / curvature, self.inverses[slot])
        self.scale = torch.where(valid, curvature / change.square().sum(1), self.scale)
        self.counts = self.counts + valid

    def inverse_hessian(self, gradient: Tensor) -> Tensor:
        """Return the inverse Hessian's estimate times ``gradient`` (Q, n): the two-loop recursion."""
        pairs = list(self._from_newest())
        q, factors = gradient, []
        for move, change, inverse in pairs:
            factor = (inverse * torch.linalg.vecdot(move, q))[:, None]
            q = torch.addcmul(q, factor, change, value=-1)
            factors.append(factor)
        q = q * self.scale[:, None]
        for (move, change, inverse), factor in zip(reversed(pairs), reversed(factors), strict=True):
            q = torch.addcmul(q, factor - (inverse * torch.linalg.vecdot(change, q))[:, None], move)
        return q

    def _from_newest(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield every row's pairs from the newest on; a row that has no more gets zeros, which change nothing."""
        counts = torch.unique(self.counts).tolist()
        for age in range(min(max(counts), self.history)):
            slots = {count: (count - 1 - age) % self.history for count in counts if age < count}
            if len(counts) == 1:
                (slot,) = slots.values()
                yield self.moves[slot], self.changes[slot], self.inverses[slot]
                continue
            chosen = [torch.zeros_like(kept[0]) for kept in (self.moves, self.changes, self.inverses)]
            for count, slot in slots.items():
                rows = self.counts == count
                for i, kept in enumerate((self.moves, self.changes, self.inverses)):
                    mask = rows[:, None] if kept[slot].dim() == 2 else rows
                    chosen[i] = torch.where(mask, kept[slot], chosen[i])
            yield chosen[0], chosen[1], chosen[2]

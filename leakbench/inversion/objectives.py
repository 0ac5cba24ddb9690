"""How far candidates' gradients g are from the observed ones G: one number per row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.errors import UserError

Units = Literal["gradient", "difference", "direction"]
"""What G is: an averaged gradient (needs the learning rate of an update), the raw change of the weights, or that scaled
to length 1."""

Weights = Callable[[int], Sequence[float]]
"""Weights of P tensors, first layer first."""


@dataclass(frozen=True)
class Comparison:
    """Gradients g of candidates beside the target G, for Q rows (trials x restarts) and P tensors.

    Args:
        goal: (Q, P) ||G||^2.
        pairs: g and G, (Q, numel) each, per tensor; empty where the objective is made of inner products alone.
        products: <g, G> and ||g||^2, (Q, P) each, where they were had without g.
        likelihood: (Q,) mean log-likelihood of an entry that was sent, where the source gives one.
    """

    goal: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    products: tuple[Tensor, Tensor] | None = None
    likelihood: Tensor | None = None

    @cached_property
    def dot(self) -> Tensor:
        """(Q, P) <g, G>."""
        return self.products[0] if self.products else torch.stack([(g * goal).sum(1) for g, goal in self.pairs], 1)

    @cached_property
    def square(self) -> Tensor:
        """(Q, P) ||g||^2."""
        return self.products[1] if self.products else torch.stack([g.square().sum(1) for g, _ in self.pairs], 1)


class Objective(ABC):
    """Distance of gradients, smaller is nearer."""

    elementwise: ClassVar[bool] = True
    """Whether it needs the gradients themselves. Inner products are cheaper, but a difference that nearly vanishes
    loses its last digits in them (float32: below 1e-7 of ||G||^2)."""

    @property
    def units(self) -> Units:
        """What G is."""
        return "direction"

    @property
    def judge(self) -> Objective:
        """What the best iterate and the best restart are chosen by."""
        return self

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  (neutral default)
        """Return start values (Q,) of scalars that are optimised together with the inputs; ``like`` is (Q,)."""
        return {}

    @abstractmethod
    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of every row, (Q,)."""


@dataclass(frozen=True, kw_only=True)
class SquaredL2(Objective):
    """sum_l w_l ||g_l - G_l||^2, or sum_l w_l ||g_l - G_l|| with ``root``.

    Args:
        scale: Factor.
        root: Whether norms are added instead of their squares.
        weights: w_l; all 1 where None.
    """

    units: ClassVar[Units] = "gradient"
    scale: float = 1.0
    root: bool = False
    weights: Weights | None = None

    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Return the distance of every row, (Q,)."""
        each = torch.stack([(g - goal).square().sum(1) for g, goal in comparison.pairs], 1)
        return self.scale * (_weights(self.weights, each) * (safe_root(each) if self.root else each)).sum(1)


@dataclass(frozen=True, kw_only=True)
class Cosine(Objective):
    """1 - cos(g, G): one cosine over all tensors, or the weighted mean of one per tensor.

    Args:
        per_tensor: Whether every tensor has a cosine of its own.
        weights: Of the tensors; all 1 where None.
    """

    elementwise: ClassVar[bool] = False
    per_tensor: bool = False
    weights: Weights | None = None

    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Return the distance of every row, (Q,)."""
        dot, square, goal = comparison.dot, comparison.square, comparison.goal
        weights = _weights(self.weights, dot)
        if self.per_tensor:
            each = 1 - dot / (safe_root(square) * safe_root(goal))
            return (weights * each).sum(1) / weights.sum()
        square, goal = (weights * square).sum(1), (weights * goal).sum(1)
        return 1 - (weights * dot).sum(1) / (safe_root(square) * safe_root(goal))


@dataclass(frozen=True, kw_only=True)
class JointScale(Objective):
    """DLM: sum_l ||g_l - k W_l||^2 with the unknown scale k of the update W optimised as well.

    k = 0 with a label that the net predicts makes it vanish for any input whatever, so a low value is no sign of
    recovery; the best iterate and restart are therefore chosen by `MeanNorm`, which knows no scale.

    Args:
        scale: Where k starts.
        log: Whether log k is optimised, which keeps k off 0.
    """

    units: ClassVar[Units] = "difference"
    scale: float = 200.0
    log: bool = False

    @property
    def judge(self) -> Objective:
        """The scale-free distance."""
        return MeanNorm()

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:
        """Return the start value of k or log k, (Q,)."""
        start = torch.full_like(like, self.scale)
        return {"log_k": start.log()} if self.log else {"k": start}

    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of every row, (Q,)."""
        k = (unknowns["log_k"].exp() if self.log else unknowns["k"])[:, None]
        return torch.stack([(g - k * goal).square().sum(1) for g, goal in comparison.pairs]).sum(0)


@dataclass(frozen=True, kw_only=True)
class MeanNorm(Objective):
    """DLM+: sum_l ||g_l / n(g) - W_l / n(W)||^2, n being the mean of the tensors' norms; differentiated through."""

    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Return the distance of every row, (Q,)."""
        found, wanted = (safe_root(v).mean(1, keepdim=True) for v in (comparison.square, comparison.goal))
        return torch.stack([(g / found - goal / wanted).square().sum(1) for g, goal in comparison.pairs]).sum(0)


class Likelihood(Objective):
    """-log p(sent | candidates) per entry that was sent, by what the defense declares; with the source `Defended`."""

    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """Return the distance of every row, (Q,).

        Raises:
            UserError: The source gives no likelihood.
        """
        if comparison.likelihood is None:
            raise UserError("the objective Likelihood needs the source Defended")
        return -comparison.likelihood


def safe_root(square: Tensor) -> Tensor:
    """Return the square root, kept off 0: a gradient that vanishes has no direction, and its root no derivative."""
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def _weights(weights: Weights | None, like: Tensor) -> Tensor:
    values = weights(like.shape[1]) if weights is not None else [1.0] * like.shape[1]
    return torch.tensor(values, dtype=like.dtype, device=like.device)

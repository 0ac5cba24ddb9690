"""QSGD: stochastic quantisation of the update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register

EDGE = 0.05
"""Probability below which the log-likelihood is a straight line."""


@register("qsgd", version=1)
class QSGD(Defense):
    """QSGD: rounds every coordinate at random to a multiple of ||v|| / s, so that the mean stays, v being its tensor.

    A coordinate goes up to the next multiple with the probability that leaves its mean unchanged. The norm is the L2
    norm: other code that goes by this name divides by the greatest magnitude, which distorts less. At every s a
    coordinate is rounded by the same draw.

    Acts on: the update, each tensor by itself.

    Args:
        levels: s, multiples between 0 and the norm; fewer are coarser.

    Reference: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding", NeurIPS 2017, arXiv 1610.02132
    """

    acts_on = frozenset({"update"})
    strength = ("levels", "lower")
    draws = "whether a coordinate is rounded up or down"
    likelihood = "density"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, levels: int = 16) -> None:
        if levels < 1:
            raise UserError(f"qsgd: levels: expected at least 1, got {levels}; write qsgd(levels=16)")
        self.levels = levels

    @property
    def tensorwise(self) -> bool:
        """Always: each tensor has a norm and draws of its own."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Round."""
        return {
            name: self._rounded(value, ctx.random.at(name).rand(*value.shape[1:])) for name, value in update.items()
        }

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return the log-probability (T,) of ``sent`` given ``clean``, over the tensors of ``sent``.

        A coordinate that is l steps of ``clean`` away from its clean value was rounded there with probability 1 - l,
        and never where l is 1 or more. From l = 0.95 on the logarithm goes on as a straight line, so that a candidate
        that cannot have been sent still knows where to go. Between the multiples of a step, where nothing is sent, the
        same formula stands in for candidates whose norm is a little off.
        """
        each = []
        for name, value in sent.items():
            unit = self._unit(clean[name])
            away = (value.double() - clean[name].double()).abs() / torch.where(unit > 0, unit, 1)
            inside = (1 - away).clamp(min=EDGE).log()
            outside = (1 - away - EDGE).clamp(max=0) / EDGE
            each.append((inside + outside).flatten(1).sum(1).to(value.dtype))
        return torch.stack(each).sum(0)

    def _rounded(self, value: Tensor, draws: Tensor) -> Tensor:
        """Return ``value`` (T, *shape) rounded by ``draws`` (T, *shape), uniform in [0, 1)."""
        unit = self._unit(value)
        steps = value.double().abs() / torch.where(unit > 0, unit, 1)
        # The greatest possible magnitude is the norm itself, which rounding errors must not carry further.
        level = (steps + draws).floor().clamp(max=self.levels)
        return (value.sign() * (level * unit)).to(value.dtype)

    def _unit(self, value: Tensor) -> Tensor:
        """Return ||v|| / s, broadcastable to ``value`` (T, *shape).

        In float64: 16 + 0.9999999 is 17 in float32. The greatest magnitude is divided out first, so that squares
        neither overflow nor vanish.
        """
        wide = value.double().flatten(1)
        greatest = wide.abs().amax(1, keepdim=True)
        norm: Tensor = torch.linalg.vector_norm(wide / torch.where(greatest > 0, greatest, 1), dim=1, keepdim=True)
        return (greatest / self.levels * norm).view(-1, *(1,) * (value.dim() - 1))

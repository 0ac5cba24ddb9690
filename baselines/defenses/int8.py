"""Quantisation of the update to 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from leakbench_baselines.defenses.fp16 import box_fit
from torch import Tensor

from leakbench import Defense, DefenseContext, register

LEVELS = 127


@register("int8", version=1)
class Int8(Defense):
    """Int8: sends each tensor as integers from -127 to 127 times its greatest magnitude / 127, rounded to the nearest.

    Nothing is drawn. What is sent stands here as the floating-point values that a server makes of the integers.

    Acts on: the update, each tensor by itself.

    Reference: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935; it does not say how it
    rounds, which is chosen here
    """

    acts_on = frozenset({"update"})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    @property
    def tensorwise(self) -> bool:
        """Always: each tensor has a scale of its own."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Round."""
        return {name: _rounded(value) for name, value in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return a surrogate (T,): `box_fit` to the values that are rounded to what was sent."""
        half = {name: (_greatest(value) / LEVELS / 2).expand_as(value) for name, value in sent.items()}
        score: Tensor = box_fit(sent, clean, half)
        return score


def _rounded(value: Tensor) -> Tensor:
    """Return ``value`` (T, *shape) rounded, each trial by itself."""
    greatest = _greatest(value)
    # Divided by the magnitude and not by the step, which for very small values becomes 0.
    level = (value / torch.where(greatest > 0, greatest, 1) * LEVELS).round()
    return level / LEVELS * greatest


def _greatest(value: Tensor) -> Tensor:
    """Return the greatest magnitude, broadcastable to ``value`` (T, *shape)."""
    return value.abs().flatten(1).amax(1).view(-1, *(1,) * (value.dim() - 1))

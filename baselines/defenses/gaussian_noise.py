"""Gaussian noise on the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, Mechanism, UserError, register


@register("gaussian_noise", version=1)
class GaussianNoise(Defense):
    """Gaussian noise: adds N(0, std^2) to every coordinate of what is sent.

    Nothing is clipped, so no differential privacy follows. The noise of a tensor is drawn from a stream of
    its own: it does not depend on which other tensors are computed, and at every strength it has the same direction.

    Acts on: the update, each tensor by itself.

    Args:
        std: Standard deviation, in units of the update, or of its tensor's root mean square where ``relative``. 0.01 is
            the least absolute one that stops the paper's attack.
        relative: Whether ``std`` is scaled by each tensor's root mean square.

    Reference: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935
    """

    acts_on = frozenset({"update"})
    strength = ("std", "higher")
    neutral = MappingProxyType({"std": 0.0})
    draws = "noise on every coordinate"
    likelihood = "density"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, std: float = 0.01, relative: bool = False) -> None:
        if std < 0:
            raise UserError(f"gaussian_noise: std: expected at least 0, got {std}; write gaussian_noise(std=0.01)")
        self.std = std
        self.relative = relative

    @property
    def tensorwise(self) -> bool:
        """Always: no tensor's noise depends on another tensor."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Add the noise."""
        if self.std == 0:
            return update
        return {
            name: value + self._scale(value) * ctx.random.at(name).randn(*value.shape[1:]).to(value.dtype)
            for name, value in update.items()
        }

    def mechanism(
        self,
        before: Mechanism,
        *,
        batch_size: int,  # noqa: ARG002
        reduction: Literal["mean", "sum"],  # noqa: ARG002
    ) -> Mechanism | None:
        """Return the noise on top of what came before; nothing where its size depends on the update."""
        return None if self.relative and self.std > 0 else before.noised(self.std)

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return the log-density (T,) of ``sent`` given ``clean``, over the tensors of ``sent``.

        Raises:
            UserError: ``std`` is 0, where there is no density.
        """
        if self.std == 0:
            raise UserError("gaussian_noise: without noise there is no likelihood; write gaussian_noise(std=0.01)")
        each = []
        for name, value in sent.items():
            scale = self._scale(clean[name])
            z = (value - clean[name]) / scale
            each.append((-z.square() / 2 - scale.log() - math.log(2 * math.pi) / 2).flatten(1).sum(1))
        return torch.stack(each).sum(0)

    def _scale(self, value: Tensor) -> Tensor:
        """Return the standard deviation, broadcastable to ``value`` (T, *shape)."""
        if not self.relative:
            return value.new_full((1,) * value.dim(), self.std)
        return self.std * value.square().flatten(1).mean(1).sqrt().view(-1, *(1,) * (value.dim() - 1))

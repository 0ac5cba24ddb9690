"""Laplace noise on the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("laplace_noise", version=1)
class LaplaceNoise(Defense):
    """Laplace noise: adds noise of density exp(-|z| / b) / 2b to every coordinate of what is sent.

    Its standard deviation is sqrt(2) b: ``laplace_noise(scale=0.01)`` compares with ``gaussian_noise(std=0.01414)``.
    Nothing is clipped, so no differential privacy follows. The noise of a tensor is drawn from a stream of its own and
    has the same direction at every strength.

    Acts on: the update, each tensor by itself.

    Args:
        scale: b, in units of the update, or of its tensor's root mean square where ``relative``.
        relative: Whether ``scale`` is scaled by each tensor's root mean square.

    Reference: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935
    """

    acts_on = frozenset({"update"})
    strength = ("scale", "higher")
    neutral = MappingProxyType({"scale": 0.0})
    draws = "noise on every coordinate"
    likelihood = "density"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, scale: float = 0.01, relative: bool = False) -> None:
        if scale < 0:
            raise UserError(f"laplace_noise: scale: expected at least 0, got {scale}; write laplace_noise(scale=0.01)")
        self.scale = scale
        self.relative = relative

    @property
    def tensorwise(self) -> bool:
        """Always: no tensor's noise depends on another tensor."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Add the noise."""
        if self.scale == 0:
            return update
        return {name: value + self._scale(value) * _draw(name, value, ctx) for name, value in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return the log-density (T,) of ``sent`` given ``clean``, over the tensors of ``sent``.

        Raises:
            UserError: ``scale`` is 0, where there is no density.
        """
        if self.scale == 0:
            raise UserError("laplace_noise: without noise there is no likelihood; write laplace_noise(scale=0.01)")
        each = []
        for name, value in sent.items():
            scale = self._scale(clean[name])
            z = (value - clean[name]).abs() / scale
            each.append((-z - scale.log() - math.log(2)).flatten(1).sum(1))
        return torch.stack(each).sum(0)

    def _scale(self, value: Tensor) -> Tensor:
        """Return b, broadcastable to ``value`` (T, *shape)."""
        if not self.relative:
            return value.new_full((1,) * value.dim(), self.scale)
        return self.scale * value.square().flatten(1).mean(1).sqrt().view(-1, *(1,) * (value.dim() - 1))


def _draw(name: str, value: Tensor, ctx: DefenseContext) -> Tensor:
    """Return Laplace draws of scale 1 in the shape of ``value`` (T, *shape): an exponential one and a sign each."""
    random, shape = ctx.random.at(name), value.shape[1:]
    # Uniform draws may be 0 but never 1, so that every size is finite.
    size = -torch.log1p(-random.at("size").rand(*shape).to(value.dtype))
    return size * (2 * random.at("sign").randint(2, *shape) - 1)

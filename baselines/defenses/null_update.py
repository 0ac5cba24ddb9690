"""An update that carries nothing."""

from __future__ import annotations

from torch import Tensor

from leakbench import Defense, DefenseContext, register


@register("null_update", version=1)
class NullUpdate(Defense):
    """Null update: replaces every tensor by Gaussian noise of the same root mean square.

    What an attack still recovers comes from its prior and from what it knows besides the update: the floor of that
    attack. The noise of a tensor is drawn from a stream of its own.

    Acts on: the update, each tensor by itself.

    Reference: none; a control, after the finding that generative attacks return plausible images from pure noise (Guo
    et al. 2025, arXiv 2503.11514)
    """

    acts_on = frozenset({"update"})
    draws = "all that is sent"
    likelihood = "simulated"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    @property
    def tensorwise(self) -> bool:
        """Always: no tensor's noise depends on another tensor."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Draw the noise that is sent instead."""
        return {name: _noise_like(value, ctx.random.at(name).randn(*value.shape[1:])) for name, value in update.items()}


def _noise_like(value: Tensor, noise: Tensor) -> Tensor:
    """Return ``noise`` (T, *shape) with the root mean square, per trial, that ``value`` has."""
    scale = (value.square().flatten(1).mean(1) / noise.square().flatten(1).mean(1)).sqrt().to(value.dtype)
    return scale.view(-1, *(1,) * (value.dim() - 1)) * noise.to(value.dtype)

"""Noise on the inputs."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("input_noise", version=1)
class InputNoise(Defense):
    """Input noise: trains on x + N(0, std^2) instead of the input x, with fresh noise in every local step.

    What leaks is compared with x itself. The noise has the same direction at every strength, and is not clamped to the
    range of the inputs.

    Acts on: the inputs of the local batch.

    Args:
        std: Standard deviation, in units of what the model gets: of normalised inputs where the task normalises them.

    Reference: none; a baseline that the attack framework breaching offers as ``input_noise``
    """

    acts_on = frozenset({"batch"})
    strength = ("std", "higher")
    neutral = MappingProxyType({"std": 0.0})
    draws = "noise on every input"
    likelihood = "simulated"
    adaptive = ("analytic", "bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, std: float = 0.1) -> None:
        if std < 0:
            raise UserError(f"input_noise: std: expected at least 0, got {std}; write input_noise(std=0.1)")
        self.std = std

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Add the noise."""
        if self.std == 0:
            return inputs, labels
        return inputs + self.std * ctx.random.randn(*inputs.shape[1:]).to(inputs.dtype), labels

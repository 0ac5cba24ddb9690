"""Floor of image attacks: noise."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, register


def uniform_pixels(knowledge: Knowledge, count: int, dtype: torch.dtype) -> Tensor:
    """Draw inputs (T, count, *input_shape), every pixel uniform between the least and the greatest valid value."""
    low, high = (bound.to(dtype) for bound in knowledge.bounds)
    return low + (high - low) * knowledge.rand(count, *knowledge.input_spec.shape).to(dtype)


@register("random_image", version=1)
class RandomImage(Attack):
    """Random image: every pixel drawn uniformly between the least and the greatest valid value.

    Sees: the shape, the bounds and the number of inputs; no update.

    Reference: none; the floor that every reconstruction has to beat
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size"})
    reads = ()

    def run(self, observation: Observation) -> Recovery:
        """Draw inputs (T, K * N, *input_shape)."""
        candidates = observation.total_inputs
        return Recovery(inputs=uniform_pixels(observation, candidates, torch.float32))

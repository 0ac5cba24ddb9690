"""What one tensor program works on: trials times restarts, each a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from leakbench.models.functional import Model
from leakbench.observation import Observation


@dataclass(frozen=True)
class Rows:
    """Q = T * R rows; row t * R + r is restart r of trial t.

    Args:
        observation: What is seen of the T trials.
        restarts: R.
        model: M = 1 or Q.
        target: What gradients are compared with, (Q, *shape) by parameter name.
        classes: (Q, N) labels; zeros where they are optimised.
    """

    observation: Observation
    restarts: int
    model: Model
    target: Mapping[str, Tensor]
    classes: Tensor

    @cached_property
    def goal(self) -> Tensor:
        """(Q, P) squared norms of the target's P tensors."""
        return torch.stack([value.flatten(1).square().sum(1) for value in self.target.values()], 1)

    def spread(self, values: Tensor) -> Tensor:
        """Return values of trials (1 or T, *) as values of rows (1 or Q, *)."""
        return values if len(values) == 1 else spread(values, self.restarts)


def spread(values: Tensor, restarts: int) -> Tensor:
    """Return values (T, *) as values of rows (T * R, *), contiguous: the layout moves the last digits of sums."""
    return values.contiguous() if restarts == 1 else values.repeat_interleave(restarts, 0)


def model_of_rows(model: Model, restarts: int) -> Model:
    """Return the model of every row."""
    if model.draws == 1 or restarts == 1:
        return model
    return model.with_state(
        {name: spread(value, restarts) for name, value in model.parameters.items()},
        {name: spread(value, restarts) for name, value in model.buffers.items()},
    )


def unit_direction(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale tensors (T, *shape) so that a trial's have length 1 together; zeros stay zeros."""
    # By the largest entry first: squares of an update of 1e-30 would vanish in float32.
    top = torch.stack([value.flatten(1).abs().amax(1) for value in tensors.values()]).amax(0)
    top = torch.where(top > 0, top, torch.ones_like(top))
    scaled = {name: value / _like(top, value) for name, value in tensors.items()}
    length = torch.stack([value.flatten(1).square().sum(1) for value in scaled.values()]).sum(0).sqrt()
    length = torch.where(length > 0, length, torch.ones_like(length))
    return {name: value / _like(length, value) for name, value in scaled.items()}


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (tensor.dim() - 1))

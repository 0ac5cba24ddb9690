"""Where candidate inputs start."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench.errors import unknown
from leakbench.observation import Observation

STARTS = ("randn", "uniform", "zeros", "patterned")


def start_inputs(name: str, observation: Observation, restarts: int, count: int) -> Tensor:
    """Return start values (T, R, N, *input_shape).

    Args:
        name: ``randn`` (standard normal), ``uniform`` (between the bounds), ``zeros``, or ``patterned`` (a normal tile
            of 4x4 pixels, repeated; Wang and Deng's advice as in ``breaching``).
        observation: What is seen; its streams give the draws.
        restarts: R.
        count: N.

    Raises:
        UserError: There is no such start.
    """
    shape = observation.input_spec.shape
    if name == "randn":
        return observation.randn(restarts, count, *shape)
    if name == "uniform":
        low, high = observation.bounds
        return low + (high - low) * observation.rand(restarts, count, *shape)
    if name == "zeros":
        return torch.zeros_like(observation.rand(restarts, count, *shape))
    if name == "patterned":
        height, width = shape[-2:]
        tile = observation.randn(restarts, count, *shape[:-2], 4, 4)
        repeats = (1,) * (tile.dim() - 2) + (-(-height // 4), -(-width // 4))
        return tile.repeat(repeats)[..., :height, :width]
    raise unknown("start", name, STARTS)

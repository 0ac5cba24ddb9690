"""Stored uint8 values to what a model gets, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from leakbench.tasks import InputSpec


def input_bounds(spec: InputSpec, normalise: bool, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the least and the greatest valid input, each broadcastable to (..., *spec.shape); see `to_inputs`."""
    trailing = (1,) * (len(spec.shape) - 1)
    if not normalise:
        return torch.zeros(1, *trailing, device=device), torch.ones(1, *trailing, device=device)
    mean, std = (torch.tensor(v, device=device).view(-1, *trailing) for v in (spec.mean, spec.std))
    return -mean / std, (1 - mean) / std


def to_inputs(images: NDArray[np.uint8], spec: InputSpec, normalise: bool) -> Tensor:
    """Return float32 inputs (..., *spec.shape): values / 255, minus mean, over std when ``normalise``.

    Args:
        images: uint8 values (..., *spec.shape).
        spec: Mean and standard deviation per channel, for values in [0, 1].
        normalise: Whether to apply them; otherwise values stay in [0, 1].
    """
    return normalised(torch.tensor(images).to(torch.float32) / 255, spec, normalise)


def normalised(pixels: Tensor, spec: InputSpec, normalise: bool) -> Tensor:
    """Return inputs (..., *spec.shape) for values in [0, 1]; see `to_inputs`."""
    if not normalise:
        return pixels
    mean, std = _moments(spec, pixels)
    return (pixels - mean) / std


def to_pixels(inputs: Tensor, spec: InputSpec, normalise: bool) -> Tensor:
    """Return values in [0, 1] (clamped) for inputs (..., *spec.shape); the inverse of `to_inputs` up to rounding."""
    if normalise:
        mean, std = _moments(spec, inputs)
        inputs = inputs * std + mean
    return inputs.clamp(0, 1)


def _moments(spec: InputSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    trailing = (1,) * (len(spec.shape) - 1)
    mean, std = (
        torch.tensor(v, dtype=like.dtype, device=like.device).reshape(-1, *trailing) for v in (spec.mean, spec.std)
    )
    return mean, std

"""Exact BatchNorm statistics of a batch, which some threat models grant."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench.models.functional import Model


@torch.no_grad()
def batch_statistics(model: Model, inputs: Tensor) -> dict[str, Tensor]:
    """Return mean and (unbiased) variance of what enters every BatchNorm layer in train mode.

    Args:
        model: M = 1 or T.
        inputs: (T, B, *input_shape).

    Returns:
        (T, channels) by the names of the running buffers; empty for a net without BatchNorm.
    """
    tracked = [name for name in model.buffers if is_running_statistic(name)]
    # From statistics of zero, one pass leaves momentum * statistic behind, without cancellation.
    zero = model.with_state(buffers={name: torch.zeros_like(model.buffers[name]) for name in tracked})
    _, after = zero.logits_and_buffers(inputs, batch_norm="train")
    return {name: after[name] / _momentum(model, name) for name in tracked}


def is_running_statistic(name: str) -> bool:
    """Whether a buffer is a running mean or variance."""
    return name.endswith(("running_mean", "running_var"))


def _momentum(model: Model, buffer: str) -> float:
    momentum = getattr(model.module.get_submodule(buffer.rpartition(".")[0]), "momentum", None)
    return 1.0 if momentum is None else float(momentum)

"""Updates of a few trials and the context a defense's hook sees, without a net behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leakbench import DefenseContext
from leakbench.randomness import TrialRandom

SHAPES = {"a.weight": (30, 40), "a.bias": (30,), "b.weight": (10, 30)}


def streams(trials: int, seed: int = 0) -> TrialRandom:
    """Return streams that depend on ``seed`` alone."""
    stream = torch.Generator().manual_seed(seed)
    return TrialRandom(torch.randint(0, 256, (trials, 32), generator=stream).to(torch.uint8))


def context(trials: int, seed: int = 0, **fields: Any) -> DefenseContext:
    """Return the context of an ``update`` hook that needs neither model nor batch."""
    empty = torch.empty(0)
    moment = {"round": 0, "client": 0, "local_step": 0, "lr": 0.1, "loss": None, "random": streams(trials, seed)}
    return DefenseContext(**{"model": None, "inputs": empty, "labels": empty, **moment, **fields})


def updates(trials: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Return standard normal updates times ``scale``, (T, *shape) by name."""
    stream = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(trials, *s, generator=stream, dtype=dtype) for n, s in SHAPES.items()}


def flat(update: dict[str, Tensor]) -> Tensor:
    """Return all coordinates, (T, n)."""
    return torch.cat([value.flatten(1) for value in update.values()], 1)

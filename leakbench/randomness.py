"""Per-trial randomness for entries: slice t of every draw comes from trial t's own CPU stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

SEED_BYTES = 32


class TrialRandom:
    """Draws of shape (T, *shape) whose slice t depends on trial t's seed alone.

    So a trial's draws do not change with the block it is computed in, and no entry ever holds a generator or a key.

    Args:
        seeds: (T, 32) uint8, one seed a trial.
        device: Where draws are put; they are always made on the CPU.
    """

    def __init__(self, seeds: Tensor, *, device: torch.device | str = "cpu") -> None:
        self._seeds: Sequence[bytes] = [bytes(row.tolist()) for row in seeds]
        self._device = torch.device(device)
        self._streams: list[torch.Generator] | None = None

    @property
    def trials(self) -> int:
        """T."""
        return len(self._seeds)

    @property
    def device(self) -> torch.device:
        """Where draws are put."""
        return self._device

    def at(self, *names: object) -> TrialRandom:
        """Return the independent sub-streams that belong to ``names`` (any JSON values)."""
        path = json.dumps(names, separators=(",", ":")).encode()
        return self._with([hashlib.sha256(seed + path).digest() for seed in self._seeds])

    def rows(self, count: int) -> TrialRandom:
        """Return ``count`` independent streams of every trial, for T * count rows, those of a trial side by side."""
        return self._with([hashlib.sha256(seed + b"%d" % row).digest() for seed in self._seeds for row in range(count)])

    def part(self, first: int, last: int) -> TrialRandom:
        """Return the streams of trials ``first`` to ``last`` (exclusive) from their beginning."""
        return self._with(self._seeds[first:last])

    def randn(self, *shape: int) -> Tensor:
        """Standard normal float32 draws, (T, *shape)."""
        out = torch.empty(self.trials, *shape)
        for row, stream in zip(out, self._generators(), strict=True):
            row.normal_(generator=stream)
        return out.to(self._device)

    def rand(self, *shape: int) -> Tensor:
        """Uniform float32 draws from [0, 1), (T, *shape)."""
        out = torch.empty(self.trials, *shape)
        for row, stream in zip(out, self._generators(), strict=True):
            row.uniform_(generator=stream)
        return out.to(self._device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Uniform int64 draws from 0..high-1, (T, *shape)."""
        out = torch.empty(self.trials, *shape, dtype=torch.int64)
        for row, stream in zip(out, self._generators(), strict=True):
            row.random_(0, high, generator=stream)
        return out.to(self._device)

    def _with(self, seeds: Sequence[bytes]) -> TrialRandom:
        other = TrialRandom.__new__(TrialRandom)
        other._seeds, other._device, other._streams = seeds, self._device, None
        return other

    def _generators(self) -> list[torch.Generator]:
        if self._streams is None:
            self._streams = [
                torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1) for seed in self._seeds
            ]
        return self._streams

"""The server of a federated training: it holds the global model, averages what comes back, and evaluates."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leakbench.errors import InvalidOutput
from leakbench.models.functional import flat_state
from leakbench.tasks import Protocol

DEFLATE_LEVEL = 6
"""Of the compression that upload is measured by."""


@dataclass
class Server:
    """The global model, and the rule by which updates change it.

    Args:
        parameters: (1, *shape) by name.
        buffers: (1, *shape) by name.
        protocol: What clients send; ``lr`` is the server's step with ``sends: gradient``.
        weights: (K,) weights of the clients, of any scale: their numbers of examples.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    protocol: Protocol
    weights: Tensor

    def state(self) -> dict[str, Tensor]:
        """Return the model in the form of `leakbench.models.functional.Model.tensors`."""
        return flat_state(self.parameters, self.buffers)

    def sent(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes (K, *shape) of what K clients have to send: running statistics where they do."""
        own = dict(self.parameters)
        if self.protocol.send_buffers:
            own |= {name: value for name, value in self.buffers.items() if value.is_floating_point()}
        return {name: (len(self.weights), *value.shape[1:]) for name, value in own.items()}

    def check(self, update: Mapping[str, Tensor]) -> None:
        """Check what the clients sent.

        Raises:
            InvalidOutput: Tensors are missing, of another shape, or not finite.
        """
        got, expected = {name: tuple(value.shape) for name, value in update.items()}, self.sent()
        if got != expected:
            wrong = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))[0]
            raise InvalidOutput(
                f"sent {str(wrong)[:40]!r} as {got.get(wrong, 'nothing')}, expected {expected.get(wrong, 'nothing')}"
            )
        for name, value in update.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise InvalidOutput(f"the update's {name!r} is not finite")

    def take(self, update: Mapping[str, Tensor]) -> None:
        """Change the model by what the clients sent, (K, *shape) by name: FedAvg (McMahan et al. 2017), or FedSGD.

        Raises:
            InvalidOutput: The model is not finite any more.
        """
        share = self.weights.double() / self.weights.sum()
        for name, value in update.items():
            # In float64, so that the mean does not depend on the order of the clients.
            mean = torch.tensordot(share, value.double(), 1)[None]
            if name in self.buffers:
                self.buffers[name] = mean.to(self.buffers[name])
                continue
            if self.protocol.sends != "weights":
                step = self.protocol.lr if self.protocol.sends == "gradient" else 1.0
                mean = self.parameters[name].double() - step * mean
            self.parameters[name] = mean.to(self.parameters[name])
            if not bool(torch.isfinite(self.parameters[name]).all()):
                raise InvalidOutput(f"the training diverged: {name!r} is not finite")


def upload_bytes(update: Mapping[str, Tensor], client: int) -> int:
    """Return the bytes of what one client sends: float32 values in little endian, deflated, tensor after tensor."""
    packed = b"".join(update[name][client].float().contiguous().numpy().tobytes() for name in sorted(update))
    return len(zlib.compress(packed, DEFLATE_LEVEL))


@dataclass
class Course:
    """What a training came to.

    Args:
        status: ``ok`` or why not.
        error: One line where not ok.
        curve: [round, accuracy on the test split] of every evaluation; round counts those done.
        validation: Accuracies on what was held out, one for each.
        done: Rounds done.
        seconds: CPU seconds of the clients' process, of each round.
        upload: Bytes of one client's update, of each round in which it was measured.
        refused: Share of the clients that refused, of each round.
        total_seconds: Wall seconds of the training.
        peak_memory: Of the clients' process, bytes.
        isolation: What confined it.
        epsilon: Of one replaced example over all rounds; None where nothing is promised.
    """

    status: str = "ok"
    error: str | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    done: int = 0
    seconds: list[float] = field(default_factory=list)
    upload: list[int] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    total_seconds: float | None = None
    peak_memory: int | None = None
    isolation: dict[str, Any] = field(default_factory=dict)
    epsilon: float | None = None

    def fail(self, status: str, error: str) -> None:
        """Note why the training came to nothing."""
        self.status, self.error = status, error

    @property
    def client_seconds(self) -> float | None:
        """Median CPU seconds of a round, all clients together; the first, which warms up, left out."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None

    @property
    def upload_bytes(self) -> float | None:
        """Mean bytes of one client's update."""
        return statistics.fmean(self.upload) if self.upload else None


LAST = 5
"""Evaluations at the end whose mean is the accuracy."""


def final(accuracies: list[float]) -> float:
    """Return the mean of the last evaluations."""
    return statistics.fmean(accuracies[-LAST:])

"""Adding up clients' updates without keeping them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class StreamedSum:
    """Running sum of updates: the memory of one, however many clients there are.

    Args:
        clients: K.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self._sum: dict[str, Tensor] = {}

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add one client's update, tensors (T, *shape) by name."""
        for name, tensor in update.items():
            if self.clients == 1:
                self._sum[name] = tensor
            elif name in self._sum:
                self._sum[name] += tensor
            else:
                self._sum[name] = tensor.clone()

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over the clients, (T, *shape) by name."""
        return {name: tensor / self.clients if self.clients > 1 else tensor for name, tensor in self._sum.items()}

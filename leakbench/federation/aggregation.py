"""Adding up clients' updates without keeping them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from leakbench.tasks import Protocol


class StreamedSum:
    """Running weighted sum of updates: the memory of one, however many clients there are.

    Args:
        weights: (K,) weight of each client's update, of any scale: 1 each, or numbers of examples.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = tuple(weights)
        self._sum: dict[str, Tensor] = {}
        self._added = 0

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add the next client's update, tensors (T, *shape) by name."""
        weight, self._added = self.weights[self._added], self._added + 1
        for name, tensor in update.items():
            if len(self.weights) == 1:
                self._sum[name] = tensor
            elif name in self._sum:
                self._sum[name].add_(tensor, alpha=weight)
            else:
                self._sum[name] = tensor * weight

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted mean over the clients, (T, *shape) by name."""
        total = sum(self.weights)
        return {name: tensor / total if len(self.weights) > 1 else tensor for name, tensor in self._sum.items()}


def aggregation_weights(protocol: Protocol, client_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the weights (K,) of the clients' updates, of any scale, given their numbers of examples."""
    return tuple(client_sizes) if protocol.weighting == "examples" else (1,) * len(client_sizes)

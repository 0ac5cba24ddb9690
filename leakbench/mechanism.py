"""What a client's noise promises: how much is added, and how far its private examples can move what is sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leakbench.errors import LeakbenchError


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """An update as a bounded function of the private examples plus Gaussian noise, N(0, std^2) on every coordinate.

    Whatever the examples are, the update before the noise lies in a ball of radius ``update`` / 2; with all examples
    but one fixed, in one of radius ``example`` / 2. So two hypotheses about one example, or about all, are told apart
    no better than N(0, 1) from N(mu, 1) with mu = ``example`` / ``std``, or ``update`` / ``std``: mu-GDP of Dong,
    Roth, Su, "Gaussian Differential Privacy", 2019, arXiv 1905.02383, where one example is replaced.

    Args:
        std: Standard deviation of the noise, in units of what is sent; 0 without noise.
        example: Greatest L2 change of what is sent, but for the noise, when one example is replaced; inf where
            unbounded.
        update: Greatest L2 distance between any two updates, but for the noise; inf where unbounded.
        layers: How many layers the model has, where known: what is bounded layer by layer grows with it.
    """

    std: float = 0.0
    example: float = math.inf
    update: float = math.inf
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.std < 0 or not 0 <= self.example <= self.update:
            raise LeakbenchError(f"a mechanism needs std >= 0 and 0 <= example <= update, got {self}")

    def scaled(self, factor: float) -> Mechanism:
        """Return the mechanism of ``factor`` times what is sent."""
        return replace(self, std=factor * self.std, example=factor * self.example, update=factor * self.update)

    def noised(self, std: float) -> Mechanism:
        """Return the mechanism with further, independent noise."""
        return replace(self, std=math.hypot(self.std, std))

    def clipped(self, bound: float) -> Mechanism | None:
        """Return the mechanism after what is sent was projected onto the ball of radius ``bound`` around 0.

        A projection brings no two points further apart. None after noise, which is then not Gaussian any more.
        """
        if self.std > 0:
            return None
        return replace(self, example=min(self.example, 2 * bound), update=min(self.update, 2 * bound))

    @property
    def mu_example(self) -> float:
        """Mu of one replaced example; inf without noise."""
        return self.example / self.std if self.std > 0 else math.inf

    @property
    def mu_update(self) -> float:
        """Mu of all examples together; inf without noise."""
        return self.update / self.std if self.std > 0 else math.inf


def averaged(mechanisms: Sequence[Mechanism], weights: Sequence[float]) -> Mechanism:
    """Return the mechanism of the weighted mean of independent clients' updates.

    Args:
        mechanisms: Of each client.
        weights: Of any scale.
    """
    total = math.fsum(weights)
    parts = [mechanism.scaled(weight / total) for mechanism, weight in zip(mechanisms, weights, strict=True)]
    return Mechanism(
        std=math.hypot(*(part.std for part in parts)),
        example=max(part.example for part in parts),
        update=math.fsum(part.update for part in parts),
    )

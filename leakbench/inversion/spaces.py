"""What is optimised: the inputs themselves, or the weights of a network that draws them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.inversion.starts import start_inputs
from leakbench.observation import Observation


class Space(ABC):
    """A parametrisation of candidate inputs."""

    @abstractmethod
    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:
        """Return start values (Q, *) by name, Q = T * R, for ``count`` = N inputs a row."""

    @abstractmethod
    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the inputs (Q, N, *input_shape) that the leaves stand for."""

    def project(self, leaves: Mapping[str, Tensor], bounds: tuple[Tensor, Tensor]) -> None:  # noqa: ARG002
        """Put the leaves back into the valid range after a step."""
        return


@dataclass(frozen=True, kw_only=True)
class Pixels(Space):
    """The inputs themselves.

    Args:
        init: Where they start, see `leakbench.inversion.starts.start_inputs`.
        box: Whether they are kept between the least and the greatest valid value.
    """

    init: str = "randn"
    box: bool = True

    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:
        """Return the start values."""
        return {"inputs": start_inputs(self.init, observation, restarts, count).flatten(0, 1)}

    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the leaf itself."""
        return leaves["inputs"]

    def project(self, leaves: Mapping[str, Tensor], bounds: tuple[Tensor, Tensor]) -> None:
        """Clamp."""
        if self.box:
            with torch.no_grad():
                leaves["inputs"].clamp_(*bounds)

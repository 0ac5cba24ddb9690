"""What a measure looks at: the clients of T trials, as a function of their private images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from leakbench.chain import DefenseChain
from leakbench.federation.aggregation import StreamedSum
from leakbench.federation.client import Client
from leakbench.federation.inputs import normalised
from leakbench.measures.catalogue import ALL
from leakbench.models.functional import Model
from leakbench.randomness import TrialRandom
from leakbench.tasks import AttributeSpec, InputSpec, Protocol

__all__ = ["ALL", "Clients", "Profile", "Subject"]


@dataclass(frozen=True)
class Profile:
    """One quantity along the layers.

    Args:
        layers: Names of L layers out of `Subject.layers`, or `ALL`.
        values: (T, L), one per trial; or (L,) where the quantity is fitted over trials.
        low: (L,) lower end of the 95% interval of a fitted value; None where it has none.
        high: (L,) upper end.
        n: Observations behind a fitted value.
    """

    layers: tuple[str, ...]
    values: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The cohort behind one update.

    Args:
        protocol: What each does and sends.
        clients: K clients with their batch sizes and the defense.
        sizes: (K,) examples of each.
        weights: (K,) weights of their updates, of any scale.
    """

    protocol: Protocol
    clients: Sequence[Client]
    sizes: Sequence[int]
    weights: Sequence[int]


class Subject:
    """The clients of T trials: their model, their private images, and what they send as a function of these.

    Args:
        model: M = 1 or T.
        cohort: The clients.
        spec: What one input is.
        normalise: Whether the model's inputs are normalised.
        images: (T, n, *shape) intensities in [0, 1], in the precision of the model, all clients' one after the other.
        labels: (T, n).
        random: Streams of the defense; every call of `update` draws the same.
        order: (T, K, local_steps, B) batch order, where it is not that of the examples.
        truth: (T,) 0 or 1, whether each trial has the attribute, where the task asks for one.
        attribute: Which attribute that is.
        auxiliary: The same clients with examples of the auxiliary split, drawn by the same law; for fitted measures.
        report: Receives progress.
    """

    def __init__(
        self,
        *,
        model: Model,
        cohort: Clients,
        spec: InputSpec,
        normalise: bool,
        images: Tensor,
        labels: Tensor,
        random: TrialRandom,
        order: Tensor | None = None,
        truth: Tensor | None = None,
        attribute: AttributeSpec | None = None,
        auxiliary: Subject | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.model = model
        self.cohort = cohort
        self.spec = spec
        self.normalise = normalise
        self.images = images
        self.labels = labels
        self.random = random
        self.order = order
        self.truth = truth
        self.attribute = attribute
        self.auxiliary = auxiliary
        self._report = report

    @property
    def trials(self) -> int:
        """T."""
        return len(self.images)

    @property
    def defense(self) -> DefenseChain:
        """The clients' defense."""
        return self.cohort.clients[0].defense

    @cached_property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of each layer's parameters by the layer's name, from input to output."""
        return self.model.layers

    def update(
        self, images: Tensor | None = None, labels: Tensor | None = None, *, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Return what the clients' update says, in the gradient's direction: weights that are sent count as a change.

        Args:
            images: (T, n, *shape) intensities instead of the private ones.
            labels: (T, n), or soft (T, n, C), instead of theirs.
            create_graph: Whether the result is differentiable in images and labels.

        Returns:
            (T, *shape) by parameter name; the mean over the clients.
        """
        images, labels = self.images if images is None else images, self.labels if labels is None else labels
        inputs, cohort = normalised(images, self.spec, self.normalise), self.cohort
        total, first = StreamedSum(cohort.weights), 0
        for k, (client, size) in enumerate(zip(cohort.clients, cohort.sizes, strict=True)):
            own = slice(first, first + size)
            sent = client.update(
                self.model,
                inputs[:, own],
                labels[:, own],
                random=self.random,
                names=self.model.parameters,
                order=None if self.order is None else self.order[:, k],
                client=k,
                create_graph=create_graph,
            )
            total.add(sent)
            first += size
        mean = total.mean()
        if cohort.protocol.sends == "weights":
            start, withheld = self.model.parameters, self.defense.withholds(self.model)
            return {name: value if name in withheld else start[name] - value for name, value in mean.items()}
        return mean

    def by_layer(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (T, P_l) for each layer, its tensors flattened one after the other."""
        return {
            layer: torch.cat([update[name].flatten(1) for name in names], 1) for layer, names in self.layers.items()
        }

    def part(self, first: int, last: int) -> Subject:
        """Return trials ``first`` to ``last`` (exclusive), for work that must be cut to fit the memory."""
        own, rows = copy(self), slice(first, last)
        own.model, own.random = self.model.trials(first, last), self.random.part(first, last)
        own.images, own.labels = self.images[rows], self.labels[rows]
        own.order = None if self.order is None else self.order[rows]
        own.truth = None if self.truth is None else self.truth[rows]
        return own

    def progress(self, done: int, total: int) -> None:
        """Tell the runner how far the measure is."""
        if self._report is not None:
            self._report({"done": done, "total": total, "loss": None, "rate": None})

"""Data leakage in federated averaging: all local steps simulated, with own copies of the inputs for every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from leakbench import Knowledge, Observation, Recovery, register
from leakbench.inversion import (
    Adam,
    Inversion,
    InversionAttack,
    Pixels,
    Rows,
    Space,
    SquaredL2,
    TotalVariation,
    Unrolled,
    Weighted,
)


@register("fedavg_dimitrov", version=1)
class FedAvgDimitrov(InversionAttack):
    """Federated averaging simulated: the client's local steps with one copy of the inputs for every epoch.

    A client shuffles its N inputs in every epoch, and the server does not know how. Each epoch therefore gets N inputs
    of its own; the simulated client runs through them in order. An order-invariant prior ties the epochs: the mean
    image of one has to be that of the others. In the end the copies of the later epochs are matched to those of the
    first by least squared error, and the matched ones are averaged. Where the order does not matter (one epoch, or one
    batch that is used again and again) or is granted, there is one copy.

    The update is compared in units of the gradient by squared distance, the first layer's weighing most: e times as
    much as the next one's.

    Sees: the update; weights, number of inputs, batch size, learning rate, number of local steps; the batch order and
    the labels where granted. The update of one client; others are declined. Costs one gradient evaluation per local
    step and iteration.

    Follows the released scripts for CIFAR-100 with these differences: the factor of the distance (over the number of
    simulated batches), which falls from 4 to 2 in the first half of 400 iterations, is 2; the prior that ties the
    epochs is that of the scripts for FEMNIST, without random convolutions, with their weight; the learning rate, which
    falls by 6% over all of them, stays; values outside the valid range are cut, not penalised; the iterate with the
    least objective is kept, not the last one.

    Args:
        steps: Iterations.
        lr: Learning rate of Adam.
        tv: Weight of the total variation: squared differences, summed over pixels.
        tie: Weight of the order-invariant prior: the mean squared difference of the epochs' mean images.
        restarts: Random starts.
        labels: Label attack that runs first where labels are not granted.

    Reference: Dimitrov, Balunović, Konstantinov, Vechev, "Data Leakage in Federated Averaging", TMLR 2022,
    arXiv 2206.12395
    """

    needs = frozenset({"batch_size", "local_steps", "lr", "weights"})

    def __init__(
        self,
        *,
        steps: int = 400,
        lr: float = 0.1,
        tv: float = 2e-4,
        tie: float = 1000.0,
        restarts: int = 1,
        labels: str = "fedavg_labels",
    ) -> None:
        self.steps, self.restarts, self.labels = steps, restarts, labels
        self.lr, self.tv, self.tie = lr, tv, tie
        self.inversion = Inversion(
            objective=SquaredL2(weights=first_layers),
            optimiser=Adam(lr=lr),
            priors=(TotalVariation(weight=tv, p=2), SameMeans(epochs=1, weight=tie)),
            steps=steps,
            restarts=restarts,
            source=GradientSum(),
            labels=labels,
        )

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion for a task, of all epochs' copies together."""
        epochs = copies_needed(knowledge)
        # The sum over an image's pixels, and over both directions.
        tv = TotalVariation(weight=self.tv * math.prod(knowledge.input_spec.shape), p=2)
        batches = epochs * knowledge.inputs_per_client / knowledge.batch_size
        return replace(
            self.inversion,
            objective=SquaredL2(scale=2.0 / batches, weights=first_layers),
            space=EpochCopies(epochs=epochs),
            source=GradientSum(epochs=epochs),
            priors=(tv, SameMeans(epochs=epochs, weight=self.tie)),
        )

    def run(self, observation: Observation) -> Recovery:
        """Optimise all epochs' copies together, then match and average them."""
        epochs, recovery = copies_needed(observation), super().run(observation)
        if epochs == 1 or recovery.inputs is None:
            return recovery
        return replace(recovery, inputs=merge_copies(recovery.inputs, epochs))


def first_layers(count: int) -> list[float]:
    """Return weights of ``count`` tensors, a layer being a weight and a bias: 1, 1, 1/e, 1/e, 1/e^2, ..."""
    return [math.exp(-(i // 2)) for i in range(count)]


def copies_needed(knowledge: Knowledge) -> int:
    """Return the epochs, where their orders differ and are not known; else 1."""
    count = knowledge.inputs_per_client
    if count == knowledge.batch_size or knowledge.grants("batch_order"):
        return 1
    return knowledge.local_steps * knowledge.batch_size // count


@dataclass(frozen=True, kw_only=True)
class EpochCopies(Pixels, Space):
    """Inputs (Q, E * N, *input_shape): N for every epoch.

    Args:
        epochs: E.
    """

    epochs: int = 1

    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:
        """Return start values, other ones for every copy."""
        return super().start(observation, restarts, self.epochs * count)


@dataclass(frozen=True, kw_only=True)
class GradientSum(Unrolled):
    """The simulated client's update over the learning rate: the sum of its local steps' gradients.

    Args:
        epochs: Copies of the inputs, which it runs through one after the other.
    """

    epochs: int = 1

    def target(self, observation: Observation, units: str) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the update over the learning rate, (T, *shape) by parameter name."""
        return dict(observation.gradient)

    def order(self, rows: Rows) -> Tensor | None:
        """Return the order of the copies as they come, (Q, local_steps, batch)."""
        if self.epochs == 1:
            return super().order(rows)
        steps, batch = rows.observation.local_steps, rows.observation.batch_size
        return torch.arange(steps * batch).view(1, steps, batch).expand(len(rows.classes), -1, -1)

    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return simulated updates over the learning rate by name; see `Source.gradients`."""
        labels = labels.repeat(1, self.epochs, *(1,) * (labels.dim() - 2))
        per_unit = 1.0 if rows.observation.sends == "gradient" else rows.observation.lr
        return {name: sent / per_unit for name, sent in super().gradients(rows, inputs, labels, unknowns).items()}


@dataclass(frozen=True, kw_only=True)
class SameMeans(Weighted):
    """Mean squared difference of the epochs' mean inputs, over all pairs of epochs; it knows no order.

    Args:
        epochs: E.
        weight: Factor.
    """

    epochs: int

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        """Return the penalty (Q,) of inputs (Q, E * N, *input_shape)."""
        means = by_epoch(inputs, self.epochs).mean(2).flatten(2)
        # Over all E^2 pairs the mean of (a - b)^2 is twice the variance.
        return self.weight * 2 * means.var(1, correction=0).mean(1)


def merge_copies(inputs: Tensor, epochs: int) -> Tensor:
    """Match every epoch's copies (T, E * N, *input_shape) to the first one's by squared error; return means (T, N, *).

    The assignment is solved one trial and epoch at a time: there is no batched solver, and N is small.
    """
    copies = by_epoch(inputs, epochs)
    flat = copies.flatten(3).double()
    merged = copies.clone()
    for epoch in range(1, epochs):
        cost = torch.cdist(flat[:, 0], flat[:, epoch]).square().cpu().numpy()
        for trial, each in enumerate(cost):
            merged[trial, epoch] = copies[trial, epoch, torch.as_tensor(linear_sum_assignment(each)[1])]
    means: Tensor = merged.mean(1)
    return means


def by_epoch(inputs: Tensor, epochs: int) -> Tensor:
    """Return inputs (Q, E * N, *input_shape) as (Q, E, N, *input_shape)."""
    return inputs.reshape(len(inputs), epochs, -1, *inputs.shape[2:])

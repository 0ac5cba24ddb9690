"""When the Curious Abandon Honesty: trap weights in the first dense layer of an unchanged net."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from leakbench_baselines.attacks.analytic import Analytic
from leakbench_baselines.attacks.spear import dense_first_layer
from torch import Tensor

from leakbench import Attack, Cohort, Knowledge, Model, Observation, Recovery, UserError, register


@register("curious_abandon_honesty", version=1)
class CuriousAbandonHonesty(Attack):
    """When the Curious Abandon Honesty: trap weights make each neuron of the first layer fire for few inputs.

    Every row of the first dense layer gets random weights, negative at a random half of the pixels and positive, a
    little smaller, at the other half. With pixels in 0..1 most inputs then stay below zero, so that a neuron with a
    ReLU fires for few of them; one that fires for a single input has it as the quotient of its weight and bias
    gradients. The quotients are read as in `analytic`: those on which several neurons agree first.

    Sees: gradients of the first layer, or its change over local steps (exact for one step, at any learning rate);
    number of inputs. Changes no architecture; declines nets whose first layer is not a dense one followed by a ReLU.

    Departures: weights and bias are adapted to inputs that are normalised, so that they act on pixels in 0..1. That
    neurons agree replaces the authors' distance to the true inputs, which a server does not know. Constants are those
    of the public re-implementation in the breaching library.

    Args:
        scale: Size of the positive weights in units of the negative ones. The smaller, the fewer inputs a neuron fires
            for; the best one depends on the data and the batch.
        sigma: Standard deviation of the normal distribution whose absolute values are the weights.

    Reference: Boenisch, Dziedzic, Schuster, Shahin Shamsabadi, Shumailov, Papernot, "When the Curious Abandon Honesty:
    Federated Learning Is Not Private", EuroS&P 2023, arXiv 2112.02918
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    needs = frozenset({"batch_size", "weights", "change_parameters"})

    def __init__(self, *, scale: float = 0.95, sigma: float = 0.5) -> None:
        if not 0 < scale <= 1 or not 0 < sigma < math.inf:
            raise UserError(
                f"curious_abandon_honesty: expected 0 < scale <= 1 and sigma > 0, got {scale}, {sigma}; "
                "write curious_abandon_honesty(scale=0.95)"
            )
        self.scale = scale
        self.sigma = sigma

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline nets whose first layer is not a dense one with a bias and a ReLU."""
        dense_first_layer(knowledge, relu=True)
        return {}

    def plant(
        self,
        model: Model,  # noqa: ARG002
        cohort: Cohort,
        history: Sequence[Mapping[str, Tensor]],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Replace the first layer."""
        net = cohort.model
        name, bias = net.parameter_names[:2]
        rows, size = net.parameters[name].shape[1:]
        low, high = (bound.double().expand(net.input_shape).flatten() for bound in cohort.bounds)
        traps = trap_weights(rows, size, self.scale, self.sigma).to(low)
        weight = traps / (high - low)
        return {name: weight[None].to(net.dtype), bias: -(weight @ low)[None].to(net.dtype)}

    def run(self, observation: Observation) -> Recovery:
        """Claim what the neurons' quotients give, (T, n, *input_shape)."""
        recovery: Recovery = Analytic().run(observation)
        return recovery


def trap_weights(rows: int, size: int, scale: float, sigma: float) -> Tensor:
    """Return (rows, size): a random half of a row is -|N(0, sigma)|, the other half ``scale`` times the same sizes.

    They are the same for all trials, from a fixed seed. Of an odd number of pixels one has no weight.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randn(rows, size // 2, generator=generator, dtype=torch.float64) * sigma).abs()
    order = torch.rand(rows, size, generator=generator).argsort(1)
    values = torch.cat([-sizes, scale * sizes, sizes.new_zeros(rows, size % 2)], 1)
    return torch.zeros(rows, size, dtype=torch.float64).scatter_(1, order, values)

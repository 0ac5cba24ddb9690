"""The closed form of a dense first layer: inputs as quotients of its weight and bias gradients."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from leakbench_baselines.attacks.spear import dense_first_layer, first_layer_gradients
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register


@register("analytic", version=1)
class Analytic(Attack):
    """First-layer quotient: a row of a dense layer's weight gradient over its bias gradient is the layer's input.

    For one input every row i gives dW_i / db_i = x; they are combined as sum_i db_i dW_i / sum_i db_i^2, the least
    squares solution of dW = db x, which rows of small db_i cannot upset. It is exact whatever comes after the layer.

    For more inputs a row gives their average, weighted by how much each moves that neuron. A neuron that only one of
    them activates (ReLU) gives that one, and so does any other such neuron: rows that agree are taken to be an input,
    those in which most rows agree first. Where fewer are found than there are inputs, single rows follow: possible
    images first, and of these the ones least like what is already claimed.

    Sees: gradients of the first layer, or its change over local steps (exact for one input if they are plain SGD, an
    approximation for more; the learning rate may be unknown); number of inputs. Declines nets without such a layer.

    The paper has the quotient, and that it is an average for a batch. Reading single neurons follows Boenisch et al.
    2023 (arXiv 2112.02918), without their planted weights; agreement and the order of the rest are chosen here.

    Args:
        tolerance: Rows agree when they differ by less than this root mean square, in units of the pixel range.

    Reference: Phong, Aono, Hayashi, Wang, Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic
    Encryption", IEEE TIFS 2018, doi 10.1109/TIFS.2017.2787987
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    needs = frozenset({"batch_size", "weights"})

    def __init__(self, *, tolerance: float = 1e-4) -> None:
        if not 0 < tolerance < 1:
            raise UserError(f"analytic: expected 0 < tolerance < 1, got {tolerance}; write analytic(tolerance=1e-4)")
        self.tolerance = tolerance

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline nets whose first layer is not dense with a bias."""
        dense_first_layer(knowledge, relu=False)
        return {}

    def run(self, observation: Observation) -> Recovery:
        """Claim inputs (T, n, *input_shape): as many as are behind the update, or as the layer has rows."""
        weight, bias = _scaled(*first_layer_gradients(observation, observation.model.parameter_names[:2]))
        shape = observation.input_spec.shape
        low, high = (bound.to(weight).expand(shape).flatten() for bound in observation.bounds)
        total = observation.total_inputs
        if total == 1:
            found = _combine(weight, bias, torch.ones_like(bias))
        else:
            found = self._batch(weight, bias, low, high, total)
        return Recovery(inputs=found.clamp(low, high).view(*found.shape[:2], *shape), model_evaluations=0)

    def _batch(self, weight: Tensor, bias: Tensor, low: Tensor, high: Tensor, total: int) -> Tensor:
        """Return candidates (T, min(total, H), P) out of weight (T, H, P) and bias (T, H) gradients."""
        rows = weight / bias.where(bias != 0, 1)[..., None]
        rows = ((rows - low) / (high - low)).clamp(-1, 2)  # in pixel values; what is far off is no image either way
        outside = (rows - rows.clamp(0, 1)).square().mean(2).sqrt().where(bias != 0, 1)
        possible = outside < self.tolerance
        # In float64, since the products that distances are made of lose half of the digits. Trials take turns for the
        # memory that takes.
        distance = torch.stack([torch.cdist(one, one) for one in rows]) / rows.shape[2] ** 0.5
        near = (distance < self.tolerance) & possible[:, :, None] & possible[:, None, :]
        trials = torch.arange(len(rows), device=rows.device)
        free = torch.ones_like(possible)
        novelty = torch.ones_like(outside)
        claims = []
        for _ in range(min(total, rows.shape[1])):
            # How many agree comes first (whole numbers), then how far a row is from the claims (below 1).
            rank = (near.sum(2) + novelty / 2).where(possible, -outside).where(free, -math.inf)
            best = rank.argmax(1)
            members = (near[trials, best] & free).scatter(1, best[:, None], True)
            claims.append(_combine(weight, bias, members.to(bias)))
            free &= ~members
            novelty = torch.minimum(novelty, distance[trials, best])
        return torch.cat(claims, 1)


def _scaled(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients weight (T, H, P) and bias (T, H), scaled so that the latter is at most 1."""
    size = bias.abs().amax(1, keepdim=True)
    size = size.where(size > 0, 1)
    return (weight / size[..., None]).nan_to_num(0, 0, 0), (bias / size).nan_to_num(0, 0, 0)


def _combine(weight: Tensor, bias: Tensor, members: Tensor) -> Tensor:
    """Return the least squares solution (T, 1, P) of dW = db x over the rows that ``members`` (T, H) marks."""
    square = (members * bias.square()).sum(1)
    value = torch.einsum("th,thp->tp", members * bias, weight)
    return (value / square.where(square > 0, 1)[:, None])[:, None]

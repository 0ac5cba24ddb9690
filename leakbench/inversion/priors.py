"""What a good candidate looks like, apart from its gradient: one penalty per row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.errors import NotApplicable, UserError
from leakbench.federation.statistics import is_running_statistic
from leakbench.inversion.rows import Rows
from leakbench.knowledge import Knowledge
from leakbench.models.functional import layer_inputs


class Prior(ABC):
    """A penalty on candidate inputs."""

    def check(self, knowledge: Knowledge) -> None:  # noqa: ARG002  (neutral default)
        """Decline a task that lacks what the prior needs.

        Raises:
            NotApplicable: The model has no such layers.
            NotGranted: The threat model withholds them.
        """
        return

    @abstractmethod
    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:
        """Return the penalty (Q,) of inputs (Q, N, *input_shape)."""


@dataclass(frozen=True, kw_only=True)
class Weighted(Prior):
    """A prior with a factor.

    Args:
        weight: Factor.

    Raises:
        UserError: The factor is negative or no finite number.
    """

    weight: float

    def __post_init__(self) -> None:
        _check(self, "weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Weighted):
    """mean over pixels of (|dx|^p + |dy|^p)^q, dx and dy being differences of neighbours; images only.

    Args:
        weight: Factor.
        p: Inner power; 1 is anisotropic.
        q: Outer power; with p = 2, 0.5 is isotropic.
        opponents: Whether the differences of the color channels count as channels too ("double opponent").
    """

    p: float = 1.0
    q: float = 1.0
    opponents: bool = False

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        """Return the penalty (Q,) of inputs (Q, N, channels, height, width)."""
        if self.opponents and inputs.shape[2] == 3:
            red, green, blue = inputs.unbind(2)
            inputs = torch.cat([inputs, torch.stack([red - green, red - blue, green - blue], 2)], 2)
        down, right = inputs.diff(dim=-2).abs(), inputs.diff(dim=-1).abs()
        if self.p == self.q == 1:
            return self.weight * _sum_of_means(down.flatten(1), right.flatten(1))
        eps = 1e-8  # breaching's; a power below 1 has no derivative at 0
        both = (down[..., :-1] + eps).pow(self.p) + (right[..., :-1, :] + eps).pow(self.p)
        penalty: Tensor = both.pow(self.q).flatten(1).mean(1)
        return self.weight * penalty


def _sum_of_means(first: Tensor, second: Tensor) -> Tensor:
    """Return mean(first) + mean(second) over (Q, *), the mean of nothing being 0."""
    return first.sum(1) / max(1, first.shape[1]) + second.sum(1) / max(1, second.shape[1])


@dataclass(frozen=True, kw_only=True)
class L2Norm(Weighted):
    """||x||_2 of every input, averaged over the batch.

    Args:
        weight: Factor.
    """

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        """Return the penalty (Q,) of inputs (Q, N, *input_shape)."""
        lengths: Tensor = torch.linalg.vector_norm(inputs.flatten(2), dim=2)
        return self.weight * lengths.mean(1)


@dataclass(frozen=True, kw_only=True)
class BatchNormStatistics(Weighted):
    """sum_l ||mean_l(x) - M_l||_2 + ||var_l(x) - V_l||_2 over the inputs of the BatchNorm layers.

    M and V are the statistics that the threat model grants: the running ones, or those of the private batch.

    Args:
        weight: Factor.
        first: Factor of the first layer.
    """

    first: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "first", self.first)

    def check(self, knowledge: Knowledge) -> None:
        """Decline a net without BatchNorm, or statistics that are withheld."""
        if not knowledge.bn_statistics:
            raise NotApplicable("the BatchNorm prior needs a net with BatchNorm layers")

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:
        """Return the penalty (Q,) of inputs (Q, N, *input_shape)."""
        granted = rows.observation.bn_statistics.items()
        statistics = {name: rows.spread(value) for name, value in granted if is_running_statistic(name)}
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in statistics))
        # Every layer normalises by what the next one's statistics were taken after.
        model = rows.model.with_state(buffers=statistics)
        penalty = torch.zeros(len(inputs), dtype=inputs.dtype, device=inputs.device)
        for i, (layer, x) in enumerate(zip(layers, layer_inputs(model, inputs, layers), strict=True)):
            dims = [d for d in range(x.dim()) if d not in (0, 2)]
            count = x[0, :, 0].numel()
            mean, var = x.mean(dims), x.var(dims, correction=min(1, count - 1))  # unbiased, as the granted ones
            for found, name in ((mean, "running_mean"), (var, "running_var")):
                wanted = statistics[f"{layer}.{name}"]
                penalty = penalty + (self.first if i == 0 else 1.0) * (found - wanted).norm(dim=1)
        return self.weight * penalty


@dataclass(frozen=True, kw_only=True)
class GroupConsistency(Weighted):
    """Distance of every restart's input from the mean over the restarts of its trial; no registration.

    Args:
        weight: Factor.
    """

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:
        """Return the penalty (Q,) of inputs (Q, N, *input_shape)."""
        groups = inputs.view(-1, rows.restarts, *inputs.shape[1:])
        apart = (groups - groups.detach().mean(1, keepdim=True)).flatten(3)
        return self.weight * apart.square().sum(3).add(1e-12).sqrt().mean(2).flatten()


@dataclass(frozen=True, kw_only=True)
class FeatureMatch(Weighted):
    """Squared distance of the last layer's input from g_W[c] / g_b[c], its mean over the examples of class c.

    Args:
        weight: Factor.
    """

    def check(self, knowledge: Knowledge) -> None:
        """Decline a last layer without bias."""
        if not knowledge.model.has_head_bias:
            raise NotApplicable("feature matching divides by the last layer's bias gradient; this net has no such bias")

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:
        """Return the penalty (Q,) of inputs (Q, N, *input_shape)."""
        weight, bias = (rows.target[f"{rows.model.head}.{part}"] for part in ("weight", "bias"))
        small = bias.abs() < torch.finfo(bias.dtype).eps * bias.abs().amax(1, keepdim=True)
        measured = weight / torch.where(small, torch.ones_like(bias), bias)[..., None]
        (features,) = layer_inputs(rows.model, inputs, [rows.model.head])
        wanted = measured.gather(1, rows.classes[..., None].expand(-1, -1, measured.shape[2]))
        return self.weight * (features - wanted).square().mean((1, 2))


def _check(prior: Prior, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name} of {type(prior).__name__}: expected a finite number of at least 0, got {value}")

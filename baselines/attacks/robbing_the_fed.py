"""Robbing the Fed: an imprint module sorts a batch into bins and hands out what lies alone in one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from leakbench import Attack, Cohort, Knowledge, Model, Observation, Recovery, UserError, register

MEASURES = ("mean", "cosine", "random")
NARROWEST = 1e-4
"""Least bandwidth of the estimated distribution, in units of the range of measurements."""
CENTERS, GRID = 1000, 4096
"""Quantiles that stand for the auxiliary measurements; points at which their distribution is computed."""
UNIFORM = 1e-3
"""Mass that the estimated distribution spreads evenly."""
SURE = 1e-2
"""Doubt up to which a bin counts as found; such bins are claimed in their order, which rounding does not change."""
FLAT = 1e-3
"""Least contrast of an input, in units of the valid range."""
POSSIBLE = 1.0
"""Doubt above which a bin's quotient is no input at all."""


@register("robbing_the_fed", version=1)
class RobbingTheFed(Attack):
    """Robbing the Fed: bins of a linear measurement, in front of any net, isolate single inputs of an aggregate.

    The rows of an inserted linear layer all take the same measurement of an input, its mean brightness say, and their
    biases cut its distribution into bins of equal mass. Behind a ReLU a row is moved by all inputs above its bin's
    lower edge, so two neighbouring rows differ by the inputs in one bin: the difference of their weight gradients over
    that of their bias gradients is the input, exactly, if the bin holds one. Of n inputs n (1 - 1/bins)^(n - 1) are
    expected to be alone; inputs that share a bin are claimed as their average. Whatever is not found is filled up with
    the mean auxiliary input.

    Sees: gradients of the inserted layer, or its change over local steps (exact for one step, at any learning rate);
    number of inputs; auxiliary inputs, for the distribution. Any aggregate counts as one batch. Holds, and makes every
    client send, bins * d numbers for inputs of d.

    Departures: the module adds one number to all coordinates of the input (the authors' "addition"; their default is a
    dense layer back to the input's size), which doubles the bins a parameter buys. Edges are quantiles of a kernel
    estimate of the auxiliary inputs' measurements, and the outermost are the least and the greatest measurement
    possible; the authors take a standard normal or Laplace distribution.
    Bins are ranked by whether what they give is a possible input whose measurement lies in that very bin; the authors
    take the largest gradients.

    Args:
        bins: Rows.
        measure: ``mean`` of the input's numbers, ``cosine`` transform of the flat input at `mode`, or ``random``.
        mode: Frequency of ``cosine``.
        gain: Scale of the planted weights; the rows' sum is scaled by the inverse. Gradients grow as weights shrink,
            which a small gain needs where weights or their differences are sent: they are rounded.
        sparse: Whether rows are clamped at the upper edge of their bin, so that each is moved by its own bin alone.
            With a small gain (1e-5) an input's first local step moves its row so far that no other input enters the
            bin, and several local steps are exact too.

    Reference: Fowl, Geiping, Czaja, Goldblum, Goldstein, "Robbing the Fed: Directly Obtaining Private Data in Federated
    Learning with Modified Models", ICLR 2022, arXiv 2110.13057
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    inserts = "imprint_linear"
    needs = frozenset({"auxiliary", "batch_size", "weights", "change_parameters", "change_architecture"})
    reads = ("imprint.weight", "imprint.bias")

    def __init__(
        self,
        *,
        bins: int = 1000,
        measure: str = "mean",
        mode: int = 32,
        gain: float = 1e-3,
        sparse: bool = False,
    ) -> None:
        if bins < 1 or mode < 1 or not 0 < gain < math.inf or measure not in MEASURES:
            raise UserError(
                f"robbing_the_fed: expected bins >= 1, mode >= 1, gain > 0 and measure one of {', '.join(MEASURES)}, "
                f"got {bins}, {mode}, {gain}, {measure!r}; write robbing_the_fed(bins=1000)"
            )
        self.bins = bins
        self.measure = measure
        self.mode = mode
        self.gain = gain
        self.sparse = sparse

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Choose the measurement, ``probe`` (d,), and the bins' ``edges`` (bins + 1,)."""
        auxiliary = knowledge.auxiliary[0].flatten(1).double()
        low, high = (b.double().expand(knowledge.input_spec.shape).flatten() for b in knowledge.bounds)
        probe = self._probe(auxiliary)
        reach = torch.stack([torch.where(probe > 0, a, b) @ probe for a, b in ((low, high), (high, low))])
        edges = bin_edges(auxiliary @ probe, self.bins, reach)
        return {"probe": probe, "edges": edges, "mean": auxiliary.mean(0)}

    def plant(
        self,
        model: Model,  # noqa: ARG002
        cohort: Cohort,
        history: Sequence[Mapping[str, Tensor]],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Give every row the same measurement, and the lower edge of its bin as bias."""
        probe, edges = cohort.prepared["probe"], cohort.prepared["edges"]
        scale = self.gain * torch.ones_like(edges[1:])
        if self.sparse:
            scale = scale / (edges[1:] - edges[:-1])
        planted = {
            "imprint.weight": scale[:, None] * probe,
            "imprint.bias": -scale * edges[:-1],
            "imprint.out": torch.full_like(scale, 1 / (self.gain * self.bins)),
        }
        return {name: value[None].to(cohort.model.dtype) for name, value in planted.items()}

    def run(self, observation: Observation) -> Recovery:
        """Claim what the bins give, (T, K * N, *input_shape)."""
        difference = observation.difference(observation.update)
        weight, bias = (difference[f"imprint.{part}"].double() for part in ("weight", "bias"))
        if not self.sparse:
            weight = torch.cat([weight[:, :-1] - weight[:, 1:], weight[:, -1:]], 1)
            bias = torch.cat([bias[:, :-1] - bias[:, 1:], bias[:, -1:]], 1)
        prepared, shape = observation.prepared, observation.input_spec.shape
        low, high = (bound.double().expand(shape).flatten() for bound in observation.bounds)
        total = observation.total_inputs
        claims, found = [], []
        for one, share in zip(weight, bias, strict=True):  # trials take turns for the memory of all their bins
            rows = one / share.where(share != 0, 1)[:, None]
            claim, doubt = best_rows(rows[None], share[None], prepared, (low, high), total)
            claims.append(claim.view(-1, *shape))
            found.append((doubt <= SURE).double().sum())
        return Recovery(inputs=torch.stack(claims), model_evaluations=0, notes={"found": torch.stack(found)})

    def _probe(self, auxiliary: Tensor) -> Tensor:
        size = auxiliary.shape[1]
        if self.measure == "mean":
            return torch.full((size,), 1 / size).to(auxiliary)
        if self.measure == "cosine":
            place = torch.arange(size).to(auxiliary) + 0.5
            return torch.cos(math.pi / size * place * self.mode) / size
        draws = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(auxiliary)
        return (draws - draws.mean()) / size


def bin_edges(measured: Tensor, bins: int, reach: Tensor) -> Tensor:
    """Return edges (bins + 1,) between which equally many measurements are expected, ``reach`` at the ends.

    Plain quantiles of few examples leave some bins too full; a kernel estimate (Gaussian, Silverman's bandwidth) does
    not. A trace of uniform mass keeps every bin wider than nothing.

    Args:
        measured: (n,) measurements of auxiliary inputs.
        bins: Number of bins.
        reach: (2,) least and greatest measurement possible.
    """
    lower, upper = reach.tolist()
    low, quarter, middle, high = measured.quantile(torch.tensor([0, 0.25, 0.75, 1]).to(measured)).tolist()
    spread = min(float(measured.std(correction=0)), (middle - quarter) / 1.34)
    width = max(0.9 * spread * len(measured) ** -0.2, NARROWEST * (upper - lower))
    centers = measured.quantile((torch.arange(CENTERS).to(measured) + 0.5) / CENTERS)
    grid = torch.linspace(max(lower, low - 4 * width), min(upper, high + 4 * width), GRID).to(measured)
    grid = torch.cat([reach[:1], grid, reach[1:]])
    mass = torch.special.ndtr((grid[:, None] - centers) / width).mean(1)
    mass = (mass - mass[0]) / (mass[-1] - mass[0])
    mass = (1 - UNIFORM) * mass + UNIFORM * (grid - lower) / (upper - lower)
    levels = torch.arange(1, bins) / bins
    inner = torch.from_numpy(np.interp(levels.numpy(), mass.cpu().numpy(), grid.cpu().numpy())).to(measured)
    return torch.cat([reach[:1], inner, reach[1:]])


def best_rows(
    rows: Tensor, share: Tensor, prepared: Mapping[str, Tensor], bounds: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Return the ``count`` best inputs (T, count, d), the mean auxiliary input where there are fewer, and their doubt.

    Doubt is how far a bin's quotient is from a valid input, plus how far its measurement is from the bin. A constant
    is never claimed: equal weights are rounded equally when they are sent, which looks like one.

    Args:
        rows: (T, bins, d) what each bin gives.
        share: (T, bins) the bins' bias gradients; a bin with none is empty.
        prepared: `probe` (d,), `edges` (bins + 1,) and `mean` (d,).
        bounds: Least and greatest valid input, (d,) each.
        count: Inputs wanted.
    """
    low, high = bounds
    probe, edges = prepared["probe"], prepared["edges"]
    outside = ((rows - rows.clamp(low, high)) / (high - low)).square().mean(2).sqrt()
    measured = rows @ probe
    astray = (measured - measured.clamp(edges[:-1], edges[1:])).abs() / (edges[-2] - edges[1])
    plain = ((rows.amax(2) - rows.amin(2)) / (high - low).amax()) < FLAT
    doubt = (outside + astray).where((share != 0) & ~plain, math.inf).nan_to_num(math.inf, math.inf).clamp(min=SURE)
    doubt, order = doubt.sort(dim=1, stable=True)
    doubt, order = doubt[:, :count], order[:, :count]
    best = rows.take_along_dim(order[..., None], 1).where((doubt < POSSIBLE)[..., None], prepared["mean"])
    spare = prepared["mean"].expand(len(rows), count - best.shape[1], -1)
    return torch.cat([best.clamp(low, high), spare], 1), doubt

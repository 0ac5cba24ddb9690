"""Random sparsification of the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

import torch
from leakbench_baselines.defenses.clip_l2 import direction_fit
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("random_k", version=1)
class RandomK(Defense):
    """Random-k sparsification: sends the fraction 1 - p of coordinates, chosen uniformly at random, and zeros.

    Of n coordinates exactly k = ceil((1 - p) n) are kept in each tensor (``layer``) or in the whole update
    (``global``), unchanged, or times n / k with ``rescale``, which makes what is sent unbiased. What is kept does not
    depend on the update. Of the same draws, what is kept at a greater p is kept at a smaller one too.

    Acts on: the update.

    Args:
        p: Fraction that is dropped.
        scope: ``layer``: weight and bias of every layer by themselves; ``global``: all coordinates together.
        rescale: Whether what is kept is multiplied by n / k.

    Reference: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599
    """

    acts_on = frozenset({"update"})
    strength = ("p", "higher")
    neutral = MappingProxyType({"p": 0.0})
    draws = "which coordinates are kept"
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, p: float = 0.9, scope: str = "layer", rescale: bool = False) -> None:
        if not 0 <= p < 1:
            raise UserError(
                f"random_k: p: expected 0 <= p < 1 (the fraction that is dropped), got {p}; write random_k(p=0.9)"
            )
        if scope not in ("layer", "global"):
            raise UserError(
                f"random_k: scope: expected 'layer' or 'global', got {scope!r}; write random_k(scope='layer')"
            )
        self.p = p
        self.scope = scope
        self.rescale = rescale

    @property
    def tensorwise(self) -> bool:
        """Whether coordinates are drawn within each tensor."""
        return self.scope == "layer"

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Zero what is not drawn."""
        draws = {name: ctx.random.at(name).rand(value[0].numel()) for name, value in update.items()}
        if self.scope == "layer":
            factors = {name: self._factors(draw) for name, draw in draws.items()}
        else:
            sizes = [draw.shape[1] for draw in draws.values()]
            parts = torch.split(self._factors(torch.cat(list(draws.values()), 1)), sizes, 1)
            factors = dict(zip(draws, parts, strict=True))
        return {name: value * factors[name].view_as(value).to(value.dtype) for name, value in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return a surrogate (T,): how well the directions agree on the coordinates that were sent."""
        score: Tensor = direction_fit(sent, {name: clean[name] * (value != 0) for name, value in sent.items()})
        return score

    def kept(self, coordinates: int) -> int:
        """Return how many of ``coordinates`` are kept, in exact arithmetic."""
        return math.ceil((1 - Fraction(str(self.p))) * coordinates)

    def _factors(self, draws: Tensor) -> Tensor:
        """Return 0 or the factor of what is kept, in float64, for uniform ``draws`` (T, n)."""
        count = self.kept(draws.shape[1])
        # Stable, so that equal draws leave what is kept nested over p.
        order = draws.argsort(dim=1, stable=True)[:, :count]
        factor = draws.shape[1] / count if self.rescale else 1.0
        return torch.zeros_like(draws, dtype=torch.float64).scatter(1, order, factor)

"""Top-k sparsification of the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

import torch
from leakbench_baselines.defenses.clip_l2 import direction_fit, nearness
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


def keep_largest(values: Tensor, kept: int) -> Tensor:
    """Return ``values`` (T, n) with all but the ``kept`` greatest magnitudes of each row set to zero.

    Of equal magnitudes the first in the row stay.
    """
    size = values.abs()
    least = size.topk(kept, dim=1, sorted=False).values.min(1, keepdim=True).values
    above, tied = size > least, size == least
    room = kept - above.sum(1, keepdim=True)
    return values * (above | (tied & (tied.cumsum(1) <= room)))


@register("topk", version=2)
class TopK(Defense):
    """Top-k sparsification: sends the fraction 1 - p of coordinates with the greatest magnitude, unchanged, and zeros.

    Of n coordinates exactly ceil((1 - p) n) are kept in each tensor (``layer``) or in the whole update (``global``).
    With ``error_feedback`` a client adds what it dropped in earlier rounds to the update before it drops again, so that
    all is sent sooner or later; the first round is the same with and without.

    Acts on: the update.

    Args:
        p: Fraction that is dropped.
        scope: ``layer``: weight and bias of every layer by themselves; ``global``: all coordinates together.
        error_feedback: Whether what is dropped is carried over to the client's next round. Not with weights that are
            sent themselves, of which a sum over rounds means nothing.

    Reference: Aji, Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017, arXiv 1704.05021; as
    a defense Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935
    """

    acts_on = frozenset({"update"})
    strength = ("p", "higher")
    neutral = MappingProxyType({"p": 0.0})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, p: float = 0.9, scope: str = "layer", error_feedback: bool = False) -> None:
        if not 0 <= p < 1:
            raise UserError(f"topk: p: expected 0 <= p < 1 (the fraction that is dropped), got {p}; write topk(p=0.9)")
        if scope not in ("layer", "global"):
            raise UserError(f"topk: scope: expected 'layer' or 'global', got {scope!r}; write topk(scope='layer')")
        self.p = p
        self.scope = scope
        self.error_feedback = error_feedback

    @property
    def tensorwise(self) -> bool:
        """Whether magnitudes are ranked within each tensor."""
        return self.scope == "layer"

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Zero the smallest coordinates.

        Raises:
            UserError: Weights are sent, with ``error_feedback``.
        """
        if not self.error_feedback:
            return self._sparse(update)
        if ctx.sends == "weights":
            raise UserError("topk: error_feedback: expected a gradient or delta, got weights; write sends: delta")
        owed = {name: value + ctx.state[name] if name in ctx.state else value for name, value in update.items()}
        sent = self._sparse(owed)
        ctx.state.update({name: value - sent[name] for name, value in owed.items()})
        return sent

    def _sparse(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``update`` with its smallest coordinates zeroed."""
        flat = {name: value.flatten(1) for name, value in update.items()}
        if self.scope == "layer":
            kept = {name: keep_largest(value, self.kept(value.shape[1])) for name, value in flat.items()}
        else:
            every = torch.cat(list(flat.values()), 1)
            sizes = [value.shape[1] for value in flat.values()]
            parts = torch.split(keep_largest(every, self.kept(every.shape[1])), sizes, 1)
            kept = dict(zip(flat, parts, strict=True))
        return {name: kept[name].view_as(value) for name, value in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): how well the directions agree on the coordinates that were sent, which are known.

        With error feedback what earlier rounds' candidates would owe comes on top, which ``ctx.state`` carries.

        Less the `nearness` lost by coordinates that were not sent although they exceed the least one that was.
        """
        if self.error_feedback:
            owed = {name: clean[name] + ctx.state[name] if name in ctx.state else clean[name] for name in sent}
            ctx.state.update({name: value - sent[name] for name, value in owed.items()})
            clean = owed
        sent = self._sparse(dict(sent))  # a later part's noise on what was dropped tells nothing
        shown = {name: value != 0 for name, value in sent.items()}
        floor = {name: _least(value.abs().flatten(1)) for name, value in sent.items()}
        if self.scope == "global":
            floor = dict.fromkeys(sent, torch.stack(list(floor.values())).amin(0))
        over = {
            name: (clean[name].abs() - floor[name].view(-1, *(1,) * (value.dim() - 1))).clamp(min=0) * ~shown[name]
            for name, value in sent.items()
        }
        score: Tensor = direction_fit(sent, {name: clean[name] * shown[name] for name in sent}) + nearness(sent, over)
        return score

    def kept(self, coordinates: int) -> int:
        """Return how many of ``coordinates`` are kept, in exact arithmetic: (1 - 0.9) * 10 is more than 1 in floats."""
        return math.ceil((1 - Fraction(str(self.p))) * coordinates)


def _least(size: Tensor) -> Tensor:
    """Return the least positive magnitude (T,) of ``size`` (T, n); the greatest number where there is none."""
    return torch.where(size > 0, size, torch.finfo(size.dtype).max).amin(1)

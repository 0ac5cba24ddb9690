"""Clipping the update's L2 norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, Mechanism, UserError, register


@register("clip_l2", version=1)
class ClipL2(Defense):
    """L2 clipping: scales what is sent down to a norm of at most ``bound``.

    Alone it only rescales, which no attack that ignores the scale notices. With ``+gaussian_noise(std=0.1)`` after it,
    it is the clipped and noised update of LLG's study (bounds 1, 5 and 10). Meant for gradients and differences of
    weights: where the weights themselves are sent, these are clipped.

    Acts on: the update.

    Args:
        bound: Greatest norm.
        per_layer: Whether each tensor is scaled by itself instead of all by the norm of the whole.

    Reference: Geyer, Klein, Nabi, "Differentially Private Federated Learning: A Client Level Perspective", 2017,
    arXiv 1712.07557
    """

    acts_on = frozenset({"update"})
    strength = ("bound", "lower")

    def __init__(self, *, bound: float = 1.0, per_layer: bool = False) -> None:
        if bound <= 0:
            raise UserError(f"clip_l2: bound: expected more than 0, got {bound}; write clip_l2(bound=1.0)")
        self.bound = bound
        self.per_layer = per_layer

    @property
    def tensorwise(self) -> bool:
        """Whether each tensor has a norm of its own."""
        return self.per_layer

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Scale each trial's update."""
        # In float64, so that the squares of a diverged update do not overflow.
        norms = {n: torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=torch.float64) for n, v in update.items()}
        if not self.per_layer:
            whole = torch.linalg.vector_norm(torch.stack(list(norms.values())), dim=0)
            norms = dict.fromkeys(norms, whole)
        return {
            n: v * (self.bound / norms[n]).clamp(max=1).to(v).view(-1, *(1,) * (v.dim() - 1)) for n, v in update.items()
        }

    def mechanism(
        self,
        before: Mechanism,
        *,
        batch_size: int,  # noqa: ARG002
        reduction: Literal["mean", "sum"],  # noqa: ARG002
    ) -> Mechanism | None:
        """Return the bound on the whole update; nothing where each of who knows how many tensors has its own."""
        return None if self.per_layer else before.clipped(self.bound)

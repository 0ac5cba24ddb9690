"""Clipping the update's L2 norm."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, Mechanism, UserError, register


def direction_fit(sent: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> Tensor:
    """Return n (cos - 1), (T,), n being the entries of ``sent``: greatest, 0, where both have the same direction.

    Per entry it is what an attack that compares directions minimises, so that priors keep their weight beside it.
    """
    # By the greatest entry first: squares of an update of 1e-30 would vanish in float32.
    goal, found = _by_greatest(sent), _by_greatest({name: clean[name] for name in sent})
    dot = torch.stack([(goal[name] * found[name]).sum(1) for name in goal]).sum(0)
    squares = [torch.stack([v.square().sum(1) for v in part.values()]).sum(0) for part in (goal, found)]
    norms = [square.clamp(min=torch.finfo(dot.dtype).tiny).sqrt() for square in squares]
    return _entries(sent) * (dot / (norms[0] * norms[1]) - 1)


def moved(update: Mapping[str, Tensor], ctx: DefenseContext) -> Mapping[str, Tensor]:
    """Return what an update changed (T, *shape), in the gradient's direction: weights are taken from those received."""
    if ctx.sends != "weights" or ctx.received is None:
        return update
    return {name: ctx.received.parameters[name] - value for name, value in update.items()}


def nearness(sent: Mapping[str, Tensor], excess: Mapping[str, Tensor]) -> Tensor:
    """Return -n / 2 ||excess||^2 / ||sent||^2, (T,), n being the entries of ``sent``."""
    goal = torch.stack([v.flatten(1).square().sum(1) for v in sent.values()]).sum(0)
    lost = torch.stack([v.flatten(1).square().sum(1) for v in excess.values()]).sum(0)
    return -_entries(sent) / 2 * lost / goal.clamp(min=torch.finfo(goal.dtype).tiny)


def _by_greatest(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the update (T, n) by name, divided by each trial's greatest magnitude."""
    flat = {name: value.flatten(1) for name, value in update.items()}
    greatest = torch.stack([value.detach().abs().amax(1) for value in flat.values()]).amax(0)
    return {name: value / torch.where(greatest > 0, greatest, 1)[:, None] for name, value in flat.items()}


def _entries(update: Mapping[str, Tensor]) -> int:
    return sum(value[0].numel() for value in update.values())


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
    neutral = MappingProxyType({"bound": 1e30})
    likelihood = "surrogate"
    adaptive = ("analytic", "bayes_adaptive", "learning_to_invert", "learned_labels")

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
        # The divisor is clamped, not the quotient: an update of zeros then has finite derivatives.
        shares = {n: self.bound / norm.clamp(min=self.bound) for n, norm in norms.items()}
        scale = {n: torch.where(norms[n] > self.bound, shares[n], 1.0).to(v) for n, v in update.items()}
        return {n: v * scale[n].view(-1, *(1,) * (v.dim() - 1)) for n, v in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): `nearness` of the clipped candidate, which beyond the bound ignores the scale."""
        clipped = self.update(dict(clean), ctx)
        return nearness(sent, {name: clipped[name] - value for name, value in sent.items()})

    def mechanism(
        self,
        before: Mechanism,
        *,
        batch_size: int,  # noqa: ARG002
        reduction: Literal["mean", "sum"],  # noqa: ARG002
    ) -> Mechanism | None:
        """Return the bound on the whole update; nothing where each of who knows how many tensors has its own."""
        return None if self.per_layer else before.clipped(self.bound)

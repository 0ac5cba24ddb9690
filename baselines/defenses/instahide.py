"""InstaHide within a batch."""

from __future__ import annotations

import torch
from leakbench_baselines.defenses.label_smoothing import as_soft
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register

TRIES = 200
"""Draws of weights before the last is taken as it is; each is accepted with more than one chance in ten."""
SAMPLERS = ("official", "dirichlet")


@register("instahide", version=1)
class InstaHide(Defense):
    """InstaHide: trains on mixtures of ``k`` examples whose pixels have random signs, and on mixed labels.

    Every example of the batch is mixed with k - 1 others, drawn anew in every local step, and every pixel of the
    mixture is multiplied by a sign of its own in the space of the model's inputs. A batch of B stays one of B.

    Acts on: the local batch. This is the variant inside a dataset: partners come from the batch, the only examples at
    hand, so that a batch of fewer than k mixes all it has, and of one alone only the signs are hidden. Inputs that are
    not normalised are never negative, and their signs hide nothing.

    Args:
        k: Examples in a mixture, the own one included.
        sampler: Of a mixture's weights: ``official``, absolute normal numbers over their sum, as the authors' code
            draws them; ``dirichlet``, Dirichlet(3, 1, ..., 1), the own example first, as the evaluation of Huang et al.
            does. Both are drawn anew until none is above ``largest``.
        largest: Of the weights.

    Reference: Huang, Song, Li, Arora, "InstaHide: Instance-hiding Schemes for Private Distributed Learning", ICML
    2020, arXiv 2010.02772; the Dirichlet weights: Huang, Gupta, Song, Li, Arora, NeurIPS 2021, arXiv 2112.00059
    """

    acts_on = frozenset({"batch"})
    merges = 1  # as many encodings as examples: an encoding hides k of them, and each is in k
    draws = "partners, weights and the sign of every pixel"
    likelihood = "simulated"
    adaptive = ("instahide_decode", "bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, k: int = 4, sampler: str = "official", largest: float = 0.65) -> None:
        if k < 1:
            raise UserError(f"instahide: k: expected at least 1, got {k}; write instahide(k=4)")
        if sampler not in SAMPLERS:
            raise UserError(f"instahide: sampler: expected {' or '.join(SAMPLERS)}, got {sampler!r}")
        if not 0.5 < largest <= 1:
            raise UserError(f"instahide: largest: expected 0.5 < largest <= 1, got {largest}; write largest=0.65")
        self.k = k
        self.sampler = sampler
        self.largest = largest

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Mix and mask."""
        trials, batch = inputs.shape[:2]
        own = torch.eye(batch, dtype=torch.bool, device=inputs.device)
        order = ctx.random.at("partners").rand(batch, batch).masked_fill(own, -1).argsort(2)
        chosen = order[..., : min(self.k, batch)]
        weights = self.weights(ctx, batch, chosen.shape[2]).to(inputs)
        matrix = inputs.new_zeros(trials, batch, batch).scatter(2, chosen, weights)
        signs = 1 - 2 * ctx.random.at("signs").randint(2, *inputs.shape[1:]).to(inputs)
        mixed = torch.einsum("tij,tj...->ti...", matrix, inputs)
        return signs * mixed, matrix @ as_soft(labels, inputs, ctx.model.num_classes)

    def weights(self, ctx: DefenseContext, batch: int, count: int) -> Tensor:
        """Draw weights (T, batch, count) that sum to 1, none above ``largest`` where there are several."""
        found = self._drawn(ctx, 0, batch, count)
        for attempt in range(1, TRIES):
            wrong = found.amax(2, keepdim=True) > self.largest
            if count == 1 or not bool(wrong.any()):
                break
            found = torch.where(wrong, self._drawn(ctx, attempt, batch, count), found)
        return found

    def _drawn(self, ctx: DefenseContext, attempt: int, batch: int, count: int) -> Tensor:
        # A stream for each attempt, so that a trial's draws do not depend on how many the others need.
        streams = ctx.random.at("weights", attempt)
        if self.sampler == "official":
            sizes = streams.randn(batch, count).abs()
        else:  # Dirichlet weights are gamma numbers over their sum, and Gamma(3) is the sum of three of Gamma(1)
            gamma = -(1 - streams.rand(batch, count + 2)).log()
            sizes = torch.cat([gamma[..., :3].sum(2, keepdim=True), gamma[..., 3:]], 2)
        return sizes / sizes.sum(2, keepdim=True)

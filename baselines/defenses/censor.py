"""CENSOR: random directions at right angles to the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from leakbench_baselines.defenses.clip_l2 import moved
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, Model, UserError, register


@register("censor", version=1)
class Censor(Defense):
    """CENSOR: sends, for each tensor of the gradient, a random direction orthogonal to it and as long.

    Of several random draws r, projected by r - (r.g / ||g||^2) g and rescaled to ||g||, those are sent together after
    whose step the client's loss is least. The released code divides by ||g|| once, so that what it sends is orthogonal
    only where ||g|| = 1. Losses are compared in float64: at right angles to the gradient they hardly differ.

    A tensor of one entry has no direction at right angles; nothing is sent of it.

    Acts on: the gradient of each local step.

    Args:
        tries: Random draws.
        lr: Length of the trial step, in units of the gradient.

    Reference: Zhang, Cheng, Shen, Feng, Tao, An, Xu, Zhang and others, "CENSOR: Defense Against Gradient Inversion via
    Orthogonal Subspace Bayesian Sampling", NDSS 2025, arXiv 2501.15718
    """

    acts_on = frozenset({"step"})
    draws = "directions"
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, tries: int = 20, lr: float = 1e-4) -> None:
        if tries < 1 or lr <= 0:
            raise UserError(f"censor: expected tries >= 1 and lr > 0, got {tries} and {lr}; write censor(tries=20)")
        self.tries = tries
        self.lr = lr

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Draw, project, try and choose."""
        if not grads:
            return grads
        fixed = {name: value.detach() for name, value in grads.items()}
        model = ctx.model.to(dtype=torch.float64)
        best: dict[str, Tensor] = {}
        least = ctx.inputs.new_full((len(ctx.inputs),), torch.inf, dtype=torch.float64)
        for attempt in range(self.tries):
            drawn = {n: ctx.random.at(n, attempt).randn(*v.shape[1:]).to(v) for n, v in fixed.items()}
            losses = self._losses(model, {n: orthogonal(drawn[n], v) for n, v in fixed.items()}, ctx)
            better = losses < least
            least = torch.where(better, losses, least)
            best = {n: torch.where(_like(better, v), v, best[n]) for n, v in drawn.items()} if best else drawn
        return {name: orthogonal(best[name], value) for name, value in grads.items()}

    def _losses(self, model: Model, moves: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return the loss (T,) of the batch after a step along ``moves``."""
        with torch.no_grad():
            moved = model.with_state({n: model.parameters[n] - self.lr * v.double() for n, v in moves.items()})
            logits = moved.logits(ctx.inputs.detach().double(), batch_norm=ctx.batch_norm).flatten(0, 1)
            labels = ctx.labels.detach().flatten(0, 1)
            labels = labels.double() if labels.is_floating_point() else labels
            return F.cross_entropy(logits, labels, reduction="none").view(len(ctx.inputs), -1).mean(1)

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,), at most 0: how well the norms of tensors agree, and how square they stand.

        What is sent keeps every tensor's norm, and tells one direction that the gradient has not: the score is minus
        the squared log ratio of the norms minus the squared cosine, averaged over tensors, times the entries sent.
        """
        score: Tensor | float = 0.0
        changed, candidate = moved(sent, ctx), moved({name: clean[name] for name in sent}, ctx)
        for name, value in changed.items():
            goal, found = value.flatten(1), candidate[name].flatten(1)
            least = torch.finfo(goal.dtype).tiny
            norms = goal.square().sum(1).clamp(min=least), found.square().sum(1).clamp(min=least)
            known = (goal != 0).any(1)
            ratio = (norms[1].log() - norms[0].log()) / 2
            square = (goal * found).sum(1).square() / (norms[0].sqrt() * norms[1].sqrt()).square()
            score = score - known * (ratio.square() + square)
        entries = sum(value[0].numel() for value in sent.values())
        return torch.as_tensor(score) * (entries / len(sent))


def orthogonal(directions: Tensor, gradient: Tensor) -> Tensor:
    """Return ``directions`` (T, *shape) projected at right angles to ``gradient`` and scaled to its length."""
    if gradient[0].numel() < 2:
        return gradient * 0
    # By the greatest entry first: the squares of a gradient of 1e-30 would vanish.
    top = gradient.detach().flatten(1).abs().amax(1)
    unit = gradient.flatten(1) / torch.where(top > 0, top, 1)[:, None]
    length = _norm(unit)
    unit = unit / length
    rest = directions.flatten(1)
    for _ in range(2):  # once leaves rounding errors along the gradient
        rest = rest - (rest * unit).sum(1, keepdim=True) * unit
    return (rest / _norm(rest) * length * top[:, None]).view(gradient.shape)


def _norm(values: Tensor) -> Tensor:
    """Return the norms (T, 1), 1 where they are 0."""
    square = values.square().sum(1, keepdim=True)
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt()


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (tensor.dim() - 1))

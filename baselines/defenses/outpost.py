"""Outpost: pruning and noise where Fisher information is high, less and less often."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from leakbench_baselines.defenses.clip_l2 import direction_fit, moved
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("outpost", version=1)
class Outpost(Defense):
    """Outpost: with a probability that falls from step to step, prunes a gradient and adds noise where it tells most.

    At local step i, counted from 0 in each round, it acts with probability 1 / (1 + beta i). A tensor's risk is
    min(Var(weights), 1). When it acts, (1) the ``prune_base`` percent of smallest entries of each tensor become 0, and
    (2) N(0, (risk * noise_base)^2) is added where the squared gradient, averaged over the tensor's first dimension as
    an estimate of Fisher information, is among the greatest ``phi`` percent of all tensors' averages. So noise falls on
    whole columns, and on a bias altogether or not at all.

    A re-implementation after the authors' code, but for its fault: there the result is bound to a name that nobody
    reads, and what is sent is the gradient as it was. It counts iterations from 1.

    Acts on: the gradient of each local step.

    Args:
        noise_base: Standard deviation of the noise where the risk is 1.
        prune_base: Percentage of each tensor's entries that is pruned.
        phi: Percentage of the averages that get noise.
        beta: How fast it acts less often.
        rounds: Whether rounds count as steps too: i is then their number plus that of the step.

    Reference: Wang, Hugh, Li, "More than Enough is Too Much: Adaptive Defenses against Gradient Leakage in Production
    Federated Learning", INFOCOM 2023, doi 10.1109/INFOCOM53939.2023.10228919
    """

    acts_on = frozenset({"step"})
    strength = ("prune_base", "higher")
    draws = "whether it acts, and the noise"
    likelihood = "surrogate"
    neutral = MappingProxyType({"noise_base": 0.0, "prune_base": 0.0})
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(
        self,
        *,
        noise_base: float = 0.8,
        prune_base: float = 80.0,
        phi: float = 40.0,
        beta: float = 0.125,
        rounds: bool = False,
    ) -> None:
        if min(noise_base, beta) < 0 or not 0 <= prune_base < 100 or not 0 <= phi <= 100:
            raise UserError(
                "outpost: expected noise_base, beta >= 0, 0 <= prune_base < 100 and 0 <= phi <= 100, got "
                f"{noise_base}, {beta}, {prune_base}, {phi}; write outpost(noise_base=0.8)"
            )
        self.noise_base = noise_base
        self.prune_base = prune_base
        self.phi = phi
        self.beta = beta
        self.rounds = rounds

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Toss the coin; prune and add noise."""
        if not grads:
            return grads
        index = ctx.local_step + (ctx.round if self.rounds else 0)
        acts = ctx.random.at("coin").rand() < 1 / (1 + self.beta * index)
        fisher = {name: value.detach().square().mean(1, keepdim=True) for name, value in grads.items()}
        threshold = _percentile(torch.cat([value.flatten(1) for value in fisher.values()], 1), 100 - self.phi)
        sent = {}
        for name, value in grads.items():
            loud = fisher[name] >= _like(threshold, value)
            std = self.noise_base * self._risk(ctx.model.parameters[name])
            noise = _like(std, value) * ctx.random.at("noise", name).randn(*value.shape[1:]).to(value)
            changed = self._pruned(value) + noise * loud
            sent[name] = torch.where(_like(acts, value), changed, value)
        return sent

    def _pruned(self, value: Tensor) -> Tensor:
        """Return (T, *shape) without the smallest entries of each trial."""
        size = value.detach().abs()
        return value * (size >= _like(_percentile(size.flatten(1), self.prune_base), value))

    @staticmethod
    def _risk(weights: Tensor) -> Tensor:
        """Return min(Var, 1) of weights (M, *shape), (M,)."""
        flat = weights.detach().flatten(1)
        return flat.var(1, correction=min(1, flat.shape[1] - 1)).clamp(max=1)

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): how well directions agree, every entry weighted by how much it still tells.

        A column with a zero in it got no noise: its other entries are exact. Zeros were pruned and say nothing. In
        columns without zeros the noise is as large as the weights say, of which the adversary has a copy. Where there
        are no zeros at all, the coin was against acting.
        """
        goal, found = moved(sent, ctx), moved({name: clean[name] for name in sent}, ctx)
        zeros = {name: value == 0 for name, value in goal.items()}
        quiet = {name: zero.any(1, keepdim=True).expand_as(zero) for name, zero in zeros.items()}
        acted = torch.stack([zero.flatten(1).any(1) for zero in zeros.values()]).any(0)
        unit = 1 if ctx.sends == "gradient" else ctx.lr
        exact = torch.stack([((v / unit).square() * quiet[n]).flatten(1).sum(1) for n, v in goal.items()]).sum(0)
        count = torch.stack([(quiet[n] & ~zeros[n]).flatten(1).sum(1) for n in goal]).sum(0)
        power = (exact / count.clamp(min=1)).clamp(min=torch.finfo(exact.dtype).tiny)
        weights = {}
        for name, value in goal.items():
            std = self.noise_base * self._risk(ctx.model.parameters[name])
            believed = _like((1 + std.square() / power).rsqrt(), value)
            told = torch.where(quiet[name], (~zeros[name]).to(value), believed.to(value))
            weights[name] = torch.where(_like(acted, value), told, torch.ones_like(told))
        fit: Tensor = direction_fit(
            {n: v * weights[n] for n, v in goal.items()}, {n: v * weights[n] for n, v in found.items()}
        )
        return fit


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (tensor.dim() - 1))


def _percentile(values: Tensor, percentage: float) -> Tensor:
    """Return the percentile (T,) of values (T, n), between two of them in proportion."""
    ordered = values.sort(1).values
    place = percentage / 100 * (values.shape[1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[1] - 1)
    return ordered[:, below] + (place - below) * (ordered[:, above] - ordered[:, below])

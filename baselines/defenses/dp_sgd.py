"""DP-SGD: clipped per-example gradients and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from leakbench_baselines.defenses.clip_l2 import nearness
from torch import Tensor

from leakbench import Defense, DefenseContext, Mechanism, UserError, register


@register("dp_sgd", version=1)
class DPSGD(Defense):
    """DP-SGD: scales every example's gradient down to a norm of at most C and adds N(0, (z C)^2) to their sum.

    With the loss's mean over B examples both are divided by B. What a client sends then moves by at most 2 C / B when
    one of its examples is replaced, noise aside. Every local step draws its own noise; a tensor's is drawn from a
    stream of its own and has the same direction at every strength. Needs a net without batch statistics.

    A re-implementation. The paper samples every batch at random and divides by its expected size; a client here trains
    on the batch it has, so no amplification by sampling follows: where an example is replaced, n noisy steps on it are
    mu-GDP with mu = 2 sqrt(n) / z. ``leakbench epsilon`` gives epsilon, also of the paper's sampling.

    Acts on: the gradient of every example, and of each local step.

    Args:
        clip: C, greatest norm of an example's gradient over all tensors.
        noise_multiplier: z, standard deviation of the noise in units of C.

    Reference: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep Learning with Differential Privacy", CCS
    2016, arXiv 1607.00133
    """

    acts_on = frozenset({"per_example", "step"})
    strength = ("noise_multiplier", "higher")
    neutral = MappingProxyType({"clip": 1e30, "noise_multiplier": 0.0})
    draws = "noise on the sum of the clipped gradients"
    likelihood = "density"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, clip: float = 1.0, noise_multiplier: float = 1.0) -> None:
        if clip <= 0:
            raise UserError(f"dp_sgd: clip: expected more than 0, got {clip}; write dp_sgd(clip=1.0)")
        if noise_multiplier < 0:
            raise UserError(
                f"dp_sgd: noise_multiplier: expected at least 0, got {noise_multiplier}; "
                "write dp_sgd(noise_multiplier=1.0)"
            )
        self.clip = clip
        self.noise_multiplier = noise_multiplier

    def per_example(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Clip each example's gradient."""
        if not grads:
            return grads
        # In float64, so that the squares of a diverged gradient do not overflow.
        norms = [torch.linalg.vector_norm(v.flatten(2), dim=2, dtype=torch.float64) for v in grads.values()]
        whole = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        # The divisor is clamped, not the quotient: an example without a gradient then has finite derivatives.
        scale = self.clip / whole.clamp(min=self.clip)
        return {n: v * scale.to(v).view(*v.shape[:2], *(1,) * (v.dim() - 2)) for n, v in grads.items()}

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Add the noise."""
        std = self._std(ctx.inputs.shape[1], ctx.reduction)
        if std == 0:
            return grads
        return {n: v + std * ctx.random.at(n).randn(*v.shape[1:]).to(v.dtype) for n, v in grads.items()}

    def mechanism(self, before: Mechanism, *, batch_size: int, reduction: Literal["mean", "sum"]) -> Mechanism | None:
        """Return the bounds that clipping gives, and the noise."""
        share = 1 / batch_size if reduction == "mean" else 1
        bounds = Mechanism(
            std=before.std,
            example=min(before.example, 2 * self.clip * share),
            update=min(before.update, 2 * self.clip * share * batch_size),
        )
        return bounds.noised(self._std(batch_size, reduction))

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return the log-density (T,) of ``sent`` given ``clean``, the update of clipped gradients without noise.

        Over the tensors of ``sent``. Of several local steps the noises are added up as if none moved the steps after
        it. Without noise it is a surrogate, `nearness`.
        """
        if self.noise_multiplier == 0:
            score: Tensor = nearness(sent, {name: clean[name] - value for name, value in sent.items()})
            return score
        unit = 1 if ctx.sends == "gradient" else ctx.lr * math.sqrt(ctx.local_step + 1)
        std = self._std(ctx.inputs.shape[1], ctx.reduction) * unit
        z = torch.cat([(value - clean[name]).flatten(1) for name, value in sent.items()], 1) / std
        return -z.square().sum(1) / 2 - z.shape[1] * (math.log(std) + math.log(2 * math.pi) / 2)

    @property
    def has_density(self) -> bool:
        """Only with noise."""
        return self.noise_multiplier > 0

    def inside(self) -> Defense:
        """Return the clipping without the noise, which a simulated client does too."""
        return type(self)(clip=self.clip, noise_multiplier=0.0)

    def _std(self, batch: int, reduction: Literal["mean", "sum"]) -> float:
        """Return the standard deviation of the noise on a step's gradient."""
        return self.noise_multiplier * self.clip / (batch if reduction == "mean" else 1)

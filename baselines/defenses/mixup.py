"""Mixup of pairs."""

from __future__ import annotations

import torch
from leakbench_baselines.defenses.label_smoothing import as_soft
from scipy.stats import beta
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("mixup", version=1)
class Mixup(Defense):
    """Mixup: trains on convex combinations of two examples and of their labels.

    The first and second example of the batch become one, so do the third and fourth, and so on: a batch of B trains on
    B / 2 mixed examples, and every private label is still behind the update. A last one without a partner stays as it
    is. The weight of a pair's first example is drawn from Beta(alpha, alpha).

    Acts on: the local batch.

    Args:
        alpha: Of the Beta distribution: 1 is uniform, less leaves most pairs almost unmixed.

    Differs from training with mixup, where a batch is mixed with a permutation of itself and keeps its size.

    Reference: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
    arXiv 1710.09412
    """

    acts_on = frozenset({"batch"})
    merges = 2
    draws = "the weight of every pair"
    likelihood = "simulated"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, alpha: float = 1.0) -> None:
        if alpha <= 0:
            raise UserError(f"mixup: alpha: expected more than 0, got {alpha}; write mixup(alpha=1.0)")
        self.alpha = alpha

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Mix the pairs."""
        pairs = inputs.shape[1] // 2
        uniform = ctx.random.rand(pairs).double()
        share = torch.from_numpy(beta.ppf(uniform.cpu().numpy(), self.alpha, self.alpha)).to(inputs)
        return _mix(inputs, share), _mix(as_soft(labels, inputs, ctx.model.num_classes), share)


def _mix(values: Tensor, share: Tensor) -> Tensor:
    """Mix pairs of ``values`` (T, B, ...) with weights ``share`` (T, B // 2) of their first."""
    paired = 2 * share.shape[1]
    weight = share.view(*share.shape, *(1,) * (values.dim() - 2))
    mixed = weight * values[:, 0:paired:2] + (1 - weight) * values[:, 1:paired:2]
    return torch.cat([mixed, values[:, paired:]], 1)

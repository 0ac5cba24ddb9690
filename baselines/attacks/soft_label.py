"""Soft labels of a single example from the last layer's weight gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Observation, Recovery, UserError, register

LEAST = 1e-6
"""Least factor searched for: below it float32 gradients say nothing about the ratios of rows."""
POINTS = 1200
VALLEYS = 12
SECTIONS = 48
GOLDEN = (5**0.5 - 1) / 2
STANDS_OUT = 1e-5


def soft_labels(gradient: Tensor, weight: Tensor, bias: Tensor, classes: int) -> Tensor:
    """Recover the label distribution of one example from a rank-one gradient (p - y) x^T.

    The row r with the greatest entries is t x with t = p_r - y_r, so that one number in [-1, 1] is missing: every t
    gives features x, hence p and y(t). The right one makes all but the ``classes`` greatest entries of y equal.

    Args:
        gradient: (T, C, d) gradient of the last layer's weight.
        weight: (M, C, d) the weight.
        bias: (M, C) the bias; zeros where there is none.
        classes: Classes that are mixed into the label, over a uniform rest.

    Returns:
        (T, C) float64 soft labels, each summing to 1.
    """
    # The bounds keep the squares of a diverged update finite.
    gradient, weight, bias = gradient.double().clamp(-1e100, 1e100), weight.double(), bias.double()[:, None]
    alike = max(1, gradient.shape[1] - classes)
    row = gradient.square().sum(2).argmax(1)
    row = gradient.gather(1, row[:, None, None].expand(-1, 1, gradient.shape[2]))  # (T, 1, d)
    size = row.square().sum(2)
    ratio = torch.where(size > 0, (gradient * row).sum(2) / size, 0.0)[:, None]
    scores = (weight * row).sum(2)[:, None]

    def label(t: Tensor) -> Tensor:  # (T, n) to (T, n, C)
        return (scores / t[..., None] + bias).softmax(2) - ratio * t[..., None]

    def uneven(log: Tensor, sign: Tensor) -> Tensor:
        # In units of t: where t is near 0, p is one-hot and the bare variance vanishes for any features.
        t = sign * log.exp()
        rest = label(t).sort(2).values[..., :alike]
        return (rest / t[..., None]).var(2, correction=0)

    half = torch.linspace(math.log(LEAST), 0, POINTS, dtype=torch.float64, device=gradient.device)
    grid, signs = half.repeat(2), torch.ones_like(half).neg()
    signs = torch.cat([signs, -signs])
    # In pieces: with a thousand classes the whole grid would take gigabytes.
    pieces = zip(torch.split(grid, POINTS // 8), torch.split(signs, POINTS // 8), strict=True)
    height = torch.cat([uneven(g.expand(len(gradient), -1), s) for g, s in pieces], 1)
    apart = F.pad(height.view(-1, 2, POINTS), (1, 1), value=torch.inf)
    valley = (apart[..., 1:-1] <= apart[..., 2:]) & (apart[..., 1:-1] <= apart[..., :-2])
    start = torch.where(valley.flatten(1), height, torch.inf).topk(VALLEYS, largest=False, sorted=True).indices
    sign, center, width = signs[start], grid[start], half[1] - half[0]
    low, high = center - width, (center + width).clamp(max=0)
    for _ in range(SECTIONS):
        inner = (high - low) * GOLDEN
        left = uneven(high - inner, sign) < uneven(low + inner, sign)
        low, high = torch.where(left, low, high - inner), torch.where(left, low + inner, high)
    log = (low + high) / 2
    best = uneven(log, sign).argmin(1, keepdim=True)
    return label((sign * log.exp()).gather(1, best))[:, 0]


@register("soft_label", version=1)
class SoftLabel(Attack):
    """Soft-label recovery: the label of a single example that was smoothed or mixed.

    From the weight gradient of one example its features are known up to a factor, and each factor gives a soft label.
    The factor is searched for which the small entries of that label are equal, as smoothing and mixup leave them. The
    counts are the ``classes`` greatest entries; one that does not stand out is taken as the first once more, since both
    halves of a mixture may have the same label.

    Sees: gradient of the last layer's weight, of one example (one mixture of two under mixup); weights, learning rate,
    local steps. With fewer than four classes every factor fits.

    Differs from the released code in how the factor is found: there by L-BFGS or a particle swarm, here on a grid over
    all factors that a probability allows, then by golden sections in the least valleys; the variance is taken in units
    of the factor, without which it vanishes at an infinite one; the row is the one of greatest norm, there of greatest
    sum; ratios of rows are least squares over all features
    instead of the greatest. With several local steps the mean of their gradients stands for one.

    Args:
        classes: 1: label smoothing (or a hard label); 2: mixup.

    Reference: Wang, Liang, He, "Towards Eliminating Hard Label Constraints in Gradient Inversion Attacks", ICLR 2024,
    arXiv 2402.03124
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"four_classes", "local_steps", "lr", "single_example", "weights"})
    reads = ("head.weight",)

    def __init__(self, *, classes: int = 1) -> None:
        if classes not in (1, 2):
            raise UserError(
                f"soft_label: classes: expected 1 or 2, got {classes}; write soft_label(classes=2) for mixup"
            )
        self.classes = classes

    def run(self, observation: Observation) -> Recovery:
        """Recover the soft labels and count their greatest entries (T, 1, C)."""
        model = observation.model
        weight = model.parameters[f"{model.head}.weight"]
        bias = model.parameters.get(f"{model.head}.bias", weight.new_zeros(weight.shape[:2]))
        # Of a single example the mean loss and the summed one are the same.
        soft = soft_labels(observation.head_weight / observation.local_steps, weight, bias, self.classes)
        value, label = soft.topk(self.classes, dim=1)
        label = torch.where(value - soft.median(1, keepdim=True).values > STANDS_OUT, label, label[:, :1])
        counts = torch.zeros_like(soft, dtype=torch.int64).scatter_add_(1, label, torch.ones_like(label))
        return Recovery(label_counts=counts[:, None])

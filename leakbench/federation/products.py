"""Inner products and norms of per-trial gradients, without the gradients themselves where that is cheaper.

For a linear layer with inputs A (B, I) and gradients D (B, O) at its outputs, the weight gradient is g = D^T A, so
<g, G> = sum(D * (A G^T)) and ||g||^2 = sum((D D^T) * (A A^T)); a convolution is the same on its unfolded inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leakbench.federation.gradients import Reduction, per_trial_gradients, trial_loss
from leakbench.models.functional import BatchNormMode, Model
from leakbench.models.taps import Tap, can_tap, layer_of, tap

Products = tuple[Tensor, Tensor]
"""<g, G> and ||g||^2 of every parameter tensor, (T, P) each."""


def per_trial_products(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    target: Mapping[str, Tensor],
    *,
    batch_norm: BatchNormMode = "eval",
    reduction: Reduction = "mean",
) -> Products:
    """Compare the gradients g of T batches with targets G; differentiable in inputs and labels, once.

    Args:
        model: The classifier, M = 1 or T.
        inputs: (T, B, *input_shape).
        labels: Classes (T, B), or probabilities (T, B, C).
        target: G, parameter name to (T, *shape).
        batch_norm: ``train`` normalises with each trial's own batch statistics.
        reduction: Of the loss over the batch.

    Returns:
        <g, G> and ||g||^2, (T, P) each, in the order of ``target``.
    """
    if can_tap(model, target) and not (batch_norm == "train" and model.has_batch_norm):
        taps, _ = tap(model, inputs, lambda z: trial_loss(z, labels, reduction), list(target), create_graph=True)
        pairs = [_products(taps[layer_of(name)], name.rpartition(".")[2], goal) for name, goal in target.items()]
    else:
        found = per_trial_gradients(
            model, inputs, labels, names=list(target), batch_norm=batch_norm, reduction=reduction, create_graph=True
        ).tensors
        pairs = [_dot_and_square(found[name], goal) for name, goal in target.items()]
    return torch.stack([dot for dot, _ in pairs], 1), torch.stack([square for _, square in pairs], 1)


def _products(passed: Tap, parameter: str, goal: Tensor) -> Products:
    x, d, layer = passed.inputs, passed.at_outputs, passed.layer
    if parameter == "weight" and isinstance(layer, nn.Linear) and _prefers_gram(goal, x.shape[1]):
        return (d * torch.bmm(x, goal.transpose(1, 2))).sum((1, 2)), _gram(x, d)
    if parameter == "weight" and isinstance(layer, nn.Conv2d) and layer.groups == 1:
        positions = x.shape[1] * d.shape[-1] * d.shape[-2]
        if _prefers_gram(goal, positions):
            dot = (d * _own_convolution(layer, x, goal)).flatten(1).sum(1)
            kernel, dilation, padding, stride = _geometry(layer)
            unfolded = F.unfold(x.flatten(0, 1), kernel, dilation, padding, stride)
            columns = unfolded.reshape(*x.shape[:2], *unfolded.shape[1:])
            return dot, _gram(*(v.transpose(2, 3).flatten(1, 2) for v in (columns, d.flatten(3))))
    return _dot_and_square(passed.gradient(parameter), goal)


def _prefers_gram(goal: Tensor, positions: int) -> bool:
    """Whether Gram matrices over ``positions`` cost less than the gradient that ``goal`` (T, O, *) is compared with."""
    outputs = goal.shape[1]
    inputs = goal[0, 0].numel()
    return positions * (inputs + outputs) < inputs * outputs


def _gram(a: Tensor, d: Tensor) -> Tensor:
    """Return ||D^T A||^2, (T,), for A (T, n, I) and D (T, n, O)."""
    return (torch.bmm(a, a.transpose(1, 2)) * torch.bmm(d, d.transpose(1, 2))).sum((1, 2))


def _geometry(layer: nn.Conv2d) -> Sequence[Any]:
    return layer.kernel_size, layer.dilation, layer.padding, layer.stride


def _own_convolution(layer: nn.Conv2d, x: Tensor, weights: Tensor) -> Tensor:
    """Convolve (T, B, C, *) with own weights (T, O, C, h, w) per trial: (T, B, O, *)."""
    each = [F.conv2d(a, w, None, layer.stride, layer.padding, layer.dilation) for a, w in zip(x, weights, strict=True)]
    return torch.stack(each)


def _dot_and_square(gradient: Tensor, goal: Tensor) -> Products:
    return cast(Products, _DotAndSquare.apply(gradient.flatten(1), goal.flatten(1)))


class _DotAndSquare(torch.autograd.Function):
    """Both sums of a pair; one pass over the tensors in the backward pass, where autograd takes four."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, goal: Tensor) -> Products:
        ctx.save_for_backward(gradient, goal)
        return torch.linalg.vecdot(gradient, goal), torch.linalg.vecdot(gradient, gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        gradient, goal = ctx.saved_tensors
        at_dot, at_square = (c[:, None] for c in cotangents)
        return torch.addcmul(at_dot * goal, 2 * at_square, gradient), None

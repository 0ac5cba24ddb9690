"""Inner products and norms of per-trial gradients, without the gradients themselves where that is cheaper.

For a linear layer with inputs A (B, I) and gradients D (B, O) at its outputs, the weight gradient is g = D^T A, so
<g, G> = sum(D * (A G^T)) and ||g||^2 = sum((D D^T) * (A A^T)); a convolution is the same on its unfolded inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from leakbench.federation.gradients import Reduction, per_trial_gradients, trial_loss
from leakbench.models.functional import BatchNormMode, Model
from leakbench.models.taps import Tap, can_tap, convolution_blocks, convolution_derivative, layer_of, tap

Products = tuple[Tensor, Tensor]
"""<g, G> and ||g||^2 of every parameter tensor, (T, P) each."""

_FEW_WEIGHTS = 2**16


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
        pairs = [products_of(taps[layer_of(name)], name.rpartition(".")[2], goal) for name, goal in target.items()]
    else:
        found = per_trial_gradients(
            model, inputs, labels, names=list(target), batch_norm=batch_norm, reduction=reduction, create_graph=True
        ).tensors
        pairs = [_OfGradient.apply(found[name], goal) for name, goal in target.items()]
    return torch.stack([dot for dot, _ in pairs], 1), torch.stack([square for _, square in pairs], 1)


def products_of(passed: Tap, parameter: str, goal: Tensor) -> Products:
    """Return <g, G> and ||g||^2, (T,) each, of one parameter of a layer, given what passed it and G (T, *shape)."""
    x, d, layer = passed.inputs, passed.at_outputs, passed.layer
    if parameter == "weight" and isinstance(layer, nn.Linear) and prefers_gram(goal, x.shape[1]):
        return cast(Products, _Gram.apply(x.transpose(1, 2), d.transpose(1, 2), goal))
    if parameter == "weight" and isinstance(layer, nn.Conv2d):
        gram = layer.groups == 1 and prefers_gram(goal, x.shape[1] * d[0, 0, 0].numel())
        if not gram and (layer.groups > 1 or has_grouped_kernels(x.device)):
            return cast(Products, _OfConvolution.apply(x, d, goal, layer))
        columns, rows = _columns(layer, x), _beside(d.flatten(3))
        if gram:
            return cast(Products, _Gram.apply(columns, rows, goal.flatten(2)))
        return cast(Products, _OfGradient.apply(torch.bmm(rows, columns.transpose(1, 2)), goal.flatten(2)))
    return cast(Products, _OfGradient.apply(passed.gradient(parameter), goal))


def prefers_gram(goal: Tensor, positions: int) -> bool:
    """Whether Gram matrices over ``positions`` cost less than the gradient that ``goal`` (T, O, *) is compared with.

    By shapes alone, so that equal blocks give equal rows; measured by ``tests/benchmarks/bench_layers.py``.
    """
    weights, outputs = goal[0].numel(), goal.shape[1]
    return weights >= _FEW_WEIGHTS and 4 * positions * (weights // outputs + outputs) < weights


def has_grouped_kernels(device: torch.device) -> bool:
    """Whether grouped convolutions of many trials are fast: oneDNN's are, cuDNN's in float32 are known not to be."""
    return device.type == "cpu"


def _columns(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Unfold inputs (T, B, C, *) into (T, I, n): what every one of n positions in the B outputs looks at."""
    unfolded = F.unfold(x.flatten(0, 1), layer.kernel_size, layer.dilation, cast(Any, layer.padding), layer.stride)
    return _beside(unfolded.reshape(*x.shape[:2], *unfolded.shape[1:]))


def _beside(values: Tensor) -> Tensor:
    """Put the B examples of (T, B, I, L) beside each other: (T, I, B * L)."""
    return values.transpose(1, 2).flatten(2)


class _Gram(torch.autograd.Function):
    """Both products of g = D A^T with G, for A (T, I, n), D (T, O, n) and G (T, O, I), without g.

    G, the largest of all, is read once: its products with A and with D make the derivatives, too.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, d: Tensor, goal: Tensor) -> Products:
        at_d, at_a = torch.empty_like(d), torch.empty_like(a)
        # On a CPU one trial at a time: the second product then finds G in the cache.
        step = 1 if goal.device.type == "cpu" else len(goal)
        for first in range(0, len(goal), step):
            part = slice(first, first + step)
            torch.bmm(goal[part], a[part], out=at_d[part])
            torch.bmm(goal[part].transpose(1, 2), d[part], out=at_a[part])
        among_a, among_d = torch.bmm(a.transpose(1, 2), a), torch.bmm(d.transpose(1, 2), d)
        ctx.save_for_backward(a, d, at_a, at_d, among_a, among_d)
        return (d * at_d).sum((1, 2)), (among_a * among_d).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        a, d, at_a, at_d, among_a, among_d = ctx.saved_tensors
        at_dot, at_square = (c[:, None, None] for c in cotangents)
        return (
            torch.addcmul(at_dot * at_a, 2 * at_square, torch.bmm(a, among_d)),
            torch.addcmul(at_dot * at_d, 2 * at_square, torch.bmm(d, among_a)),
            None,
        )


class _OfConvolution(torch.autograd.Function):
    """Both products of a convolution's weight gradient with G, block by block of trials."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, goal: Tensor, layer: nn.Conv2d) -> Products:
        blocks = list(convolution_blocks(layer, x, d))
        gradients = [convolution_derivative(layer, *block).view(-1, *goal.shape[1:]) for _, *block in blocks]
        products = [_both(g, goal[part]) for g, (part, *_) in zip(gradients, blocks, strict=True)]
        ctx.save_for_backward(goal)
        ctx.blocks, ctx.gradients, ctx.layer, ctx.shapes = blocks, gradients, layer, (x.shape, d.shape)
        return torch.cat([dot for dot, _ in products]), torch.cat([square for _, square in products])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (goal,) = ctx.saved_tensors
        layer: nn.Conv2d = ctx.layer
        at_x, at_d = (goal.new_empty(shape) for shape in ctx.shapes)
        for (part, x, d), gradient in zip(ctx.blocks, ctx.gradients, strict=True):
            weight = _combined(gradient, goal[part], *(c[part] for c in cotangents)).flatten(0, 1)
            groups = len(gradient) * layer.groups
            found = F.conv2d(x, weight, None, layer.stride, cast(Any, layer.padding), layer.dilation, groups)
            at_d[part].transpose(0, 1).copy_(found.reshape(len(found), -1, *at_d.shape[2:]))
            found = convolution_derivative(layer, x, d, weight)
            at_x[part].transpose(0, 1).copy_(found.reshape(len(found), -1, *at_x.shape[2:]))
        return at_x, at_d, None, None


class _OfGradient(torch.autograd.Function):
    """Both products of g with G, (T, *) each; one pass in the backward pass, where autograd takes four."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, goal: Tensor) -> Products:
        ctx.save_for_backward(gradient, goal)
        return _both(gradient, goal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _combined(*ctx.saved_tensors, *cotangents), None


def _both(gradient: Tensor, goal: Tensor) -> Products:
    gradient, goal = gradient.flatten(1), goal.flatten(1)
    return torch.linalg.vecdot(gradient, goal), torch.linalg.vecdot(gradient, gradient)


def _combined(gradient: Tensor, goal: Tensor, at_dot: Tensor, at_square: Tensor) -> Tensor:
    """Return what the cotangents (T,) of both products make of g's."""
    ones = (1,) * (gradient.dim() - 1)
    return torch.addcmul(at_dot.view(-1, *ones) * goal, 2 * at_square.view(-1, *ones), gradient)

"""Layers with frozen weights whose second derivatives are cheap: the same numbers by fewer operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leakbench.models.batch_norm import ExplicitBatchNorm

_FEW_CHANNELS = 16


@contextmanager
def frozen_layers(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm (in eval mode) and Conv2d layers inside ``module`` treat their weights as constants.

    The caller sees to it that no other thread runs the module meanwhile.
    """
    changed: list[nn.Module] = []
    try:
        for layer in module.modules():
            if isinstance(layer, ExplicitBatchNorm) and layer.running_mean is not None:
                layer.forward = _Affine(layer)  # type: ignore[method-assign]
                changed.append(layer)
            elif isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                layer.forward = _Convolution(layer)  # type: ignore[method-assign,assignment]
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


class _Affine:
    """BatchNorm with running statistics as a multiplication and an addition; autograd's own takes a dozen passes."""

    def __init__(self, layer: ExplicitBatchNorm) -> None:
        self.layer = layer

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        factor = (cast(Tensor, layer.running_var) + layer.eps).rsqrt()
        if layer.weight is not None:
            factor = factor * layer.weight
        shift = -cast(Tensor, layer.running_mean) * factor
        if layer.bias is not None:
            shift = shift + layer.bias
        shape = (-1,) + (1,) * (inputs.dim() - 2)
        return cast(Tensor, layer.after(torch.addcmul(shift.view(shape), inputs, factor.view(shape))))


class _Convolution:
    """A convolution; autograd's own computes a weight gradient in its second derivative, wanted or not."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        padding = cast(tuple[int, ...], layer.padding)
        if not _has_slow_kernel(layer, inputs):
            geometry = layer.stride, padding, layer.dilation, layer.groups
            return cast(Tensor, _Forward.apply(inputs, weight, bias, *geometry))
        return _over_blocks(inputs, weight, bias, layer.stride[0], padding[0])


class _Forward(torch.autograd.Function):
    """The convolution: its derivative is `_Backward`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = inputs.shape, geometry
        return F.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *at_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _Backward.apply(*at_outputs, weight, ctx.shape, *ctx.geometry), *(None,) * 6


class _Backward(torch.autograd.Function):
    """The derivative of a convolution with respect to its inputs: its own derivative is `_Forward`."""

    @staticmethod
    def forward(ctx: Any, at_outputs: Tensor, weight: Tensor, shape: torch.Size, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        like = at_outputs.new_empty(()).expand(shape)  # only its shape is read
        found: Tensor = torch.ops.aten.convolution_backward(
            at_outputs, like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )[0]
        return found

    @staticmethod
    def backward(ctx: Any, *at_inputs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _Forward.apply(*at_inputs, weight, None, *ctx.geometry), *(None,) * 6


def _has_slow_kernel(layer: nn.Conv2d, inputs: Tensor) -> bool:
    """Whether oneDNN's derivative with respect to the inputs reaches a tenth of its other kernels' speed."""
    stride, kernel = layer.stride[0], layer.kernel_size[0]
    return (
        inputs.device.type == "cpu"
        and layer.in_channels < _FEW_CHANNELS
        and layer.groups == 1
        and 1 < stride <= kernel
        and inputs.shape[-1] % stride == 0
        and inputs.shape[-1] == inputs.shape[-2]
        and layer.dilation == (1, 1)
        and layer.stride == (stride, stride)
        and layer.kernel_size == (kernel, kernel)
        and layer.padding[0] == layer.padding[1]
    )


def _over_blocks(inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Compute a strided convolution as one of stride 1 over blocks of pixels, stacked as channels."""
    size, kernel = inputs.shape[-1], weight.shape[-1]
    # Taps reach from -padding to kernel - 1 - padding around a block's first pixel: over so many blocks.
    before, after = -(-padding // stride), (kernel - 1 - padding) // stride
    reach = max(before, after)
    left, right = before * stride - padding, (after + 1) * stride - (kernel - padding)
    blocked = F.pixel_unshuffle(F.pad(weight, (left, right, left, right)), stride)
    geometry = (1, 1), (reach, reach), (1, 1), 1
    found: Tensor = _Forward.apply(F.pixel_unshuffle(inputs, stride), blocked, bias, *geometry)
    first, outputs = reach - before, (size + 2 * padding - kernel) // stride + 1
    return found[..., first : first + outputs, first : first + outputs]

"""Per-trial weight gradients from one flat backward pass: gradients at layer outputs times layer inputs.

Goodfellow's idea for single examples (2015, arXiv:1510.01799), here with a trial of B examples as the unit and with
grouped convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.models.batch_norm import ExplicitBatchNorm
from leakbench.models.double import frozen_layers
from leakbench.models.functional import Model
from leakbench.models.small import Classifier

_CACHED_NUMBERS = 2**17


def can_tap(model: Model, names: Collection[str]) -> bool:
    """Return whether `tapped_gradients` can compute the gradients of ``names``.

    It needs shared weights, and a net of our own: those call every layer once, never work in place and keep the
    batch in front, which nothing promises for foreign nets.
    """
    if model.draws != 1 or not isinstance(model.module, Classifier):
        return False
    return all(_supported(model.module.get_submodule(layer_of(name))) for name in names)


@dataclass(frozen=True)
class Tap:
    """What passed one layer, for T trials.

    Args:
        layer: The layer.
        inputs: (T, B, *) what it got.
        at_outputs: (T, B, *) gradient of the loss with respect to what it returned.
        moments: Running mean and variance of a BatchNorm layer.
    """

    layer: nn.Module
    inputs: Tensor
    at_outputs: Tensor
    moments: tuple[Tensor, ...] = ()

    def gradient(self, parameter: str, out: Tensor | None = None) -> Tensor:
        """Return the gradient (T, *shape) of ``weight`` or ``bias``."""
        x, d = self.inputs, self.at_outputs
        if parameter == "bias":
            return d.flatten(3).sum(3).sum(1) if d.dim() > 3 else d.sum(1)
        if isinstance(self.layer, nn.Linear):
            return torch.bmm(d.transpose(1, 2), x, out=out)
        if isinstance(self.layer, nn.Conv2d):
            return _convolution(self.layer, x, d)
        return _batch_norm(self.layer, x, d, *self.moments)


def tap(
    model: Model, inputs: Tensor, loss: Callable[[Tensor], Tensor], names: Collection[str], *, create_graph: bool
) -> tuple[dict[str, Tap], Tensor]:
    """Return what passed the layers of ``names``, by layer name, and losses (T,), with BatchNorm in eval mode.

    Args:
        model: One for which `can_tap` is true.
        inputs: (T, B, *input_shape).
        loss: Logits (T, B, C) to losses (T,).
        names: Wanted parameters, at least one.
        create_graph: Whether the result can be differentiated with respect to inputs and labels.
    """
    trials = inputs.shape[0]
    # The weights are frozen: the backward pass stops at the first tap and computes no summed weight gradients.
    state = {k: v[0].detach() for k, v in (model.parameters | model.buffers).items()}
    passed: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            passed[layer] = (args[0], output if output.requires_grad else output.requires_grad_())

        return hook

    layers = {layer: model.module.get_submodule(layer) for layer in dict.fromkeys(layer_of(name) for name in names)}
    with torch.enable_grad():
        with model.lock, ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(layer.register_forward_hook(hook_of(name)))
            if create_graph:
                stack.enter_context(frozen_layers(model.module))
            logits, _, _ = model.call(state, inputs.flatten(0, 1), train=False)
        losses = loss(logits.reshape(trials, -1, logits.shape[-1]))
        wanted_at = [output for _, output in passed.values()]
        at = dict(zip(passed, torch.autograd.grad(losses.sum(), wanted_at, create_graph=create_graph), strict=True))
    taps = {}
    for name, layer in layers.items():
        x, d = (v.reshape(trials, -1, *v.shape[1:]) for v in (passed[name][0], at[name]))
        running = (f"{name}.running_mean", f"{name}.running_var")
        moments = tuple(state[k] for k in running) if isinstance(layer, ExplicitBatchNorm) else ()
        taps[name] = Tap(layer, x, d, moments)
    return taps, losses if create_graph else losses.detach()


def tapped_gradients(
    model: Model,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    names: Collection[str],
    *,
    create_graph: bool = False,
    out: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return per-trial gradients, parameter name to (T, *shape), and losses (T,); see `tap`.

    Args:
        model: One for which `can_tap` is true.
        inputs: (T, B, *input_shape).
        loss: Logits (T, B, C) to losses (T,).
        names: Wanted parameters, at least one.
        create_graph: Whether the result can be differentiated with respect to inputs and labels.
        out: Contiguous tensors by parameter name that may be written to and returned, which spares copies; not with
            ``create_graph``.
    """
    taps, losses = tap(model, inputs, loss, names, create_graph=create_graph)
    with torch.set_grad_enabled(create_graph):
        gradients = {
            name: taps[layer_of(name)].gradient(name.rpartition(".")[2], (out or {}).get(name)) for name in names
        }
    return gradients, losses


def layer_outputs(model: Model) -> int:
    """Return how many numbers the layers return for one input, from a run that computes nothing."""
    sizes: list[int] = []
    state = {name: value[0].to("meta") for name, value in (model.parameters | model.buffers).items()}
    leaves = [layer for layer in model.module.modules() if next(layer.children(), None) is None]
    with model.lock, torch.no_grad(), ExitStack() as hooks:
        for layer in leaves:
            hooks.enter_context(layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel())))
        model.call(state, torch.empty(1, *model.input_shape, device="meta", dtype=model.dtype), train=False)
    return sum(sizes)


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to."""
    return name.rpartition(".")[0]


def _supported(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, ExplicitBatchNorm):
        return layer.running_mean is not None and len(layer.after) == 0
    return isinstance(layer, nn.Linear)


def convolution_blocks(layer: nn.Conv2d, x: Tensor, d: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cut inputs (T, B, C, *) and output gradients (T, B, O, *) of a convolution for grouped kernels.

    Yields:
        Trials t of a block, and both tensors of these as (B, t * C, *) and (B, t * O, *): trials side by side in the
        channels.
    """
    # Blocks of trials that fit a core's cache: the change of layout then costs half, and large weights are still
    # there when they are read the next time.
    block = max(1, _CACHED_NUMBERS // max(x[0].numel(), d[0].numel(), layer.weight.numel()))
    # Below 16 output channels oneDNN's kernels for channels_last are 2 to 4 times as fast, conversion included; above,
    # the others win.
    layout = torch.channels_last if layer.out_channels < 16 else torch.contiguous_format
    for first in range(0, len(x), block):
        part = slice(first, first + block)
        inputs, at_outputs = (v[part].transpose(0, 1).flatten(1, 2).contiguous(memory_format=layout) for v in (x, d))
        yield part, inputs, at_outputs


def convolution_derivative(layer: nn.Conv2d, x: Tensor, d: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the derivative of one block's convolution with respect to its inputs (given the weights) or its weights.

    Args:
        layer: The convolution.
        x: (B, t * C, *) inputs.
        d: (B, t * O, *) output gradients.
        weight: (t * O, C / groups, h, w), where the derivative with respect to the inputs is wanted.
    """
    trials = d.shape[1] // layer.out_channels
    wanted = [weight is not None, weight is None, False]
    if weight is None:  # only its shape is read
        weight = x.new_empty(()).expand(d.shape[1], *layer.weight.shape[1:])
    arguments: list[Any] = [list(v) for v in (layer.stride, layer.padding, layer.dilation)]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        d, x, weight, None, *arguments, False, [0, 0], trials * layer.groups, wanted
    )
    return found[0] if wanted[0] else found[1]


def _convolution(layer: nn.Conv2d, x: Tensor, d: Tensor) -> Tensor:
    """Weight gradients (T, O, C / groups, h, w) of inputs (T, B, C, *) and output gradients (T, B, O, *)."""
    parts = [convolution_derivative(layer, *block) for _, *block in convolution_blocks(layer, x, d)]
    return torch.cat(parts).reshape(len(x), *layer.weight.shape)


def _batch_norm(layer: nn.Module, x: Tensor, d: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    assert isinstance(layer, ExplicitBatchNorm)  # noqa: S101 - see _supported
    trailing = (-1,) + (1,) * (x.dim() - 3)
    normalised = (x - mean.reshape(trailing)) * (variance + layer.eps).rsqrt().reshape(trailing)
    return (d * normalised).sum([i for i in range(d.dim()) if i not in (0, 2)])

"""R-GAP: one input in closed form, layer by layer from the last to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, NotApplicable, Observation, Recovery, register

EDGE = 1e-12
"""How close outputs of sigmoid and tanh may come to their limits."""
DEAD = 1e-6
"""Share of the largest output below which a ReLU passed nothing; rounding errors of the update stay below."""
RIDGE = 1e-12
"""Gives equations that leave something open their smallest solution."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of a chain.

    Args:
        name: Of the module.
        module: It, without values.
        shape: Of its input.
        activation: What follows it.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    shape: torch.Size
    activation: nn.Module | None = None

    def forward(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Apply the layer without its activation to (n, *)."""
        own = {part: state[f"{self.name}.{part}"] for part, _ in self.module.named_parameters()}
        output: Tensor = functional_call(self.module, own, (x.reshape(-1, *self.shape),))
        return output

    def invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and slope of the activation where it gives ``y``; at a slope of 0 the input is unknown."""
        match self.activation:
            case nn.Sigmoid():
                y = y.clamp(EDGE, 1 - EDGE)
                return torch.logit(y), y * (1 - y)
            case nn.Tanh():
                y = y.clamp(EDGE - 1, 1 - EDGE)
                return torch.atanh(y), 1 - y.square()
            case nn.LeakyReLU(negative_slope=slope):
                slopes = torch.where(y < 0, slope, 1.0).to(y)
                return y / slopes, slopes
            case nn.ReLU():
                return y, (y > DEAD * y.abs().amax()).to(y)
        return y, torch.ones_like(y)


@register("r_gap", version=1)
class RGap(Attack):
    """R-GAP: from the last layer to the first, each layer's input out of linear equations.

    Known of a layer are the gradient k at its output, its output z and its weight's gradient. Its input x solves
    W x + b = z (weight constraints) and "k times x is the weight's gradient" (gradient constraints) in the sense of
    least squares; inverting the activation before it gives the next z, and W^T k times its slope the next k. Exact
    where the equations determine x: the paper's rank analysis.

    Sees: gradients of all layers, weights; one example. Nothing depends on the scale of the update, so the learning
    rate may be unknown; after several local steps the equations hold only roughly. Declines nets that are no chain of
    Linear and Conv2d with sigmoid, tanh, (leaky) ReLU.

    Departures. The paper starts from a binary loss, whose k it finds as a root; here k at the logits is the gradient of
    the last bias, for any loss and without the label, and a net without that bias is declined. Where a dense layer has
    a bias, that one's gradient is its k too; it gets gradient constraints only, as in the authors' code. Weight
    constraints are weighted by the activation's slope, since an error of x is one of z over it; this also drops those
    that a ReLU hides. Equations are solved in float64 by Cholesky's method.

    Reference: Zhu, Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021, arXiv 2010.07733
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    needs = frozenset({"weights", "single_example", "head_bias"})

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline nets that are no chain."""
        layers = _chain(knowledge)
        x = knowledge.randn(1, *knowledge.input_spec.shape).to(knowledge.model.dtype)
        expected = knowledge.forward(x)[0][0]
        state, x = {name: value[0] for name, value in knowledge.model.parameters.items()}, x[0]
        for layer in layers:
            x = layer.forward(x, state)
            x = x if layer.activation is None else layer.activation(x)
        if not torch.allclose(x, expected, rtol=1e-3, atol=1e-4):
            raise NotApplicable("the net does more than its layers one after the other")
        return {}

    def run(self, observation: Observation) -> Recovery:
        """Recover inputs (T, 1, *input_shape), trial by trial: the equations of one may take 100 MB."""
        layers, start = _chain(observation), observation.model.parameters
        low, high = observation.bounds
        difference = observation.difference(observation.update)
        inputs = []
        for t in range(observation.trials):
            state = {name: value[t % len(value)].double() for name, value in start.items()}
            sent = {name: value[t].double() for name, value in difference.items()}
            x = _descend(layers, state, _scaled(sent, f"{layers[-1].name}.bias"))
            inputs.append(x.view(1, *observation.input_spec.shape))
            observation.progress(t + 1, observation.trials)
        return Recovery(inputs=torch.stack(inputs).clamp(low.double(), high.double()), model_evaluations=0)


def _chain(knowledge: Knowledge) -> list[Layer]:
    """Return the linear layers with what follows each.

    Raises:
        NotApplicable: There are other layers, or the last does not give the logits.
    """
    layers: list[Layer] = []
    x = torch.empty(1, *knowledge.input_spec.shape, device="meta")
    for name, module in knowledge.model.module.named_modules():
        match module:
            case nn.Linear():
                x = x.flatten(1)
            case nn.Conv2d(groups=1, padding_mode="zeros", padding=tuple()):
                pass
            case nn.Sigmoid() | nn.Tanh() | nn.LeakyReLU() | nn.ReLU() if layers and layers[-1].activation is None:
                layers[-1] = replace(layers[-1], activation=module)
                continue
            case _ if isinstance(module, nn.Flatten | nn.Dropout | nn.Identity) or any(module.children()):
                continue
            case _:
                raise NotApplicable(f"{type(module).__name__} ({name}) is none of the layers that can be undone")
        layers.append(Layer(name, module, x.shape[1:]))
        try:
            x = module(x)
        except RuntimeError as error:
            raise NotApplicable(f"{name} does not follow on the layer before") from error
    if not isinstance(layers[-1].module, nn.Linear) or layers[-1].activation is not None:
        raise NotApplicable("the last layer is not a dense one that gives the logits")
    return layers


def _scaled(sent: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return ``sent`` in units of the largest value of its tensor ``name``; an update of zeros stays one."""
    size = sent[name].abs().amax()
    return {key: (value / size).nan_to_num(0, 0, 0).clamp(-1e30, 1e30) for key, value in sent.items()}


def _descend(layers: Sequence[Layer], state: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Tensor:
    """Return the flat input of the first layer, from weights and gradients of one trial."""
    y = back = torch.zeros(0)
    for layer in reversed(layers):
        z, slope = layer.invert(y)
        k, gradient = back * slope, sent[f"{layer.name}.weight"]
        if isinstance(layer.module, nn.Linear):
            k = sent.get(f"{layer.name}.bias", k)
            matrix, y = state[f"{layer.name}.weight"], k @ gradient / k.square().sum()
        else:
            offset = layer.forward(torch.zeros(1, *layer.shape).to(gradient), state)
            unit = torch.eye(layer.shape.numel()).to(gradient)
            matrix = (layer.forward(unit, state) - offset).flatten(1).mT
            y = _solve(
                matrix * slope[:, None],
                (z - offset.flatten()) * slope,
                _convolved(k, layer.module, layer.shape[1:]),
                gradient,
            )
        y = y.nan_to_num(0, 0, 0)
        back = matrix.mT @ k
    return y


def _convolved(k: Tensor, module: nn.Conv2d, size: Sequence[int]) -> Tensor:
    """Return the matrix (filters * kernel, pixels) that turns a channel into the weight's gradient, given k."""
    unit = torch.eye(size[0] * size[1]).to(k).view(-1, 1, *size)
    padding = cast("tuple[int, ...]", module.padding)
    patches = F.unfold(unit, module.kernel_size, module.dilation, padding, module.stride)
    return torch.einsum("fp,nup->fun", k.view(-1, patches.shape[2]), patches).flatten(0, 1)


def _solve(weight: Tensor, z: Tensor, per_channel: Tensor, gradient: Tensor) -> Tensor:
    """Return the least squares solution x (channels * pixels) of weight and gradient constraints.

    Args:
        weight: (outputs, channels * pixels), weight @ x = z.
        z: (outputs,).
        per_channel: (filters * kernel, pixels), the same for each channel.
        gradient: (filters, channels, *kernel).
    """
    channels = gradient.shape[1]
    wanted = gradient.flatten(2).transpose(1, 2).reshape(-1, channels)
    sizes = [matrix.square().sum(1).mean().sqrt().clamp(min=1e-150) for matrix in (weight, per_channel)]
    weight, z, per_channel, wanted = weight / sizes[0], z / sizes[0], per_channel / sizes[1], wanted / sizes[1]
    normal = weight.mT @ weight
    own = normal.view(channels, per_channel.shape[1], channels, per_channel.shape[1]).diagonal(dim1=0, dim2=2)
    own += (per_channel.mT @ per_channel)[..., None]
    normal.diagonal().add_(RIDGE * normal.diagonal().mean().clamp(min=1e-150))
    factor = torch.linalg.cholesky_ex(normal).L
    right = weight.mT @ z + (per_channel.mT @ wanted).mT.flatten()
    return torch.cholesky_solve(right[:, None], factor)[:, 0]

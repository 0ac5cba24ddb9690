"""Small classifiers that the leakage literature attacks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from leakbench.errors import unknown


class Classifier(nn.Module):
    """A body that ends in flat features, and a linear head called ``fc``.

    Args:
        body: Maps (B, *input_shape) to (B, d).
        input_shape: Shape of one input.
        num_classes: Classes (C).
    """

    def __init__(self, body: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(_width(body, input_shape), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, C) for inputs (B, *input_shape)."""
        return self.fc(self.body(inputs))  # type: ignore[no-any-return]


def _width(body: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Run ``body`` once to learn d: formulas for it differ per net and would repeat the body's definition."""
    with torch.no_grad():
        return int(body.eval()(torch.zeros(1, *input_shape)).shape[1])


def _named(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 300,
    depth: int = 2,
    activation: str = "relu",
    batch_norm: bool = False,
) -> nn.Module:
    """Return a fully connected net with ``depth`` hidden layers of ``width`` (FCN-3 of iLRG, Ma et al. 2023).

    With ``batch_norm``, every hidden layer's outputs are normalised before the activation.

    Raises:
        UserError: There is no such activation.
    """
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    size = math.prod(input_shape)
    for i in range(depth):
        layers.append((f"linear{i}", nn.Linear(size, width)))
        if batch_norm:
            layers.append((f"bn{i}", nn.BatchNorm1d(width)))
        layers.append((f"{activation}{i}", _activation(activation)))
        size = width
    return Classifier(_named(layers), input_shape, num_classes)


def lenet_zhu(input_shape: tuple[int, ...], num_classes: int, *, activation: str = "sigmoid") -> nn.Module:
    """Return the net of DLG (Zhu et al. 2019, arXiv:1906.08935), the "CNN" of LLG (Wainakh et al. 2022).

    Raises:
        UserError: There is no such activation.
    """
    layers: list[tuple[str, nn.Module]] = []
    channels = input_shape[0]
    for i, stride in enumerate((2, 2, 1)):
        layers += [
            (f"conv{i}", nn.Conv2d(channels, 12, 5, stride=stride, padding=2)),
            (f"{activation}{i}", _activation(activation)),
        ]
        channels = 12
    return Classifier(_named([*layers, ("flatten", nn.Flatten())]), input_shape, num_classes)


def lenet5(
    input_shape: tuple[int, ...], num_classes: int, *, activation: str = "relu", batch_norm: bool = False
) -> nn.Module:
    """Return LeNet-5 (LeCun et al. 1998), 28x28 inputs padded to 32x32, with today's ReLU and max pooling.

    Raises:
        UserError: There is no such activation.
    """
    layers: list[tuple[str, nn.Module]] = []
    channels, padding = input_shape[0], 2 if input_shape[-1] <= 28 else 0
    for i, width in enumerate((6, 16)):
        layers.append((f"conv{i}", nn.Conv2d(channels, width, 5, padding=0 if i else padding)))
        if batch_norm:
            layers.append((f"bn{i}", nn.BatchNorm2d(width)))
        layers += [(f"{activation}{i}", _activation(activation)), (f"pool{i}", nn.MaxPool2d(2))]
        channels = width
    convolutions = _named([*layers, ("flatten", nn.Flatten())])
    dense: list[nn.Module] = []
    size = _width(convolutions, input_shape)
    for width in (120, 84):
        dense += [nn.Linear(size, width), _activation(activation)]
        size = width
    return Classifier(nn.Sequential(convolutions, *dense), input_shape, num_classes)


def convnet(input_shape: tuple[int, ...], num_classes: int, *, width: int = 64) -> nn.Module:
    """Return the ConvNet of Inverting Gradients (Geiping et al. 2020, arXiv:2003.14053), ConvNet64 by default."""
    layers: list[tuple[str, nn.Module]] = []
    channels = input_shape[0]
    for i, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
        layers += [
            (f"conv{i}", nn.Conv2d(channels, factor * width, 3, padding=1)),
            (f"bn{i}", nn.BatchNorm2d(factor * width)),
            (f"relu{i}", nn.ReLU()),
        ]
        channels = factor * width
        if i in (5, 7):
            layers.append((f"pool{i // 7}", nn.MaxPool2d(3)))
    return Classifier(_named([*layers, ("flatten", nn.Flatten())]), input_shape, num_classes)


_VGG_BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(input_shape: tuple[int, ...], num_classes: int, *, depth: int = 16) -> nn.Module:
    """Return VGG (Simonyan & Zisserman 2014, arXiv:1409.1556) for small images, with BatchNorm and 4,096-wide layers.

    Raises:
        ValueError: ``depth`` is none of 11, 13, 16, 19.
    """
    if depth not in _VGG_BLOCKS:
        raise ValueError(f"depth: expected one of {', '.join(map(str, _VGG_BLOCKS))}, got {depth}")
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for repeats, width in zip(_VGG_BLOCKS[depth], (64, 128, 256, 512, 512), strict=True):
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    convolutions = nn.Sequential(*layers, nn.Flatten())
    size = _width(convolutions, input_shape)
    dense = [nn.Linear(size, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return Classifier(nn.Sequential(convolutions, *dense), input_shape, num_classes)


def vgg9(input_shape: tuple[int, ...], num_classes: int, *, width: int = 32) -> nn.Module:
    """Return the VGG-9 of FedMA (Wang et al. 2020, arXiv:2002.06440): six convolutions, two dense layers, no norm.

    Their widths are 32, 64, 128, 128, 256, 256 and 512, 512, here in multiples of ``width``.
    """
    layers: list[tuple[str, nn.Module]] = []
    channels = input_shape[0]
    for i, factor in enumerate((1, 2, 4, 4, 8, 8)):
        layers += [(f"conv{i}", nn.Conv2d(channels, factor * width, 3, padding=1)), (f"relu{i}", nn.ReLU())]
        channels = factor * width
        if i % 2:
            layers.append((f"pool{i // 2}", nn.MaxPool2d(2)))
    return _with_dense(layers, (16 * width, 16 * width), input_shape, num_classes)


def alexnet_small(input_shape: tuple[int, ...], num_classes: int, *, width: int = 32) -> nn.Module:
    """Return AlexNet's five convolutions and two dense layers (Krizhevsky et al. 2012) for small images.

    Kernels of 5 and 3, pooling after the first, second and fifth layer; channels 1, 3, 6, 4, 4 times ``width``, as in
    torchvision's AlexNet, where that is 64; dense layers of 8 times ``width``.
    """
    layers: list[tuple[str, nn.Module]] = []
    channels = input_shape[0]
    for i, factor in enumerate((1, 3, 6, 4, 4)):
        kernel = 5 if i < 2 else 3
        layers += [
            (f"conv{i}", nn.Conv2d(channels, factor * width, kernel, padding=kernel // 2)),
            (f"relu{i}", nn.ReLU()),
        ]
        channels = factor * width
        if i in (0, 1, 4):
            layers.append((f"pool{i}", nn.MaxPool2d(2)))
    return _with_dense(layers, (8 * width, 8 * width), input_shape, num_classes)


def _with_dense(
    layers: list[tuple[str, nn.Module]], widths: Iterable[int], input_shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    """Return a classifier of convolutions, then dense layers of ``widths`` with ReLU."""
    layers = [*layers, ("flatten", nn.Flatten())]
    size = _width(_named(layers), input_shape)
    for i, width in enumerate(widths):
        layers += [(f"dense{i}", nn.Linear(size, width)), (f"dense_relu{i}", nn.ReLU())]
        size = width
    return Classifier(_named(layers), input_shape, num_classes)

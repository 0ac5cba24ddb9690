"""Small classifiers that the leakage literature attacks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


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


def mlp(input_shape: tuple[int, ...], num_classes: int, *, width: int = 300, depth: int = 2) -> nn.Module:
    """Return a fully connected ReLU net with ``depth`` hidden layers of ``width`` (FCN-3 of iLRG, Ma et al. 2023)."""
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    size = math.prod(input_shape)
    for i in range(depth):
        layers += [(f"linear{i}", nn.Linear(size, width)), (f"relu{i}", nn.ReLU())]
        size = width
    return Classifier(_named(layers), input_shape, num_classes)


def lenet_sigmoid(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the net of DLG (Zhu et al. 2019, arXiv:1906.08935), the "CNN" of LLG (Wainakh et al. 2022)."""
    layers: list[tuple[str, nn.Module]] = []
    channels = input_shape[0]
    for i, stride in enumerate((2, 2, 1)):
        layers += [(f"conv{i}", nn.Conv2d(channels, 12, 5, stride=stride, padding=2)), (f"sigmoid{i}", nn.Sigmoid())]
        channels = 12
    return Classifier(_named([*layers, ("flatten", nn.Flatten())]), input_shape, num_classes)


def lenet5(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return LeNet-5 (LeCun et al. 1998), 28x28 inputs padded to 32x32, with today's ReLU and max pooling."""
    convolutions = _named(
        [
            ("conv0", nn.Conv2d(input_shape[0], 6, 5, padding=2 if input_shape[-1] <= 28 else 0)),
            ("relu0", nn.ReLU()),
            ("pool0", nn.MaxPool2d(2)),
            ("conv1", nn.Conv2d(6, 16, 5)),
            ("relu1", nn.ReLU()),
            ("pool1", nn.MaxPool2d(2)),
            ("flatten", nn.Flatten()),
        ]
    )
    dense = [nn.Linear(_width(convolutions, input_shape), 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
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

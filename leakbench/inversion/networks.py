"""Candidates drawn by untrained convolutional networks, whose weights are what is optimised: a deep image prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench.errors import UserError
from leakbench.inversion.spaces import Space
from leakbench.observation import Observation

COARSEST = 4
"""Networks start from this many pixels a side, or a few more."""
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class ConvolutionalPrior(Space):
    """Weights of small decoders, one per input, that turn fixed noise into an image.

    From a few pixels up, each level is a 3x3 convolution, normalised channels, a leaky ReLU and bilinear upsampling by
    two; a last convolution and a sigmoid give values between the bounds. The noise is the same for all inputs.

    Args:
        shape: Shape of one input, (channels, height, width).
        low: Least valid input, broadcastable to ``shape``.
        high: Greatest valid input.
        width: Channels of the levels.
    """

    shape: tuple[int, ...]
    low: Tensor
    high: Tensor
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"expected a width of at least 1, got {self.width}")

    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:
        """Return weights (Q, N, *shape) of fresh networks by name, normal with variance 2 / inputs of a unit."""
        weights = {}
        for name, parameter in self._network.named_parameters():
            draw = observation.randn(restarts, count, *parameter.shape).flatten(0, 1)
            fan = math.prod(parameter.shape[1:])
            weights[name] = draw * math.sqrt(2 / fan) if parameter.dim() > 1 else torch.zeros_like(draw)
        return weights

    def inputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the inputs (Q, N, *input_shape) that the networks draw."""
        network = self._network
        names = [name for name, _ in network.named_parameters()]
        weights = {name: leaves[name].flatten(0, 1) for name in names}
        some = weights[names[0]]
        noise = self._noise.to(some)

        def draw(own: Mapping[str, Tensor]) -> Tensor:
            drawn: Tensor = functional_call(network, dict(own), (noise,))
            return drawn

        low, high = self.low.to(some), self.high.to(some)
        pixels = torch.vmap(draw)(weights).view(*leaves[names[0]].shape[:2], *self.shape)
        return low + (high - low) * pixels

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """Sizes of the levels, coarsest first; the last is the image's."""
        height, width = self.shape[-2:]
        sizes = [(height, width)]
        while min(sizes[0]) >= 2 * COARSEST:
            sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
        return sizes

    @cached_property
    def _network(self) -> nn.Module:
        with torch.device("meta"):
            return _Decoder(self.width, self.shape[0], self._sizes)

    @cached_property
    def _noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randn(1, self.width, *self._sizes[0], generator=generator)


class _Decoder(nn.Module):
    """From noise (1, width, *sizes[0]) to pixels (1, channels, *sizes[-1]) between 0 and 1."""

    def __init__(self, width: int, channels: int, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes
        self.levels = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in sizes)
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, noise: Tensor) -> Tensor:
        x = noise
        for level, size in zip(self.levels, self.sizes, strict=True):
            if tuple(x.shape[-2:]) != size:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            x = level(x)
            mean, var = x.mean((-2, -1), keepdim=True), x.var((-2, -1), keepdim=True, correction=0)
            x = F.leaky_relu((x - mean) * (var + 1e-5).rsqrt(), 0.2)
        return torch.sigmoid(self.last(x))

"""Modules that a malicious server puts in front of a net to read inputs out of their gradients.

All use the "addition" connection of Fowl et al. 2022: one number per example, a weighted sum of the rows' activations,
is added to every coordinate of the input. A row costs d + 2 parameters instead of the 2 d of a dense layer back to the
input's size, and the read-out is exact whatever the net is: the gradient at an example's activations is the example's
own number (the sum of the loss's gradient at the net's input) times `out`, so rows of equal `out` differ only in which
examples activate them.

With all tensors zero a module is the identity. Tensors are plain parameters: a linear layer might pass for the head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leakbench.errors import UserError, unknown


class ImprintLinear(nn.Module):
    """Return x + sum_j out_j * act(weight_j x + bias_j), the sum added to every coordinate of x.

    ``weight`` is (bins, d) for inputs of d numbers, ``bias`` and ``out`` are (bins,).

    Args:
        size: d.
        bins: Rows.
        top: act is clamp(., 0, top), so that an example moves the rows it lies within; with infinity it is ReLU, and
            an example moves all rows below it.
    """

    def __init__(self, size: int, bins: int, *, top: float) -> None:
        super().__init__()
        self.top = top
        self.weight = nn.Parameter(torch.zeros(bins, size))
        self.bias = nn.Parameter(torch.zeros(bins))
        self.out = nn.Parameter(torch.zeros(bins))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, *input_shape) for the same."""
        return _add(inputs, self.rows(inputs.flatten(1)))

    def rows(self, flat: Tensor) -> Tensor:
        """Return the (B,) sums for (B, d)."""
        return F.hardtanh(F.linear(flat, self.weight, self.bias), 0.0, self.top) @ self.out


class ImprintConv(ImprintLinear):
    """An `ImprintLinear` behind a 1x1 convolution with ReLU that gives every client C channels of its own.

    ``kernel`` is (K * C, C), ``offset`` is (K * C,). A client whose kernels are zero but for its own C rows moves only
    its own C * H * W columns of ``weight``, (bins, K * C * H * W): that many numbers every client holds and sends.

    Args:
        input_shape: (C, H, W).
        bins: Rows, which all clients share.
        clients: K.
    """

    def __init__(self, input_shape: tuple[int, ...], bins: int, clients: int) -> None:
        super().__init__(clients * math.prod(input_shape), bins, top=1.0)
        self.kernel = nn.Parameter(torch.zeros(clients * input_shape[0], input_shape[0]))
        self.offset = nn.Parameter(torch.zeros(clients * input_shape[0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, C, H, W) for the same."""
        channels = F.relu(F.conv2d(inputs, self.kernel[:, :, None, None], self.offset))
        return _add(inputs, self.rows(channels.flatten(1)))


def _add(inputs: Tensor, sums: Tensor) -> Tensor:
    return inputs + sums.reshape(-1, *(1,) * (inputs.dim() - 1))


def imprint_linear(input_shape: tuple[int, ...], *, bins: int, sparse: bool = False, gain: float = 1.0) -> nn.Module:
    """Return an `ImprintLinear` for any inputs; ``sparse`` rows are clamped to 0..gain."""
    return ImprintLinear(math.prod(input_shape), bins, top=gain if sparse else math.inf)


def imprint_conv(input_shape: tuple[int, ...], *, bins: int, clients: int) -> nn.Module:
    """Return an `ImprintConv` for images, its rows clamped to 0..1.

    Raises:
        UserError: Inputs are not (C, H, W).
    """
    if len(input_shape) != 3:
        raise UserError(
            f"imprint_conv: expected inputs (channels, height, width), got {input_shape}; use imprint_linear"
        )
    return ImprintConv(input_shape, bins, clients)


IMPRINTS: dict[str, Callable[..., nn.Module]] = {"imprint_linear": imprint_linear, "imprint_conv": imprint_conv}
"""Modules by name: functions of the shape of one input and keyword parameters."""


def insert(module: nn.Module, name: str, input_shape: tuple[int, ...], params: Mapping[str, Any]) -> nn.Module:
    """Put a module in front of a net, as its submodule ``imprint``, and return the net.

    Args:
        module: Any net that takes (B, *input_shape); the names of its own tensors stay.
        name: One of `IMPRINTS`.
        input_shape: Shape of one input.
        params: The module's parameters.

    Raises:
        UserError: The name or a parameter is unknown or missing, or a count is not positive.
    """
    if name not in IMPRINTS:
        raise unknown("imprint module", name, IMPRINTS)
    signature = inspect.signature(IMPRINTS[name])
    try:
        signature.bind(input_shape, **params)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[1:])
        raise UserError(f"{name}: {error}; it takes {takes}") from None
    for count in params.keys() & {"bins", "clients"}:
        if type(params[count]) is not int or params[count] < 1:
            raise UserError(f"{name}: expected a positive integer {count}, got {params[count]!r}; write {count}=64")
    if not params.get("gain", 1.0) > 0:
        raise UserError(f"{name}: expected gain above 0, got {params['gain']!r}; write gain=1.0")
    module.imprint = IMPRINTS[name](input_shape, **params)
    module.register_forward_pre_hook(_through)
    return module


def insertion(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``name`` and, as ``params``, those of the known parameters that a module of `IMPRINTS` takes."""
    takes = [each for each in inspect.signature(IMPRINTS[name]).parameters if each in known]
    return {"name": name, "params": {each: known[each] for each in takes}}


def with_inserted(module: nn.Module, inserted: Mapping[str, Any] | None, input_shape: tuple[int, ...]) -> nn.Module:
    """Return the net with the module of an `insertion` in front; as it is for None."""
    return module if inserted is None else insert(module, inserted["name"], input_shape, inserted["params"])


def inserted_parameters(inserted: Mapping[str, Any], input_shape: tuple[int, ...], draws: int) -> dict[str, Tensor]:
    """Return the tensors, all zeros, that an `insertion` adds to a net, (draws, *shape) each by name."""
    module = with_inserted(nn.Identity(), inserted, input_shape)
    return {name: value.detach().expand(draws, *value.shape) for name, value in module.named_parameters()}


def _through(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Looked up at the call: functional_call swaps the tensors of the submodule, and a copy of the net has its own.
    return module.get_submodule("imprint")(args[0]), *args[1:]

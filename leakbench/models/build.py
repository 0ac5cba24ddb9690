"""Turning an Architecture into an nn.Module, with a reproducible initialisation."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leakbench.errors import UserError
from leakbench.models.batch_norm import explicit_batch_norm
from leakbench.models.catalogue import architecture_spec

if TYPE_CHECKING:
    from leakbench.tasks import Architecture

_GLOBAL_RNG = threading.Lock()


Transform = Callable[[nn.Module], nn.Module] | None


def build_module(
    architecture: Architecture, input_shape: tuple[int, ...], num_classes: int, transform: Transform = None
) -> nn.Module:
    """Return the classifier with its own initialisation, drawn from torch's global generator; see `initialised`.

    ``transform`` is a defense's change of the architecture.

    BatchNorm layers are `ExplicitBatchNorm`, activations never work in place, and the module is in eval mode.

    Raises:
        UserError: The name or a parameter is unknown, or the net cannot take such inputs.
    """
    spec = architecture_spec(architecture.name)
    module_name, _, function = spec.build.partition(":")
    name = architecture.name.partition("/")[2]
    extra = {"name": name} if name else {}
    shape = "x".join(map(str, input_shape))
    try:
        build = getattr(importlib.import_module(module_name), function)
        module: nn.Module = build(input_shape, num_classes, **extra, **architecture.params)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"architecture {architecture.name!r} with params {architecture.params} cannot be built for inputs {shape}: "
            f"{_first_line(error)}; change the params, or the dataset for one with other inputs"
        ) from error
    if transform is not None:
        module = transform(module)
    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    return explicit_batch_norm(module).eval().requires_grad_(False)


def skeleton(
    architecture: Architecture, input_shape: tuple[int, ...], num_classes: int, transform: Transform = None
) -> nn.Module:
    """Return the module without storage where the constructor allows it (fast: nothing is initialised)."""
    try:
        with torch.device("meta"):
            return build_module(architecture, input_shape, num_classes, transform)
    except UserError as error:
        # Some constructors read values, which tensors without storage lack; other errors repeat and surface here.
        try:
            return initialised(architecture, input_shape, num_classes, 0, transform)
        except UserError:
            raise error from None


def initialised(
    architecture: Architecture, input_shape: tuple[int, ...], num_classes: int, seed: int, transform: Transform = None
) -> nn.Module:
    """Return the module initialised as ``architecture.init`` says, by ``seed`` alone.

    Constructors draw from torch's global generator. Its state is put back, under a lock because the harness calls
    this from several threads.

    Raises:
        UserError: See `build_module`.
    """
    with _GLOBAL_RNG, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = build_module(architecture, input_shape, num_classes, transform)
        if architecture.init != "default":
            bound = float(re.sub(r"[^\d.]", "", architecture.init))
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound)
    return module


def head_name(module: nn.Module, num_classes: int) -> str | None:
    """Return the name of the last linear layer with ``num_classes`` outputs, or None."""
    heads = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    return heads[-1] if heads else None


def dry_run(module: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """Return the logits (1, C) of one input; without values when ``module`` is a skeleton."""
    device = next(module.parameters()).device
    with torch.no_grad():
        return module(torch.zeros(1, *input_shape, device=device))  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

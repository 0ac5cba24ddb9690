"""Turning an Architecture into an nn.Module, with a reproducible initialisation."""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from leakbench.errors import UserError
from leakbench.models.batch_norm import explicit_batch_norm
from leakbench.models.catalogue import architecture_spec

if TYPE_CHECKING:
    from leakbench.tasks import Architecture

Transform = Callable[[nn.Module], nn.Module] | None
"""A model-level defense's change of the architecture."""

_GLOBAL_RNG = threading.Lock()


def build_module(
    architecture: Architecture, input_shape: tuple[int, ...], num_classes: int, transform: Transform = None
) -> nn.Module:
    """Return the classifier with its own initialisation, drawn from torch's global generator; see `initialised`.

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
            f"{first_line(error)}; change the params, or the dataset for one with other inputs"
        ) from error
    if transform is not None:
        module = transform(module)
    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    return explicit_batch_norm(module).eval().requires_grad_(False)


class _SkipInitialisation(TorchFunctionMode):
    """Leaves tensors as they are allocated; unlike ``torch.device("meta")`` it takes any constructor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unless it draws the values of a parameter."""
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(
    architecture: Architecture, input_shape: tuple[int, ...], num_classes: int, transform: Transform = None
) -> nn.Module:
    """Return the module without initialising it: its tensors' values mean nothing.

    Raises:
        UserError: See `build_module`.
    """
    with _SkipInitialisation():
        return build_module(architecture, input_shape, num_classes, transform)


def initialised(
    architecture: Architecture, input_shape: tuple[int, ...], num_classes: int, seed: int, transform: Transform = None
) -> nn.Module:
    """Return the module initialised as ``architecture.init`` says, by ``seed`` alone.

    Raises:
        UserError: See `build_module`.
    """
    with seeded(seed):
        module = build_module(architecture, input_shape, num_classes, transform)
        if architecture.init == "kaiming":
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif architecture.init != "default":
            bound = float(re.sub(r"[^\d.]", "", architecture.init))
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound)
    return module


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global CPU generator seeded, and put its state back.

    Constructors and Dropout take no generator. Blocks take turns, because the harness runs several threads.
    """
    with _GLOBAL_RNG, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def head_name(module: nn.Module, num_classes: int) -> str | None:
    """Return the name of the last linear layer with ``num_classes`` outputs, or None."""
    heads = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    return heads[-1] if heads else None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for messages that must be one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""A classifier as a pure function of its state, for one set of weights or one per trial."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakbench.errors import LeakbenchError, UserError
from leakbench.models.batch_norm import ExplicitBatchNorm
from leakbench.models.build import first_line, head_name, initialised, skeleton
from leakbench.models.catalogue import nonnegative_features

if TYPE_CHECKING:
    from leakbench.tasks import Architecture

BatchNormMode = Literal["eval", "train"]


class Model:
    """A classifier whose parameters and buffers are passed in and handed back; nothing mutates itself.

    Every tensor of the state starts with M, which is 1 (all trials share the weights) or T (each has its own). Dropout
    is never active. Calls from several threads are safe; they take turns in the forward pass.

    Args:
        module: What computes; its own tensors are never used (it may be on the meta device).
        parameters: Name to (M, *shape).
        buffers: Name to (M, *shape).
        num_classes: Classes (C).
        input_shape: Shape of one input.
        architecture: What the module was built from.
        head_is_last: Whether the head's output, for (N, d) features, is what the module returns: the condition for
            closed forms. False where it is not known.

    Raises:
        UserError: The module does not end in a linear layer with ``num_classes`` outputs.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        architecture: Architecture,
        head_is_last: bool = False,
    ) -> None:
        head = head_name(module, num_classes)
        if head is None:
            raise UserError(
                f"architecture {architecture.name!r} does not end in a linear layer with {num_classes} outputs; "
                "choose one that does"
            )
        self.module = module
        self.parameters = dict(parameters)
        self.buffers = dict(buffers)
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)
        self.architecture = architecture
        self.head = head
        self.head_is_last = head_is_last
        self.lock = threading.RLock()
        self._norms = [m for m in module.modules() if isinstance(m, ExplicitBatchNorm)]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters, in the module's order."""
        return tuple(self.parameters)

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """Names of each layer's parameters by the layer's name, in the module's order: from input to output."""
        layers: dict[str, tuple[str, ...]] = {}
        for name in self.parameters:
            layer = name.rpartition(".")[0] or name
            layers[layer] = (*layers.get(layer, ()), name)
        return layers

    @property
    def has_head_bias(self) -> bool:
        """Whether the last layer has a bias."""
        return f"{self.head}.bias" in self.parameters

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are BatchNorm layers."""
        return bool(self._norms)

    @property
    def nonnegative_features(self) -> bool | None:
        """Whether the input of the last layer is never negative; None when unknown."""
        # A defense's module around the last layer knows better than the name of the architecture.
        around = self.module.get_submodule(self.head.rpartition(".")[0])
        declared: bool | None = getattr(around, "nonnegative_features", None)
        return nonnegative_features(self.architecture) if declared is None else declared

    @property
    def draws(self) -> int:
        """M: 1 when all trials share the weights, else T."""
        return int(next(iter(self.parameters.values())).shape[0])

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return next(iter(self.parameters.values())).dtype

    def with_state(
        self, parameters: Mapping[str, Tensor] | None = None, buffers: Mapping[str, Tensor] | None = None
    ) -> Model:
        """Return the same classifier with some tensors replaced; those not named stay.

        When a replacement starts with T and another tensor with 1, the latter is expanded (without copying).

        Raises:
            LeakbenchError: A name is unknown or a shape differs.
        """
        state = [
            _replace("parameter", self.parameters, parameters or {}),
            _replace("buffer", self.buffers, buffers or {}),
        ]
        draws = max(v.shape[0] for part in state for v in part.values())
        expanded = [{k: v.expand(draws, *v.shape[1:]) for k, v in part.items()} for part in state]
        return self._copy(*expanded)

    def trials(self, first: int, last: int) -> Model:
        """Return the model for trials ``first`` to ``last`` (exclusive): itself when all share the weights."""
        if self.draws == 1:
            return self
        part = slice(first, last)
        return self._copy(
            {k: v[part] for k, v in self.parameters.items()}, {k: v[part] for k, v in self.buffers.items()}
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Return the same classifier with its state on ``device`` and its floating-point tensors as ``dtype``."""

        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for k, v in tensors.items()}

        return self._copy(move(self.parameters), move(self.buffers))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state under flat names, the form `build_model` takes as ``state`` and safetensors stores."""
        return flat_state(self.parameters, self.buffers)

    def logits(self, inputs: Tensor, *, batch_norm: BatchNormMode = "eval") -> Tensor:
        """Return logits (T, B, C) of inputs (T, B, *input_shape)."""
        return self.run(inputs, batch_norm=batch_norm)[0]

    def features(self, inputs: Tensor, *, batch_norm: BatchNormMode = "eval") -> Tensor:
        """Return what the last layer gets, (T, B, d), for inputs (T, B, *input_shape)."""
        return self.run(inputs, batch_norm=batch_norm)[1]

    def logits_and_buffers(
        self, inputs: Tensor, *, batch_norm: BatchNormMode = "eval"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (T, B, C) and, in train mode, all buffers (T, *) as the pass would have left them.

        In eval mode nothing changes and the dictionary is empty.
        """
        logits, _, buffers = self.run(inputs, batch_norm=batch_norm)
        return logits, buffers

    def run(self, inputs: Tensor, *, batch_norm: BatchNormMode = "eval") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return logits (T, B, C), features (T, B, d) and new buffers; see `logits_and_buffers`.

        Raises:
            ValueError: The leading dimension of ``inputs`` is not M, and M is not 1.
        """
        trials = inputs.shape[0]
        if self.draws not in (1, trials):
            raise ValueError(f"expected inputs for {self.draws} trials, got {trials}")
        train = batch_norm == "train" and self.has_batch_norm
        if self.draws == 1 and not train:
            logits, features, _ = self.call(self._state(0), inputs.flatten(0, 1), train=False)
            return _split(logits, trials), _split(features, trials), {}
        if self.draws == trials and not torch.is_grad_enabled() and self.device.type == "cpu":
            # vmap makes grouped convolutions of many models: on a CPU 2 to 5 times as slow as one model at a time.
            every = [self.call(self._state(t), x, train=train) for t, x in enumerate(inputs)]
            buffers = {name: torch.stack([each[2][name] for each in every]) for name in every[0][2]}
            return torch.stack([each[0] for each in every]), torch.stack([each[1] for each in every]), buffers
        shared = self.draws == 1 and trials != 1
        state = {k: v[0] if shared else v for k, v in (self.parameters | self.buffers).items()}

        def forward(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return self.call(tensors, x, train=train)

        per_trial: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]] = torch.vmap(
            forward, in_dims=(None if shared else 0, 0)
        )
        return per_trial(state, inputs)

    def _state(self, draw: int) -> dict[str, Tensor]:
        """Return the state of one of the M models."""
        return {k: v[draw] for k, v in (self.parameters | self.buffers).items()}

    def call(
        self, state: Mapping[str, Tensor], inputs: Tensor, *, train: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run the module once with ``state`` (no leading M) on (N, *input_shape).

        Returns:
            Logits (N, C), features (N, d), and with ``train`` all buffers after the pass, else an empty dictionary.
        """
        after = dict(state)
        features: list[Tensor] = []
        # Only this implementation of attention runs under vmap and has second derivatives.
        with self.lock, sdpa_kernel(SDPBackend.MATH):
            for norm in self._norms:
                norm.training = train
            head = self.module.get_submodule(self.head)
            hook = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
            try:
                logits = functional_call(self.module, after, (inputs,))
            finally:
                hook.remove()
        return logits, features[-1], {k: after[k] for k in self.buffers} if train else {}

    def _copy(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Model:
        model = Model(
            self.module,
            parameters,
            buffers,
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            architecture=self.architecture,
            head_is_last=self.head_is_last,
        )
        model.lock = self.lock  # they share the module
        return model


def layer_inputs(model: Model, inputs: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Return what the named layers get, (T, B, *) each, with BatchNorm in eval mode; differentiable in ``inputs``.

    Args:
        model: M = 1 or T; own weights are run one trial at a time.
        inputs: (T, B, *input_shape).
        layers: Names of submodules that are called once.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen[name].append(args[0])

    with model.lock, ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(model.module.get_submodule(name).register_forward_pre_hook(keep(name)))
        for draw in range(model.draws):
            part = inputs if model.draws == 1 else inputs[draw : draw + 1]
            model.call(model._state(draw), part.flatten(0, 1), train=False)
    return [_split(torch.cat(values), len(inputs)) for values in seen.values()]


def flat_state(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters and buffers under flat names."""
    named = {f"parameter/{k}": v for k, v in parameters.items()}
    return named | {f"buffer/{k}": v for k, v in buffers.items()}


def split_state(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and buffers; the inverse of `flat_state`."""
    parts = ({k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{kind}/")} for kind in _KINDS)
    parameters, buffers = parts
    return parameters, buffers


_KINDS = ("parameter", "buffer")


def build_model(
    architecture: Architecture,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    state: Mapping[str, Tensor] | None = None,
    seeds: Sequence[int] | None = None,
    transform: Callable[[nn.Module], nn.Module] | None = None,
) -> Model:
    """Build a classifier with given weights or with freshly drawn ones.

    Args:
        architecture: Which net, its parameters and its initialisation.
        input_shape: Shape of one input.
        num_classes: Classes (C).
        state: The tensors of `Model.tensors`; nothing is initialised then.
        seeds: One seed per draw (M). The same seed gives the same weights; no global generator changes.
        transform: A defense's change of the architecture, applied before any weights are loaded.

    Raises:
        UserError: The architecture or a parameter is unknown, the inputs are too small, or ``state`` is that of
            another net.
    """
    if (state is None) == (seeds is None):
        raise LeakbenchError("build_model takes either state or seeds")
    module = skeleton(architecture, input_shape, num_classes, transform)
    head_is_last = _dry_run(module, architecture, tuple(input_shape), num_classes)
    if state is not None:
        parameters = _part(state, "parameter", dict(module.named_parameters()), architecture)
        buffers = _part(state, "buffer", dict(module.named_buffers()), architecture)
    else:
        nets = [initialised(architecture, input_shape, num_classes, seed, transform) for seed in seeds or ()]
        parameters = _stack([dict(net.named_parameters()) for net in nets])
        buffers = _stack([dict(net.named_buffers()) for net in nets])
    return Model(
        module.to("meta"),
        parameters,
        buffers,
        num_classes=num_classes,
        input_shape=tuple(input_shape),
        architecture=architecture,
        head_is_last=head_is_last,
    )


def _split(flat: Tensor, trials: int) -> Tensor:
    return flat.reshape(trials, -1, *flat.shape[1:])


def _stack(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def _part(
    state: Mapping[str, Tensor], kind: str, expected: Mapping[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    prefix = kind + "/"
    given = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    shapes = {k: tuple(v.shape[1:]) for k, v in given.items()}
    wanted = {k: tuple(v.shape) for k, v in expected.items()}
    if shapes != wanted:
        differing = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))
        name = differing[0]
        raise UserError(
            f"weights do not fit architecture {architecture.label!r}: {kind} {name!r} is expected with shape "
            f"{wanted.get(name)}, got {shapes.get(name)}; give the weights of this architecture"
        )
    return {name: given[name] for name in expected}


def _replace(kind: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in new.items():
        if name not in old:
            raise LeakbenchError(f"the model has no {kind} {name!r}")
        if value.shape[1:] != old[name].shape[1:]:
            raise LeakbenchError(f"{kind} {name!r}: expected (M, *{tuple(old[name].shape[1:])}), got {value.shape}")
    return {**old, **new}


def _dry_run(module: nn.Module, architecture: Architecture, input_shape: tuple[int, ...], num_classes: int) -> bool:
    """Check that the module takes such inputs; return whether its head is the last thing it does."""
    shape = "x".join(map(str, input_shape))
    seen: list[tuple[Tensor, Tensor]] = []
    name = head_name(module, num_classes)
    hooks = [
        module.get_submodule(n).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        for n in ([] if name is None else [name])
    ]
    try:
        with torch.no_grad():
            logits = module(torch.zeros(1, *input_shape, device=next(module.parameters()).device))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"architecture {architecture.name!r} cannot take inputs {shape}: {first_line(error)}; "
            "choose another architecture, or params such as img_size"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise UserError(
            f"architecture {architecture.name!r} does not give {num_classes} logits for an input {shape}; "
            "choose another architecture"
        )
    return len(seen) == 1 and seen[0][1] is logits and seen[0][0].dim() == 2

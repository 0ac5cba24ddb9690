"""Gradients of T trials at once: the same numbers as a loop of ``autograd.grad``, computed in batches."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.nn import functional as F  # noqa: N812

from leakbench.errors import LeakbenchError
from leakbench.models.functional import BatchNormMode, Model

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the cross-entropy of every trial's batch.

    Args:
        tensors: Parameter name to (T, *shape).
        losses: (T,), reduced over the batch.
        buffers: Buffer name to (T, *shape) after the pass with batch_norm="train", else empty.
    """

    tensors: dict[str, Tensor]
    losses: Tensor
    buffers: dict[str, Tensor]


def per_trial_gradients(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    names: Collection[str] | None = None,
    batch_norm: BatchNormMode = "eval",
    reduction: Reduction = "mean",
    create_graph: bool = False,
    chunk: int | None = None,
) -> Gradients:
    """Return the gradient of each trial's loss with respect to that trial's parameters.

    Args:
        model: The classifier, M = 1 or T.
        inputs: (T, B, *input_shape).
        labels: Classes (T, B), or probabilities (T, B, C).
        names: Parameters whose gradients are wanted; None means all. Fewer are cheaper, the last layer's alone most.
        batch_norm: ``train`` normalises with each trial's own batch statistics.
        reduction: Of the loss over the batch.
        create_graph: Whether the result can be differentiated with respect to inputs and soft labels.
        chunk: Trials computed at once; None means a fixed function of the shapes, so that results do not depend on
            the memory at hand.

    Raises:
        LeakbenchError: The model has no parameter of a wanted name.
    """
    wanted = _wanted(model, names)
    size = chunk or default_chunk(model, inputs)
    parts = [
        _vmapped(model, inputs[i : i + size], labels[i : i + size], i, wanted, batch_norm, reduction, create_graph)
        for i in range(0, len(inputs), size)
    ]
    return Gradients(
        {n: torch.cat([p.tensors[n] for p in parts]) for n in wanted},
        torch.cat([p.losses for p in parts]),
        {n: torch.cat([p.buffers[n] for p in parts]) for n in parts[0].buffers},
    )


def per_example_gradients(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    names: Collection[str] | None = None,
    batch_norm: BatchNormMode = "eval",
    create_graph: bool = False,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of each example's own loss: parameter name to (T, B, *shape).

    See `per_trial_gradients`; ``chunk`` counts examples. Their mean over B is the gradient of a trial with
    ``reduction="mean"``.

    Raises:
        LeakbenchError: ``batch_norm="train"`` on a net with BatchNorm: there an example has no loss of its own.
    """
    if batch_norm == "train" and model.has_batch_norm:
        raise LeakbenchError("per-example gradients need batch_norm: eval; in train mode examples share statistics")
    trials, batch = inputs.shape[:2]
    if model.draws > 1:
        repeat = {k: v.repeat_interleave(batch, 0) for k, v in model.parameters.items()}
        model = model.with_state(repeat, {k: v.repeat_interleave(batch, 0) for k, v in model.buffers.items()})
    single = per_trial_gradients(
        model,
        inputs.flatten(0, 1).unsqueeze(1),
        labels.flatten(0, 1).unsqueeze(1),
        names=names,
        create_graph=create_graph,
        chunk=chunk,
    )
    return {k: v.reshape(trials, batch, *v.shape[1:]) for k, v in single.tensors.items()}


def default_chunk(model: Model, inputs: Tensor) -> int:
    """Return the number of trials computed at once: 64 for small nets, down to 1, by shapes alone."""
    weights = sum(v[0].numel() for v in model.parameters.values())
    activations = 8 * math.prod(inputs.shape[1:])
    return max(1, min(64, 2**25 // (weights + activations)))


def _wanted(model: Model, names: Collection[str] | None) -> tuple[str, ...]:
    unknown = sorted(set(names or ()) - set(model.parameters))
    if unknown:
        raise LeakbenchError(f"the model has no parameter {unknown[0]!r}")
    return tuple(n for n in model.parameters if names is None or n in names)


def _vmapped(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    first: int,
    names: tuple[str, ...],
    batch_norm: BatchNormMode,
    reduction: Reduction,
    create_graph: bool,
) -> Gradients:
    shared = model.draws == 1
    state = model.parameters | model.buffers
    state = {k: v[0] if shared else v[first : first + len(inputs)] for k, v in state.items()}
    train = batch_norm == "train" and model.has_batch_norm

    def loss(
        wanted: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _, buffers = model.call(rest | wanted, x, train=train)
        return F.cross_entropy(logits, y, reduction=reduction), buffers

    by_state = None if shared else 0
    gradient = torch.vmap(grad_and_value(loss, has_aux=True), in_dims=(by_state, by_state, 0, 0))
    wanted = {n: state.pop(n) for n in names}
    with torch.set_grad_enabled(create_graph):
        tensors, (losses, buffers) = gradient(wanted, state, inputs, labels)
    return Gradients(tensors, losses, buffers)

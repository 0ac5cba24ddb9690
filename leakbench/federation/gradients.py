"""Gradients of T trials at once: the same numbers as a loop of ``autograd.grad``, computed in batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench.errors import LeakbenchError
from leakbench.models.functional import BatchNormMode, Model
from leakbench.models.taps import can_tap, tapped_gradients

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
    train = batch_norm == "train" and model.has_batch_norm
    head = {f"{model.head}.weight", f"{model.head}.bias"}
    trials = inputs.shape[0]
    moving = create_graph and any(v.requires_grad for v in model.parameters.values())
    # Several chunks write into one result: joining them afterwards would cost more than the arithmetic of small nets.
    joined = () if create_graph or trials <= size else wanted
    result = {n: inputs.new_empty(trials, *model.parameters[n].shape[1:]) for n in joined}
    parts: list[Gradients] = []
    for first in range(0, trials, size):
        part = slice(first, first + size)
        out = {n: v[part] for n, v in result.items()}
        arguments = (model.trials(first, first + size), inputs[part], labels[part], wanted, reduction, create_graph)
        if model.head_is_last and head.issuperset(wanted):
            gradients = _of_head(*arguments, batch_norm, out)
        elif not train and not moving and can_tap(model, wanted):
            gradients = _tapped(*arguments, out)
        else:
            gradients = _stacked(*arguments, train)
        for n, v in out.items():
            if gradients.tensors[n] is not v:
                v.copy_(gradients.tensors[n])
        parts.append(Gradients({}, gradients.losses, gradients.buffers) if joined else gradients)
    if len(parts) == 1:
        return parts[0]
    return Gradients(
        result or {n: torch.cat([p.tensors[n] for p in parts]) for n in wanted},
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

    See `per_trial_gradients`; ``chunk`` counts examples. The mean over B is the gradient of a trial with
    ``reduction="mean"``.

    Raises:
        LeakbenchError: A name is unknown, or ``batch_norm="train"`` on a net with BatchNorm: there an example has no
            loss of its own.
    """
    if batch_norm == "train" and model.has_batch_norm:
        raise LeakbenchError("per-example gradients need batch_norm: eval; in train mode examples share statistics")

    def of_examples(weights: Model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        single = per_trial_gradients(
            weights, x.unsqueeze(1), y.unsqueeze(1), names=names, create_graph=create_graph, chunk=chunk
        )
        return single.tensors

    trials, batch = inputs.shape[:2]
    if model.draws == 1:
        flat = of_examples(model, inputs.flatten(0, 1), labels.flatten(0, 1))
        return {n: v.reshape(trials, batch, *v.shape[1:]) for n, v in flat.items()}
    # A loop over trials: with own weights per trial it is as fast as a batch, and it does not copy them B times.
    each = [of_examples(model.trials(t, t + 1), inputs[t], labels[t]) for t in range(trials)]
    return {n: torch.stack([tensors[n] for tensors in each]) for n in each[0]}


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


def trial_loss(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    """Return the cross-entropy (T,) of logits (T, B, C), reduced over the batch."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none").reshape(logits.shape[:2])
    return each.mean(1) if reduction == "mean" else each.sum(1)


def _of_head(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    reduction: Reduction,
    create_graph: bool,
    batch_norm: BatchNormMode,
    out: Mapping[str, Tensor],
) -> Gradients:
    """Closed form for the last layer: no backward pass at all."""
    with torch.set_grad_enabled(create_graph):
        logits, features, buffers = model.run(inputs, batch_norm=batch_norm)
        soft = labels if labels.dim() == 3 else F.one_hot(labels, model.num_classes).to(logits.dtype)
        at_logits = logits.softmax(-1) * soft.sum(-1, keepdim=True) - soft
        if reduction == "mean":
            at_logits = at_logits / inputs.shape[1]
        tensors = {
            n: at_logits.sum(1)
            if n.endswith(".bias")
            else torch.bmm(at_logits.transpose(1, 2), features, out=out.get(n))
            for n in names
        }
        return Gradients(tensors, trial_loss(logits, labels, reduction), buffers)


def _tapped(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    reduction: Reduction,
    create_graph: bool,
    out: Mapping[str, Tensor],
) -> Gradients:
    tensors, losses = tapped_gradients(
        model,
        inputs,
        lambda logits: trial_loss(logits, labels, reduction),
        names,
        create_graph=create_graph,
        out=out,
    )
    return Gradients(tensors, losses, {})


def _stacked(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    reduction: Reduction,
    create_graph: bool,
    train: bool,
) -> Gradients:
    """Any net: every trial gets its own copy of the weights, so that one backward pass keeps the trials apart."""
    trials = inputs.shape[0]
    shared = model.draws == 1
    # After a differentiable local step the weights depend on the inputs, and the next gradient through them.
    state = {k: v if create_graph else v.detach() for k, v in (model.parameters | model.buffers).items()}
    frozen = {k: v[0] if shared else v for k, v in state.items()}
    own = {n: state[n].expand(trials, *state[n].shape[1:]) for n in names}

    def loss(
        weights: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _, buffers = model.call(rest | weights, x, train=train)
        return F.cross_entropy(logits, y, reduction=reduction), buffers

    with torch.enable_grad():
        own = {n: v.requires_grad_() for n, v in own.items()}
        losses, buffers = torch.vmap(loss, in_dims=(0, None if shared else 0, 0, 0))(own, frozen, inputs, labels)
        tensors = torch.autograd.grad(losses.sum(), list(own.values()), create_graph=create_graph)
    return Gradients(dict(zip(names, tensors, strict=True)), losses if create_graph else losses.detach(), buffers)

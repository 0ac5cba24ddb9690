"""How visible a planted model is to one client: pure functions over trials of what that client holds.

Every function returns (T,) float64, or (M,) where it looks at the weights alone; None where a task has no such number.
Formulas and sources are in `leakbench.metrics.METRICS`. Nothing here knows the attack: the honest model on the same
batch is the comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakbench.federation.gradients import Reduction, default_chunk, per_trial_gradients, trial_loss
from leakbench.federation.statistics import batch_statistics
from leakbench.models.batch_norm import ExplicitBatchNorm
from leakbench.models.functional import BatchNormMode, Model
from leakbench.models.taps import Tap, can_tap, layer_of, tap

SEER_EPSILON = 1e-6
"""What SEER's code adds to the denominator of D-SNR."""

INSERTED = "imprint."
"""Leads the parameters of a module that was inserted in front of the net."""

LARGEST = 1e12
"""Stands for what is infinite or not a number, so that means of rows stay finite."""

NORMS = (ExplicitBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
"""Classes of normalisation layers."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a client that checks what it got, alone and on its first batch, refuses.

    The defaults lie beyond everything seen on honest models: untrained and trained ones of several architectures,
    batches of 2 to 64, BatchNorm in train and eval mode. Whether all clients got the same model is not among them,
    because no client sees that alone.

    Args:
        least_norm_scale: Refuse below it. Fresh layers have 1, and training moves the
            largest of a layer little; .03 keeps clear of a preset of .01.
        logit_spread: Refuse below it: a few roundings of float32.
        dead_gradient_share: Refuse above it.
        head_gradient_rank: Refuse below it. At 1 only a last layer without any gradient is refused: honest nets may
            give 1, because their inputs of the last layer can be all but equal.
        d_snr: Refuse above it. None, not checked, by default: a converged model and one example that it gets wrong
            reach any value.
        parameter_distance: Refuse above it. One round should move the model by less than ten times its norm.
    """

    least_norm_scale: float = 0.03
    logit_spread: float = 5e-7
    dead_gradient_share: float = 0.5
    head_gradient_rank: float = 1.0
    d_snr: float | None = None
    parameter_distance: float = 10.0


def least_norm_scale(model: Model, previous: Model | None = None) -> Tensor | None:
    """Return the smallest, over the normalisation layers, of the largest absolute scale in the layer; 0: one is zeroed.

    Args:
        model: M = 1 or T.
        previous: The model before. Layers that were zeroed there too are left out, because some nets start with zeroed
            layers (timm's ResNets).

    Returns:
        (M,), or None for a net without such layers.
    """
    names = [f"{name}.weight" for name, layer in model.module.named_modules() if isinstance(layer, NORMS)]
    scales = [_largest(model.parameters[name]) for name in names if name in model.parameters]
    if not scales:
        return None
    if previous is not None:
        before = [_largest(previous.parameters[name]) for name in names if name in previous.parameters]
        scales = [torch.where(b == 0, torch.inf, s) for s, b in zip(scales, before, strict=True)]
    least = functools.reduce(torch.minimum, scales)
    return None if bool(least.isinf().all()) else _finite(least)


def logit_spread(model: Model, inputs: Tensor, batch_norm: BatchNormMode = "eval") -> Tensor | None:
    """Return the largest range of a logit within the batch, over the largest absolute logit; 0: all are identical.

    Args:
        model: M = 1 or T.
        inputs: (T, B, *input_shape).
        batch_norm: How BatchNorm normalises in the client.

    Returns:
        (T,), or None for a batch of one.
    """
    if inputs.shape[1] < 2:
        return None
    with torch.no_grad():
        logits = model.logits(inputs, batch_norm=batch_norm).double()
    spread = (logits.amax(1) - logits.amin(1)).amax(1)
    largest = logits.abs().amax((1, 2))
    return torch.where(largest > 0, spread / largest, 0.0).nan_to_num(nan=0.0, posinf=0.0)


def dead_gradient_share(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the share of the parameters that lie in tensors whose gradient (T, *shape) is exactly zero."""
    total = sum(value[0].numel() for value in gradients.values())
    dead = [(value.flatten(1) == 0).all(1).double() * value[0].numel() for value in gradients.values()]
    return torch.stack(dead).sum(0) / total


def head_gradient_rank(gradients: Mapping[str, Tensor], head: str) -> Tensor:
    """Return the numerical rank of the last layer's weight gradient (T, C, d); honest: min(B, C - 1, d) at most.

    Singular values, of float64 arithmetic, count above max(C, d) * eps * the largest, with eps of the type that the
    gradient was computed in.
    """
    weight = gradients[f"{head}.weight"]
    singular = torch.linalg.svdvals(weight.double().nan_to_num(0.0, 0.0, 0.0))
    tolerance = max(weight.shape[1:]) * torch.finfo(weight.dtype).eps
    rank: Tensor = (singular > tolerance * singular[:, :1]).sum(1)
    return rank.double()


def d_snr(model: Model, inputs: Tensor, labels: Tensor, batch_norm: BatchNormMode = "eval") -> Tensor | None:
    """Return SEER's D-SNR: how far one example's gradient outweighs those of all others, in the layer where most so.

    For one layer it is n_max / (sum of the other n_i + 1e-6), where n_i is the L2 norm of the gradient of example i's
    own loss with respect to the layer's weight. Layers: every weight of at least two dimensions, so biases and
    normalisation layers do not count.

    From the code of Garov et al. (`detectability/detectability.py`), which leaves out ResNet-18's stem and shortcuts by
    the way it matches names; here they count. In train mode their gradient of a loss also runs through the batch's
    statistics and thus through all examples; here the statistics are held fixed, which needs one backward pass per
    example instead of B.

    Args:
        model: M = 1 or T.
        inputs: (T, B, *input_shape).
        labels: (T, B), or soft (T, B, C).
        batch_norm: How BatchNorm normalises in the client.

    Returns:
        (T,), or None for a batch of one.
    """
    trials, batch = inputs.shape[:2]
    if batch < 2:
        return None
    if batch_norm == "train" and model.has_batch_norm:
        model = model.with_state(buffers=batch_statistics(model, inputs))
    if model.draws == 1:
        norms = _example_norms(model, inputs.flatten(0, 1), labels.flatten(0, 1)).reshape(trials, batch, -1)
    else:
        norms = torch.stack([_example_norms(model.trials(t, t + 1), inputs[t], labels[t]) for t in range(trials)])
    largest = norms.amax(1)
    return _finite((largest / (norms.sum(1) - largest + SEER_EPSILON)).amax(1))


def parameter_distance(model: Model, previous: Model) -> Tensor:
    """Return ||w - w_prev|| / ||w_prev|| (M,) over all parameters that both models have.

    A module inserted in front of the net is left out: what it was before is arbitrary, and so is the scale of its rows.
    """
    shared = [n for n in model.parameters if n in previous.parameters and not n.startswith(INSERTED)]
    moved = _norm([model.parameters[name] - previous.parameters[name] for name in shared])
    return _finite(torch.where(moved == 0, 0.0, moved / _norm([previous.parameters[name] for name in shared])))


def model_disagreement(digests: Sequence[str]) -> float | None:
    """Return how many of the K - 1 possible further models the clients got, as a share; None for one client."""
    return (len(set(digests)) - 1) / (len(digests) - 1) if len(digests) > 1 else None


def findings(
    model: Model,
    previous: Model,
    inputs: Tensor,
    labels: Tensor,
    *,
    digests: Sequence[str] = (),
    batch_norm: BatchNormMode = "eval",
    reduction: Reduction = "mean",
    thresholds: Thresholds | None = None,
    with_d_snr: bool = True,
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return everything that one client can find out about the model it got, and whether it would refuse.

    Args:
        model: What it received, M = 1 or T.
        previous: The model before, M = 1 or T. What was odd there already (a net that starts with zeroed layers, or
            with the same logits for all inputs) is no reason to refuse.
        inputs: (T, B, *input_shape) its batch.
        labels: (T, B), or soft (T, B, C).
        digests: Hashes of what each of the K clients received.
        batch_norm: How BatchNorm normalises in the client.
        reduction: Of the loss over the batch.
        thresholds: When it refuses; the defaults where None.
        with_d_snr: Whether to compute it: it takes a gradient of every example, the rest one of the batch.
        before: What this function returns for the model before, as ``model`` and as ``previous``, on the same batch;
            computed, where it is needed, for None.

    Returns:
        (T,) float64 by metric; one that does not exist for such a task is left out.
    """
    trials, limits, disagreement = len(inputs), thresholds or Thresholds(), model_disagreement(digests)
    found = {
        **_compared(model, previous, inputs, labels, batch_norm, reduction),
        "d_snr": d_snr(model, inputs, labels, batch_norm) if with_d_snr else None,
        "parameter_distance": parameter_distance(model, previous),
    }
    values = {name: value.expand(trials) for name, value in found.items() if value is not None}
    if disagreement is not None:
        values["model_disagreement"] = inputs.new_full((trials,), disagreement, dtype=torch.float64)
    failed = failed_checks(values, limits)
    if any(bool(failed[name].any()) for name in _COMPARED & failed.keys()):
        if before is None:
            before = _compared(previous, previous, inputs, labels, batch_norm, reduction)
        odd = failed_checks({name: before[name] for name in _COMPARED & before.keys()}, limits)
        failed |= {name: failed[name] & ~odd[name] for name in odd}
    return values | {"detected": torch.stack(list(failed.values())).any(0).double()}


def failed_checks(values: Mapping[str, Tensor], thresholds: Thresholds) -> dict[str, Tensor]:
    """Return, by metric that has a threshold, whether (T,) ``values`` are beyond it."""
    limits = {name: limit for name, limit in vars(thresholds).items() if limit is not None and name in values}
    return {name: values[name] < limit if name in _AT_LEAST else values[name] > limit for name, limit in limits.items()}


_AT_LEAST = frozenset({"least_norm_scale", "logit_spread", "head_gradient_rank"})
_COMPARED = frozenset({"least_norm_scale", "logit_spread", "dead_gradient_share", "head_gradient_rank"})


def _compared(
    model: Model, previous: Model, inputs: Tensor, labels: Tensor, batch_norm: BatchNormMode, reduction: Reduction
) -> dict[str, Tensor]:
    """Return what is no reason to refuse where the model before had it too.

    Gradients come from a few trials at a time, because they are as large as these trials' models.
    """
    size = default_chunk(model, inputs)
    parts = []
    for first in range(0, len(inputs), size):
        part = slice(first, first + size)
        gradients = per_trial_gradients(
            model.trials(first, first + size), inputs[part], labels[part], batch_norm=batch_norm, reduction=reduction
        ).tensors
        parts.append((dead_gradient_share(gradients), head_gradient_rank(gradients, model.head)))
    share, rank = (torch.cat(values) for values in zip(*parts, strict=True))
    found = {
        "least_norm_scale": least_norm_scale(model, previous),
        "logit_spread": logit_spread(model, inputs, batch_norm),
        "dead_gradient_share": share,
        "head_gradient_rank": rank,
    }
    return {name: value for name, value in found.items() if value is not None}


def _example_norms(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return each example's gradient norm in every layer, (N, layers), a few examples at a time; M = 1."""
    names = [name for name, value in model.parameters.items() if value.dim() > 2 and name.endswith("weight")]
    inputs, labels = inputs.unsqueeze(1), labels.unsqueeze(1)
    size = default_chunk(model, inputs)
    rows = []
    for first in range(0, len(inputs), size):
        x, y = inputs[first : first + size], labels[first : first + size]
        if can_tap(model, names):
            taps, _ = tap(model, x, functools.partial(_loss, labels=y), names, create_graph=False)
            with torch.no_grad():  # what passed a layer still knows its whole net
                norms = [_tapped_norm(taps[layer_of(name)]) for name in names]
        else:
            norms = [_norms(value) for value in per_trial_gradients(model, x, y, names=names).tensors.values()]
        rows.append(torch.stack(norms, 1).double())
    return torch.cat(rows)


def _tapped_norm(passed: Tap) -> Tensor:
    """Return the norm of a weight's gradient (N,) of single examples; a dense layer's is an outer product."""
    if isinstance(passed.layer, nn.Linear) and passed.inputs.dim() == 3:
        return _norms(passed.inputs) * _norms(passed.at_outputs)
    return _norms(passed.gradient("weight"))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return trial_loss(logits, labels, "mean")


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms


def _largest(scale: Tensor) -> Tensor:
    return scale.abs().flatten(1).amax(1).double()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=torch.float64) for value in tensors]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return whole


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=LARGEST, posinf=LARGEST).clamp(max=LARGEST)

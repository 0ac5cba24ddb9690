"""What fitted measures read of an update: a few thousand numbers per layer and trial, by fixed maps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakbench.measures.subject import ALL, Subject

Floats = NDArray[np.float64]
Map = Callable[[Sequence[Tensor]], Tensor]
"""Turns the tensors (t, *shape) of a layer into (t, ...) numbers, each trial's from its own alone."""

CHUNK_BYTES = 128 * 2**20
"""Updates held at a time; per-example work inside a client takes a few times as much."""
MODULI = 5000
"""Most numbers that `moduli` keeps of a tensor before it takes margins (Melis et al.)."""
LARGEST = 1e15  # the squares of ten million numbers that are clipped to it still add up in float32


def sketch(dims: int) -> Map:
    """Return a random projection to ``dims`` numbers that keeps inner products up to about 1 / sqrt(dims).

    A count sketch: coordinates get random signs, then blocks of ``dims`` are turned by random offsets and added up.
    That takes one pass in memory order, where a dense projection would take ``dims`` and a shuffle jumps about. Up to
    ``dims`` numbers stay as they are.
    """

    def project(tensors: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten(1) for tensor in tensors], 1)
        size = flat.shape[1]
        if size <= dims:
            return flat
        stream = torch.Generator().manual_seed(size)
        flat = flat * (2 * torch.randint(2, (size,), generator=stream) - 1).to(flat)
        total = flat.new_zeros(len(flat), dims)
        for start, offset in enumerate(torch.randint(dims, (ceil(size / dims),), generator=stream).tolist()):
            block = flat[:, start * dims : (start + 1) * dims]
            fits = min(dims - offset, block.shape[1])
            total[:, offset : offset + fits] += block[:, :fits]
            total[:, : block.shape[1] - fits] += block[:, fits:]
        return total

    return project


def directed(dims: int) -> Map:
    """Return the map to the sketch's direction and the logarithm of the layer's norm, (t, up to dims + 1)."""
    project = sketch(dims)

    def direction(tensors: Sequence[Tensor]) -> Tensor:
        flat = project(tensors)
        norm = torch.stack([tensor.flatten(1).norm(dim=1) for tensor in tensors]).norm(dim=0)[:, None]
        floor = torch.finfo(norm.dtype).tiny
        return torch.cat([flat / norm.clamp_min(floor), norm.clamp_min(floor).log10()], 1)

    return direction


def moduli(tensors: Sequence[Tensor]) -> Tensor:
    """Map weights to |g| over the layer's norm, the greatest of each kernel's positions where there are kernels.

    Biases are left out where there are weights. Where more than `MODULI` numbers would remain, the greatest along each
    of the two axes are taken, so that both input and output units stay readable.
    """
    matrices = [tensor for tensor in tensors if tensor.dim() > 2] or list(tensors)
    kept = []
    for tensor in matrices:
        size = tensor.abs().flatten(3).amax(3) if tensor.dim() > 3 else tensor.abs()
        if size[0].numel() > MODULI and size.dim() == 3:
            size = torch.cat([size.amax(2), size.amax(1)], 1)
        kept.append(size.flatten(1))
    flat = torch.cat(kept, 1)
    norm: Tensor = flat.norm(dim=1, keepdim=True)
    return flat / norm.clamp_min(torch.finfo(flat.dtype).tiny)


def matrix(dims: int) -> Map:
    """Return the map to the layer's (outputs, inputs) matrix with the bias as a column, over its root mean square.

    Outputs are sketched to ``dims``, and inputs so far that ``dims`` squared numbers remain.
    """

    def shrink(tensors: Sequence[Tensor]) -> Tensor:
        rows = tensors[0].shape[1]
        alike = [tensor for tensor in tensors if tensor.shape[1] == rows]
        wide = torch.cat([tensor.flatten(2) if tensor.dim() > 2 else tensor[:, :, None] for tensor in alike], 2)
        count = len(wide)
        wide = sketch(dims**2 // min(rows, dims))([wide.flatten(0, 1)]).view(count, rows, -1).transpose(1, 2)
        small = sketch(dims)([wide.flatten(0, 1)]).view(count, wide.shape[1], -1).transpose(1, 2)
        scale = small.flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(small.dtype).tiny)
        return small / scale[:, None, None]

    return shrink


def observe(
    subject: Subject,
    maps: Mapping[str, Map],
    *,
    whole: Collection[str] = (),
    chunk: int | None = None,
    report: Callable[[int], None] | None = None,
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Compute the updates of all trials, some at a time, and keep what the maps say about each layer.

    Args:
        subject: T trials.
        maps: By name.
        whole: Names of maps that are also applied to the whole update, under `ALL`.
        chunk: Trials at a time; as many as fit `CHUNK_BYTES` where None.
        report: Receives the trials done.

    Returns:
        By map, then layer: (T, ...).
    """
    numbers = sum(value[0].numel() for value in subject.model.parameters.values())
    chunk = chunk or max(1, CHUNK_BYTES // (4 * max(numbers, subject.images[0].numel())))
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in maps}
    for first in range(0, subject.trials, chunk):
        last = min(first + chunk, subject.trials)
        update = {
            name: torch.nan_to_num(value.detach(), 0.0)
            .clamp(-LARGEST, LARGEST)
            .reshape(len(value), *(value[0].shape or (1,)))
            for name, value in subject.part(first, last).update().items()
        }
        groups = {layer: [update[name] for name in names] for layer, names in subject.layers.items()}
        for name, function in maps.items():
            everything = {ALL: list(update.values())} if name in whole else {}
            for layer, tensors in (groups | everything).items():
                parts[name].setdefault(layer, []).append(function(tensors).float().cpu())
        if report is not None:
            report(last)
    return {
        name: {layer: torch.cat(chunks).numpy() for layer, chunks in layers.items()} for name, layers in parts.items()
    }


def kernel(features: NDArray[np.float32] | Floats, fit: int) -> Floats:
    """Return inner products (n, n) of features standardised by their first ``fit`` rows; a row's square is about 1."""
    flat = standardised(features.reshape(len(features), -1), fit)
    varying = int(flat[:fit].any(axis=0).sum())
    return np.asarray(flat @ flat.T / max(varying, 1))


def standardised(features: NDArray[np.float32] | Floats, fit: int) -> Floats:
    """Return features less the mean of their first ``fit`` rows, over these rows' deviation; 0 what does not vary."""
    flat = features.astype(np.float64)
    scale = flat[:fit].std(axis=0)
    varies = scale > 1e-6 * np.abs(flat[:fit]).max(axis=0, initial=0.0)
    flat = (flat - flat[:fit].mean(axis=0)) * (varies / np.where(varies, scale, 1.0))
    # What was nearly constant when fitting may be anything later; a rule must not explode on it.
    most = max(fit, 100) ** 0.5
    return np.asarray(flat.clip(-most, most))


def coordinates(products: Floats, fit: int, most: int | None = None) -> Floats:
    """Return principal coordinates (n, r) of the first ``fit`` rows, and of the others on the same axes.

    They keep these rows' inner products ``products`` (n, n), so a rule with an L2 penalty loses nothing by them. Rows
    that are all zero, as where a layer is withheld, have one coordinate, 0.
    """
    values, axes = np.linalg.eigh(products[:fit, :fit])
    values, axes = values[::-1][:most], axes[:, ::-1][:, :most]
    kept = values > 1e-9 * max(float(values[0]), 1e-30)
    kept[0] = True
    return np.asarray(products[:, :fit] @ (axes[:, kept] / np.sqrt(values[kept].clip(1e-30))))

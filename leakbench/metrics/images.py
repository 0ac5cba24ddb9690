"""How well images were recovered: pure functions over trials.

Images are (T, N, channels, height, width) with intensities in [0, 1], clamped. A batch has no order, so recovered
images are first assigned to true ones, once, and every metric reuses that assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from leakbench.errors import InvalidOutput
from leakbench.metrics import METRICS

PSNR_CAP = 120.0
"""PSNR of an exact image, dB."""

GREY = 0.5
"""Intensity of the images that a recovery lacks."""

RECOVERED_DB = 20.0
"""Least PSNR of a recovered image."""

EXACT_DB = 40.0
"""The same for an attack that declares itself exact."""

RECOVERED_GAIN_DB = 6.0
"""Least gain of a recovered image over that image's best floor."""

_C1, _C2 = 0.01**2, 0.03**2  # SSIM's constants for a data range of 1

Measure = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""From matched and true images to (T, N) float64 values by metric; nothing for a metric that cannot be had here."""


def match(recovered: Tensor, true: Tensor) -> Tensor:
    """Order recovered images like the true ones: one Hungarian assignment on mean squared error per trial.

    Args:
        recovered: (T, N', *) images; where N' < N the rest is grey.
        true: (T, N, *) images.

    Returns:
        (T, N, *) in the order of ``true``.

    Raises:
        InvalidOutput: More images than true ones, or images of another shape.
    """
    trials, wanted = true.shape[:2]
    if recovered.shape[0] != trials or recovered.shape[2:] != true.shape[2:] or recovered.shape[1] > wanted:
        expected = f"({trials}, at most {wanted}, {', '.join(map(str, true.shape[2:]))})"
        raise InvalidOutput(f"inputs: expected shape {expected}, got {tuple(recovered.shape)}")
    missing = recovered.new_full((trials, wanted - recovered.shape[1], *true.shape[2:]), GREY)
    candidates = torch.cat([recovered, missing], dim=1)
    matched = torch.empty_like(candidates)
    # One trial at a time: the assignment is per trial, and a batched product may round differently for another T.
    for t in range(trials):
        a, b = true[t].flatten(1).double(), candidates[t].flatten(1).double()
        distance = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
        _, order = linear_sum_assignment(distance.cpu().numpy())
        matched[t] = candidates[t, torch.from_numpy(order).to(candidates.device)]
    return matched


def mse(matched: Tensor, true: Tensor) -> Tensor:
    """Return the mean squared error of every image, (T, N) float64."""
    return (matched.double() - true.double()).square().flatten(2).mean(dim=2)


def psnr(matched: Tensor, true: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of every image in dB, at most `PSNR_CAP`, (T, N) float64."""
    return -10 * torch.log10(mse(matched, true).clamp(min=10 ** (-PSNR_CAP / 10)))


def ssim(matched: Tensor, true: Tensor) -> Tensor:
    """Return the structural similarity of every image, (T, N) float64.

    Gaussian weights (11x11, sigma 1.5), data range 1, averaged over the positions where the window fits. For images
    smaller than 11 those are the positions where the largest odd window fits, and the weights reach over the border by
    reflection; below 6 pixels the reflection is undefined and so is the value (NaN).

    Source: Wang et al. 2004, doi 10.1109/TIP.2003.819861.
    """
    smallest = min(true.shape[-2:])
    if smallest < 6:
        return torch.full(true.shape[:2], torch.nan, dtype=torch.float64)
    border = (min(11, smallest - 1 + smallest % 2) - 1) // 2
    rows, columns = (_smoothing(size, border) for size in true.shape[-2:])
    values = []
    # One trial at a time: bounds the memory of the five filtered copies and makes a value independent of T.
    for a, b in zip(matched.double(), true.double(), strict=True):
        # The Gaussian is separable: two small products, where a convolution in float64 takes 100 times as long.
        mean_a, mean_b, aa, bb, ab = rows @ torch.stack([a, b, a * a, b * b, a * b]) @ columns.T
        similar = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
        contrast = (aa - mean_a**2).clamp(min=0) + (bb - mean_b**2).clamp(min=0)
        similar = similar * (2 * (ab - mean_a * mean_b) + _C2) / (contrast + _C2)
        values.append(similar.flatten(1).mean(dim=1))
    return torch.stack(values)


def _smoothing(size: int, border: int) -> Tensor:
    """Return the matrix (size - 2 * border, size) that smooths a line, reflected at its ends, away from its border."""
    reach = torch.arange(-5, 6)
    weights = torch.exp(-(reach.double() / 1.5).square() / 2)
    centers = torch.arange(border, size - border)
    sources = (centers[:, None] + reach).abs()
    sources = torch.where(sources < size, sources, 2 * (size - 1) - sources)
    matrix = torch.zeros(len(centers), size, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, (weights / weights.sum()).expand(len(centers), -1))


def pixelwise(matched: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Return the metrics that need nothing but the images: ``psnr``, ``ssim`` and ``mse``."""
    return {"psnr": psnr(matched, true), "ssim": ssim(matched, true), "mse": mse(matched, true)}


def score_images(
    recovered: Tensor,
    true: Tensor,
    floors: Mapping[str, Tensor],
    *,
    exact: bool = False,
    measures: Sequence[Measure] = (),
) -> dict[str, Tensor]:
    """Score recovered images with every image metric, and the floors with the same.

    Args:
        recovered: (T, N', *) intensities, N' <= N.
        true: (T, N, *) intensities.
        floors: What knows nothing of the update, by name (random image, mean image, ...): (T, N, *), or with 1 for T
            or N where the same image serves all.
        exact: Whether the attack claims exact images, which raises the bar of ``recovered``.
        measures: Metrics besides `pixelwise`.

    Returns:
        (T,) float64 per metric: those of the measures and ``recovered``, and for each ``*_floor``, the best value that
        any of the floors reaches in that trial.

    Raises:
        InvalidOutput: More images than true ones, or images of another shape.
    """

    def measured(images: Tensor) -> dict[str, Tensor]:
        matched = match(images, true)
        return {name: value for measure in (pixelwise, *measures) for name, value in measure(matched, true).items()}

    true = true.clamp(0, 1)
    scores = measured(recovered.clamp(0, 1))
    floored = [measured(floor.clamp(0, 1).to(true).expand_as(true)) for floor in floors.values()]
    enough = torch.full_like(scores["psnr"], EXACT_DB if exact else RECOVERED_DB)
    if floored:
        enough = torch.stack([enough, *(floor["psnr"] + RECOVERED_GAIN_DB for floor in floored)]).amax(dim=0)
    scores["recovered"] = (scores["psnr"] >= enough).double()
    if floored:
        values = {name: torch.stack([floor[name] for floor in floored]) for name in floored[0]}
        best = {METRICS[name].reference: _best(every, METRICS[name].higher_is_better) for name, every in values.items()}
        # No floor is above the best floor.
        scores |= {**best, METRICS["recovered"].reference: torch.zeros_like(enough)}
    return {name: values.mean(dim=1) for name, values in scores.items()}


def _best(values: Tensor, higher_is_better: bool) -> Tensor:
    """Return, for floors x T x N values, those of the floor whose trial mean is best, (T, N)."""
    means = values.mean(dim=2)
    winner = means.argmax(dim=0) if higher_is_better else means.argmin(dim=0)
    return values[winner, torch.arange(values.shape[1])]

"""V-information of the private images: bits per dimension that learned inverters get from a layer's update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import mse_loss

from leakbench.board.stats import Interval
from leakbench.errors import NotApplicable
from leakbench.measures.features import Floats, coordinates, directed, kernel, moduli
from leakbench.measures.fitted import auxiliary, both_sides, interval_profile, mean_with_interval, sides
from leakbench.measures.nets import mlp, trained
from leakbench.measures.subject import ALL, Profile, Subject

SKETCH = 2048
INPUT_AXES, IMAGE_AXES = 128, 64
"""Principal coordinates of updates that the MLP reads, and of images that it writes."""


@dataclass(frozen=True)
class Guess:
    """An inverter's guesses y' of targets y, both less the mean of the rows that it was fitted to.

    Args:
        cross: (n,) inner products y . y'.
        power: (n,) ||y'||^2.
    """

    cross: Floats
    power: Floats


def v_information_original(subject: Subject, *, train: int = 512) -> dict[str, Profile]:
    """Measure how many bits per dimension each layer gives to inverters that were fitted to auxiliary trials.

    The target is the trial's images, sorted by label and then by brightness: an update does not depend on the order of
    its batch, which therefore could not be recovered, while the sorted images keep all else. A mean image would keep
    what survives averaging alone.

    Args:
        subject: With auxiliary trials.
        train: Auxiliary trials; four in five are fitted to, the rest calibrate and choose.

    Raises:
        NotApplicable: There are too few trials.
    """
    public = auxiliary(subject, train)
    images = np.concatenate([sorted_images(public), sorted_images(subject)])
    fit, calibrate = sides(public.trials)
    if not np.ptp(images[:fit], axis=0).any():
        raise NotApplicable("needs auxiliary images that differ")
    targets = images - images[:fit].mean(axis=0)
    products = (targets @ targets.T).astype(np.float64)
    maps = {"signed": directed(SKETCH), "moduli": moduli}
    seen = both_sides(subject, train, maps, steps=len(subject.layers) + 1)
    kernels = {
        layer: (kernel(seen["signed"][layer], fit) + kernel(seen["moduli"][layer], fit)) / 2 for layer in subject.layers
    }
    kernels[ALL] = np.mean(list(kernels.values()), axis=0)
    found: dict[str, dict[str, Interval]] = {f"v_information_original_{name}": {} for name in INVERTERS}
    found["v_information_original"] = {}
    for done, (layer, own) in enumerate(kernels.items()):
        ladder = invert(own, products, fit, calibrate, targets.shape[1])
        for name, (bits, _) in ladder.items():
            interval = mean_with_interval(bits, "v_information_original", layer, name)
            found[f"v_information_original_{name}"][layer] = interval
        best = max(ladder, key=lambda name: ladder[name][1])
        found["v_information_original"][layer] = found[f"v_information_original_{best}"][layer]
        subject.progress(len(images) + done + 1, len(images) + len(kernels))
    return {name: interval_profile(intervals, n=subject.trials) for name, intervals in found.items()}


def invert(updates: Floats, targets: Floats, fit: int, calibrate: int, dims: int) -> dict[str, tuple[Floats, float]]:
    """Fit and calibrate inverters, and score them.

    Args:
        updates: (n, n) inner products of standardised features (`kernel`): rows to fit to, to calibrate, held out.
        targets: (n, n) inner products of targets, less the mean of the first rows.
        fit: Rows to fit to.
        calibrate: Rows to calibrate with.
        dims: Numbers of a target.

    Returns:
        By inverter: (T,) bits per dimension of each held-out row, and their mean over the calibration rows.
    """
    return {
        name: bits_per_dim(rule(updates, targets, fit, fit + calibrate), targets, fit, calibrate, dims)
        for name, rule in INVERTERS.items()
    }


def bits_per_dim(guess: Guess, targets: Floats, fit: int, calibrate: int, dims: int) -> tuple[Floats, float]:
    """Return log2 p(y | g) - log2 p(y) over the dimensions, per held-out row, and its mean over the calibration rows.

    p(y | g) is a Gaussian around the guess, p(y) around the mean of the rows fitted to; one variance each, and the
    share of the guess that is believed, are fitted to the calibration rows. So the mean is
    0.5 log2(MSE_empty / MSE_attack) where the held-out rows have the calibration rows' errors, and less otherwise.
    """
    own, energy = slice(fit, fit + calibrate), np.diag(targets)
    power = float(guess.power[own].sum())
    share = min(max(float(guess.cross[own].sum()) / power, 0.0), 1.0) if power > 0.0 else 0.0
    # A guess that is right to rounding is worth 26 bits per dimension in float64, not infinitely many.
    empty = energy / dims
    errors = np.maximum((energy - 2 * share * guess.cross + share**2 * guess.power) / dims, 1e-16 * empty.mean())
    variance, prior = float(errors[own].mean()), max(float(empty[own].mean()), 1e-30)
    bits = 0.5 * np.log2(prior / variance) + (empty / prior - errors / variance) / (2 * np.log(2))
    return bits[fit + calibrate :], float(bits[own].mean())


def ridge(updates: Floats, targets: Floats, fit: int, known: int) -> Guess:  # noqa: ARG001  all inverters' signature
    """Ridge regression in closed form, its penalty by leave-one-out errors."""
    values, axes = np.linalg.eigh(updates[:fit, :fit])
    kept = values > 1e-9 * max(float(values[-1]), 1e-30)
    values, axes = values[kept], axes[:, kept]
    if len(values) == 0:
        return Guess(np.zeros(len(updates)), np.zeros(len(updates)))
    reach = targets[:, :fit] @ axes
    among, energy = axes.T @ reach[:fit], np.diag(targets)[:fit]

    def error(penalty: float) -> float:
        fitted = axes * (values / (values + penalty))
        missed = energy - 2 * (fitted * reach[:fit]).sum(1) + ((fitted @ among) * fitted).sum(1)
        # The mean was fitted too, to all rows: each has a share 1 / fit in its own.
        return float((missed / (1 - 1 / fit - (fitted * axes).sum(1)).clip(1e-6) ** 2).mean())

    penalty = min(np.logspace(-6, 3, 19) * float(values[-1]), key=error)
    found = updates[:, :fit] @ (axes / (values + penalty))
    return Guess(cross=(found * reach).sum(1), power=((found @ among) * found).sum(1))


def decoder(updates: Floats, targets: Floats, fit: int, known: int) -> Guess:
    """MLP 256-64 from the leading principal coordinates of the updates to those of the targets."""
    inputs, outputs = coordinates(updates, fit, INPUT_AXES), coordinates(targets, fit, IMAGE_AXES)
    given = torch.from_numpy(inputs / max(float(inputs[:fit].std()), 1e-30)).float()
    scale = max(float(outputs[:fit].std()), 1e-30)
    wanted = torch.from_numpy(outputs[:known] / scale).float()
    guessed = trained(lambda: mlp(given.shape[1], wanted.shape[1]), mse_loss, [given], wanted, fit)
    own = guessed.double().numpy() * scale
    return Guess(cross=(own * outputs).sum(1), power=(own**2).sum(1))


INVERTERS: Mapping[str, Callable[[Floats, Floats, int, int], Guess]] = {"ridge": ridge, "mlp": decoder}
"""Each fits itself to the first rows; only the MLP reads the calibration rows, to stop by."""


def sorted_images(subject: Subject) -> NDArray[np.float32]:
    """Return the trials' images (T, n * pixels), each trial's by label and then by brightness."""
    flat, labels = subject.images.flatten(2).cpu().numpy(), subject.labels.cpu().numpy()
    levels = np.rint(255 * flat.astype(np.float64)).astype(np.int64)
    # Images of the same brightness are told apart by whole numbers too, so that rounding never decides.
    weights = np.random.default_rng(0).integers(1 << 20, size=flat.shape[2])
    order = np.lexsort((levels @ weights, levels.sum(2), labels), axis=1)
    return np.take_along_axis(flat, order[:, :, None], 1).reshape(len(flat), -1).astype(np.float32)

"""Subspace distance: how far the updates with an attribute turn away from those without, against random relabelings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV

from leakbench.errors import NotApplicable
from leakbench.keys import PUBLIC_KEY, seed
from leakbench.measures.features import Floats, coordinates, kernel, sketch
from leakbench.measures.fitted import FEWEST, both_sides, distinct, profile, truths
from leakbench.measures.subject import Profile, Subject

RANK = 128
"""Principal axes of the pooled observations in which subspaces are compared, so that relabelings are cheap."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Distance:
    """How far two groups' subspaces are apart.

    Args:
        share: Geodesic distance over its greatest value.
        z: Standard deviations above the mean of random relabelings.
        p: Share of relabelings, the true one counted, at least as far apart.
    """

    share: float
    z: float
    p: float


def subspace_distance(
    subject: Subject, *, k: int = 10, permutations: int = 200, projection: int = 4096, train: int = 512
) -> dict[str, Profile]:
    """Compare the top-k subspaces of each layer's updates with and without the attribute.

    All observations, auxiliary and victims, are pooled for the distance, equally many of each group, without those that
    share an image with an earlier one: an image is always on the same side, so that relabelings would not. The probe is
    fitted to the auxiliary ones and scored on the victims. Without taking the mean away, a direction that all updates
    share hides most of what differs; with it, a mere shift of the mean puts both groups on the same axis and is
    invisible. Both are given, and the effect size and the probe, which see shifts of the mean.

    Args:
        subject: With truth, and auxiliary trials.
        k: Dimensions of a subspace.
        permutations: Random relabelings.
        projection: Numbers to which a layer is projected.
        train: Auxiliary trials.

    Raises:
        NotApplicable: There are too few trials with or without the attribute, or too few images for them.
    """
    truth, held_out = truths(subject, train), subject.trials
    apart = distinct(subject, train)
    if (fewest := int(np.bincount(truth[apart], minlength=2).min())) < FEWEST:
        raise NotApplicable(
            f"needs {FEWEST} trials with the attribute and as many without that share no image, got {fewest}; lower "
            "the batch size or the number of clients"
        )
    maps = {"sketch": sketch(projection)}
    layers = both_sides(subject, train, maps, steps=len(subject.layers) + 1, whole=maps)["sketch"]
    columns: dict[str, list[float]] = {}
    ends: list[tuple[float, float]] = []
    fit = len(truth) - held_out
    for done, (layer, rows) in enumerate(layers.items()):
        features = rows.astype(np.float64)
        own, sides = features[apart], truth[apart]
        plain = distance(own, sides, k=k, permutations=permutations, names=(layer, "uncentred"))
        centred = distance(own, sides, k=k, permutations=permutations, names=(layer, "centred"), centre=True)
        auc, *interval = held_out_auc(features, truth, fit, layer)
        values = {
            "subspace_distance": plain.share,
            "subspace_z": plain.z,
            "subspace_p": plain.p,
            "subspace_distance_centred": centred.share,
            "subspace_z_centred": centred.z,
            "subspace_p_centred": centred.p,
            "subspace_effect": effect_size(own, sides),
            "subspace_probe_auc": auc,
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        ends.append((interval[0], interval[1]))
        subject.progress(len(truth) + done + 1, len(truth) + len(layers))
    pooled = 2 * int(np.bincount(truth[apart]).min())
    profiles = {name: profile(tuple(layers), values, n=pooled) for name, values in columns.items()}
    profiles["subspace_probe_auc"] = profile(tuple(layers), columns["subspace_probe_auc"], ends, n=held_out)
    return profiles


def distance(
    features: Floats,
    truth: NDArray[np.int64],
    *,
    k: int,
    permutations: int,
    names: tuple[object, ...],
    centre: bool = False,
) -> Distance:
    """Return how far apart the top-k subspaces of two groups are, among random relabelings.

    Args:
        features: (n, d).
        truth: (n,) group of each, 0 or 1; as many of each group are used, the first ones.
        k: Dimensions of a subspace; fewer where a group has fewer.
        permutations: Random relabelings.
        names: Seed of the relabelings.
        centre: Whether the mean over both groups is taken away first; otherwise a direction that all share counts.
    """
    size = int(min(truth.sum(), len(truth) - truth.sum()))
    rows = np.concatenate([np.flatnonzero(truth == 1)[:size], np.flatnonzero(truth == 0)[:size]])
    pooled = features[rows] - (features[rows].mean(axis=0) if centre else 0.0)
    scale = np.abs(pooled).max()
    if scale == 0.0:
        return Distance(0.0, 0.0, 1.0)
    pooled = pooled / scale
    points = coordinates(pooled @ pooled.T, len(pooled), RANK)
    k = min(k, points.shape[1], size)
    order = np.random.default_rng(seed(PUBLIC_KEY, "subspace", *names))
    observed = _share(points, np.arange(2 * size), k)
    null = np.array([_share(points, order.permutation(2 * size), k) for _ in range(permutations)])
    # Where k axes hold all there is, every relabeling is as far apart: the spread is rounding.
    spread = float(null.std(ddof=1))
    z = (observed - float(null.mean())) / spread if spread > 1e-9 else 0.0
    return Distance(observed, z, float((1 + (null >= observed - 1e-12).sum()) / (1 + permutations)))


def effect_size(features: Floats, truth: NDArray[np.int64]) -> float:
    """Return ||mean with - mean without|| over the root of the summed variances within groups; 0 without variance."""
    groups = [features[truth == value] for value in (1, 0)]
    spread = float(np.sqrt(sum(group.var(axis=0, ddof=1).sum() for group in groups) / 2))
    gap = float(np.linalg.norm(groups[0].mean(axis=0) - groups[1].mean(axis=0)))
    return gap / spread if spread > 0.0 else 0.0


def held_out_auc(features: Floats, truth: NDArray[np.int64], fit: int, layer: str) -> tuple[float, float, float]:
    """Return the AUC, with its 95% bootstrap interval, of a ridge regression fitted to the first ``fit`` rows."""
    points = coordinates(kernel(features, fit), fit)
    probe = RidgeCV(alphas=np.logspace(-4, 4, 9)).fit(points[:fit], truth[:fit])
    scores, own = probe.predict(points[fit:]), truth[fit:]
    rng = np.random.default_rng(seed(PUBLIC_KEY, "subspace", "auc", layer))
    with_it, without = scores[own == 1], scores[own == 0]
    drawn = [rng.choice(group, (RESAMPLES, len(group))) for group in (with_it, without)]
    low, high = np.quantile(_auc(*drawn), [0.025, 0.975])
    return float(_auc(with_it[None], without[None])[0]), float(low), float(high)


def _share(points: Floats, order: NDArray[np.int64], k: int) -> float:
    """Geodesic distance, over its greatest value, of the halves of ``points`` (2 n, r) in this order."""
    halves = [points[half] for half in np.split(order, 2)]
    top = (points.shape[1] - k, points.shape[1] - 1)
    axes = [eigh(half.T @ half, subset_by_index=top, check_finite=False)[1] for half in halves]
    cosines = np.linalg.svd(axes[0].T @ axes[1], compute_uv=False)
    return float(np.linalg.norm(np.arccos(np.clip(cosines, 0.0, 1.0))) / (np.sqrt(k) * np.pi / 2))


def _auc(with_it: Floats, without: Floats) -> Floats:
    """Mann-Whitney statistic of each row, (r, n1) and (r, n0), ties counting half."""
    ranks = rankdata(np.concatenate([with_it, without], axis=1), axis=1)[:, : with_it.shape[1]]
    size = with_it.shape[1]
    return np.asarray((ranks.sum(axis=1) - size * (size + 1) / 2) / (size * without.shape[1]))

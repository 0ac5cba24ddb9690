"""Inversion through the known transforms of OASIS, then the turn of every image that looks most usual."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from leakbench_baselines.attacks.bayes_adaptive import BayesAdaptive
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, NotGranted, Observation, Recovery, UserError, register
from leakbench.inversion import Inversion, InversionAttack, Pixels

MODEL = "images/"
"""Leads the names of what describes images among what is prepared."""
SIDE = 32
"""Larger images are shrunk to this before they are compared."""
FEWEST = 8
"""Auxiliary images that a class needs for a description of its own."""


@register("oasis_inversion", version=1)
class OasisInversion(InversionAttack):
    """OASIS inversion: searches images whose enlarged batch sends the update, then picks the turn of each.

    The enlarged batch is simulated by the client with the known transforms, of all images together, as in
    ``bayes_adaptive``. That one ends in mixtures of an image and its turns, for two reasons. It starts anywhere, where
    the first restart here starts at the mean auxiliary image of the class. And updates differ less once turns are added
    up, so that a total variation of the usual weight outweighs them; it has a hundredth of it here.

    Where the transforms of an image are those of its own transforms (all quarter turns, or the mirror image), no update
    tells which of them was private. Every one is tried, for each image on its own, and the one is claimed that is most
    probable under a normal distribution of the auxiliary images of its class (principal components and equal noise on
    every pixel; of all images where the class has few).

    Sees: gradients of all layers, weights, number of inputs, auxiliary data; the defense, and labels where granted.
    Without the defense, or with transforms that leave no choice, nothing is turned.

    A re-implementation: a description of an attack on OASIS by the known transforms was not at hand; this is ours,
    after Balunović et al.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation.
        smoothness: See ``bayes_adaptive``.
        lr: Learning rate of Adam.
        restarts: Random initialisations.
        samples: Draws of a random defense that a step averages.
        labels: Label attack that runs first where labels are not granted.
        components: Most principal components of a class.
        noise: Standard deviation of a found pixel around the true one, in units of the pixel range.

    Reference: Jeter, Nguyen, Alharbi, Thai, "OASIS: Offsetting Active Reconstruction Attacks in Federated Learning",
    ICDCS 2024, arXiv 2311.13739; Balunović, Dimitrov, Staab, Vechev, "Bayesian Framework for Gradient Leakage", ICLR
    2022, arXiv 2111.04706
    """

    needs = InversionAttack.needs | {"auxiliary"}

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-6,
        smoothness: float = 0.5,
        lr: float = 0.1,
        restarts: int = 1,
        samples: int = 1,
        labels: str = "llg",
        components: int = 16,
        noise: float = 0.1,
    ) -> None:
        if components < 1 or noise <= 0:
            raise UserError(
                f"oasis_inversion: expected components of at least 1 and noise above 0, got {components} and {noise}; "
                "write oasis_inversion(components=16, noise=0.1)"
            )
        self.steps = steps
        self.tv = tv
        self.smoothness = smoothness
        self.lr = lr
        self.restarts = restarts
        self.samples = samples
        self.labels = labels
        self.components = components
        self.noise = noise
        self.bayes = BayesAdaptive(
            steps=steps, tv=tv, smoothness=smoothness, lr=lr, restarts=restarts, samples=samples, labels=labels
        )

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Describe auxiliary images, of all classes and of each that has enough; see `described`."""
        images, labels = knowledge.auxiliary
        low, high = knowledge.bounds
        found = described(
            shrunk((images - low) / (high - low)), labels, knowledge.num_classes, self.components, self.noise
        )
        return super().prepare(knowledge) | {MODEL + name: value for name, value in found.items()}

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion for a task, started at usual images where there is OASIS."""
        inversion: Inversion = self.bayes.fitted(knowledge)
        return replace(inversion, space=Usual(spread=self.noise)) if _transforms(knowledge) else inversion

    def run(self, observation: Observation) -> Recovery:
        """Invert, then choose every image's turn; inputs (T, K * N, *input_shape)."""
        recovery = super().run(observation)
        choices = _choices(_transforms(observation))
        if len(choices) == 1 or recovery.inputs is None:
            return recovery
        model = {k.removeprefix(MODEL): v for k, v in observation.prepared.items() if k.startswith(MODEL)}
        found = torch.stack([turn(recovery.inputs) for turn in choices])
        low, high = observation.bounds
        points = shrunk(((found - low) / (high - low)).flatten(0, 2)).view(*found.shape[:3], -1)
        group = model["group"][self._classes(observation, recovery)]
        best = torch.stack([log_density(each, group, model) for each in points]).argmax(0)
        return replace(recovery, inputs=found.gather(0, best[None, ..., None, None, None].expand_as(found[:1]))[0])

    def _classes(self, observation: Observation, recovery: Recovery) -> Tensor:
        """Return the class (T, N) that every image was searched with; C where that is unknown."""
        try:
            return observation.labels
        except NotGranted:
            pass
        counts = recovery.label_counts
        if self.labels == "joint" or counts is None:
            unknown = torch.full((observation.trials, observation.total_inputs), observation.num_classes)
            return unknown.to(observation.model.device)
        classes = torch.arange(observation.num_classes, device=counts.device).repeat(len(counts))
        return classes.repeat_interleave(counts.sum(1).flatten()).view(len(counts), -1)


@dataclass(frozen=True, kw_only=True)
class Usual(Pixels):
    """Inputs that start around the mean auxiliary image of their class, and anywhere in further restarts.

    Args:
        spread: Standard deviation around the mean, in units of the pixel range.
    """

    spread: float

    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:
        """Return the start values."""
        shape = observation.input_spec.shape
        start = super().start(observation, restarts, count)["inputs"].view(-1, restarts, count, *shape)
        mean, group = (observation.prepared[MODEL + name] for name in ("mean", "group"))
        try:
            group = group[observation.labels]
        except NotGranted:
            group = group[-1].expand(len(start), count)
        low, high = observation.bounds
        usual = _restored(mean[group], shape).to(start.dtype)
        start[:, 0] = low + (high - low) * (usual + self.spread * start[:, 0])
        return {"inputs": start.flatten(0, 1)}


def described(points: Tensor, labels: Tensor, num_classes: int, components: int, noise: float) -> dict[str, Tensor]:
    """Return normal distributions of images: of all (the first), and of every class with enough of them.

    Args:
        points: (n, P) images in [0, 1].
        labels: (n,).
        num_classes: C.
        components: r, most principal components.
        noise: Standard deviation that is added to every pixel.

    Returns:
        For G distributions ``mean`` (G, P), ``directions`` (G, P, r), the ``variances`` (G, r) along them and of the
        ``rest`` (G,), noise included; and which one serves a class, ``group`` (C + 1,), unknown classes last.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    own = (counts >= FEWEST).nonzero().flatten()
    group = torch.zeros(num_classes + 1, dtype=torch.int64, device=points.device)
    group[own] = torch.arange(1, len(own) + 1, device=points.device)
    parts = []
    for part in [points, *(points[labels == each] for each in own)]:
        mean = part.mean(0)
        _, scales, directions = torch.linalg.svd(part - mean, full_matrices=False)
        variances = scales.square() / len(part)
        kept = max(1, min(components, len(part) // 2))
        rest = variances[kept:].sum() / max(1, part.shape[1] - kept) + noise**2
        pad = max(0, components - len(directions[:kept]))
        parts.append(
            (
                mean,
                F.pad(directions[:kept].T, (0, pad)),
                F.pad(variances[:kept], (0, pad)) + rest,
                rest,
            )
        )
    names = ("mean", "directions", "variances", "rest")
    return {n: torch.stack(v) for n, v in zip(names, zip(*parts, strict=True), strict=True)} | {"group": group}


def log_density(points: Tensor, group: Tensor, model: Mapping[str, Tensor]) -> Tensor:
    """Return the log-density (T, N) of images (T, N, P), less what depends on the distribution ``group`` (T, N) alone.

    Args:
        points: Images in [0, 1].
        group: Which distribution.
        model: See `described`.
    """
    result = points.new_zeros(group.shape)
    for each in torch.unique(group):
        here = group == each
        gap = points[here] - model["mean"][each]
        along = gap @ model["directions"][each]
        across = gap.square().sum(1) - along.square().sum(1)
        result[here] = -0.5 * (across / model["rest"][each] + (along.square() / model["variances"][each]).sum(1))
    return result


def shrunk(images: Tensor) -> Tensor:
    """Return images (n, C, H, W) in [0, 1] as points (n, P), of at most `SIDE` x `SIDE` pixels; others flat."""
    images = images.clamp(0, 1).double()
    if images.dim() == 4 and max(images.shape[-2:]) > SIDE:
        images = F.adaptive_avg_pool2d(images, (min(SIDE, images.shape[-2]), min(SIDE, images.shape[-1])))
    return images.flatten(1)


def _restored(points: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return points (T, N, P) as images (T, N, *shape), of the size they had before they were shrunk."""
    if points.shape[2] == math.prod(shape):
        return points.reshape(*points.shape[:2], *shape)
    small = points.reshape(-1, shape[0], *(min(SIDE, side) for side in shape[1:]))
    return F.interpolate(small, size=shape[1:], mode="bilinear").view(*points.shape[:2], *shape)


def _transforms(knowledge: Knowledge) -> str:
    """Return the transforms of OASIS in the defense; none where it is withheld or has none."""
    try:
        parts = [part.params() for part in knowledge.defense.parts if getattr(part, "name", "") == "oasis"]
    except NotGranted:
        return ""
    return str(parts[0]["transforms"]) if parts else ""


def _choices(transforms: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Return what may be done to an image without a change of the update; the first does nothing."""
    if transforms == "major_rotation":
        return tuple(partial(torch.rot90, k=turns, dims=(-2, -1)) for turns in range(4))
    if transforms == "flip":
        return torch.clone, partial(torch.flip, dims=(-1,))
    return (torch.clone,)

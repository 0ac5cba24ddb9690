"""Inverting Gradients, then undoing the transform of ATS that explains the found image best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from leakbench_baselines.defenses.ats import Step, brightness_of, offsets, parse_policies, shifted, smooth
from torch import Tensor

from leakbench import Knowledge, NotGranted, Observation, Recovery, UserError, register
from leakbench.inversion import InversionAttack, cosine_inversion

MODEL = "images/"
"""Leads the names of what describes images among what is prepared."""

Outcome = tuple[tuple[str, float], ...]
"""Operations that happened, in order, with their amounts."""


@register("ats_inversion", version=1)
class ATSInversion(InversionAttack):
    """ATS inversion: finds the transformed image as ``inverting_gradients`` does, then takes the transform back.

    What ATS may have done to an image is a short list: its policies, which transforms happened, and their directions.
    For each entry the found image is transformed back; what a shift moved out of sight is unknown then. A normal
    distribution of auxiliary images (principal components and equal noise on every pixel) tells how likely the result
    is, what a shift brought in must be black, and the likeliest entry is taken, unknown pixels being what the
    distribution expects beside the known ones.

    Sees: gradients of all layers, weights, number of inputs, auxiliary data; the defense, and labels where granted.
    Without the defense, or without ATS in it, nothing is taken back.

    A re-implementation: Balunović et al. show that plain inversion already recovers images through ATS early in
    training; taking the transform back is done here.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation.
        lr: Learning rate of Adam, as in ``inverting_gradients``.
        restarts: Random initialisations.
        labels: Label attack that runs first where labels are not granted.
        components: Most principal components.
        noise: Standard deviation of a found pixel around the true one, in units of the pixel range.

    Reference: Balunović, Dimitrov, Staab, Vechev, "Bayesian Framework for Gradient Leakage", ICLR 2022,
    arXiv 2111.04706
    """

    needs = InversionAttack.needs | {"auxiliary"}

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "llg",
        components: int = 64,
        noise: float = 0.1,
    ) -> None:
        if components < 1 or noise <= 0:
            raise UserError(
                f"ats_inversion: expected components of at least 1 and noise above 0, got {components} and {noise}; "
                "write ats_inversion(components=64, noise=0.1)"
            )
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.labels = labels
        self.components = components
        self.noise = noise
        self.inversion = cosine_inversion(steps=steps, tv=tv, lr=lr, restarts=restarts, labels=labels)

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Describe auxiliary images by mean (P,), components (P, r), variances (r,) and the rest's variance."""
        low, high = knowledge.bounds
        images = ((knowledge.auxiliary[0] - low) / (high - low)).double().flatten(1)
        mean = images.mean(0)
        _, scales, directions = torch.linalg.svd(images - mean, full_matrices=False)
        variances = scales.square() / len(images)
        kept = max(1, min(self.components, len(variances) - 1))
        rest = variances[kept:].sum() / max(1, images.shape[1] - kept)
        described = {
            "mean": mean,
            "directions": directions[:kept].T.contiguous(),
            "variances": variances[:kept].clamp(min=1e-8),
            "rest": rest[None],
        }
        return super().prepare(knowledge) | {MODEL + name: value for name, value in described.items()}

    def run(self, observation: Observation) -> Recovery:
        """Invert, then take the transform of every image back; inputs (T, K * N, *input_shape)."""
        recovery = super().run(observation)
        policies = _policies(observation)
        if not policies or recovery.inputs is None or len(observation.input_spec.shape) != 3:
            return recovery
        low, high = (bound.double() for bound in observation.bounds)
        found = ((recovery.inputs.double() - low) / (high - low)).clamp(0, 1)
        described = {k.removeprefix(MODEL): v for k, v in observation.prepared.items() if k.startswith(MODEL)}
        best, score = found, torch.full(found.shape[:2], -math.inf, dtype=found.dtype, device=found.device)
        for outcome, chance in _outcomes(policies):
            image, likelihood = self._explained(found, outcome, described)
            better = math.log(chance) + likelihood > score
            score = torch.where(better, math.log(chance) + likelihood, score)
            best = image.where(better[..., None, None, None], best)
        return replace(recovery, inputs=low + (high - low) * best.clamp(0, 1))

    def _explained(self, found: Tensor, outcome: Outcome, described: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return images (T, N, C, H, W) as they were before an outcome, and its log-likelihood (T, N)."""
        image, known, spread = found, torch.ones_like(found, dtype=torch.bool), 0.0
        off_black = torch.zeros_like(found[..., 0, 0, 0])
        for operation, amount in reversed(outcome):
            if operation.startswith("translate"):
                image, known, brought = _moved_back(image, known, operation, amount)
                off_black = off_black + brought
            elif operation == "sharpness":
                image = image - amount * (image - smooth(image))
            else:
                middle = torch.zeros_like(off_black)[..., None, None, None]
                middle = brightness_of(image) if operation == "contrast" else middle
                image = middle + (image - middle) / (1 + amount)
                spread += math.log1p(amount)
        variance = float(described["rest"]) + self.noise**2
        flat, seen = image.flatten(2), known.flatten(2)
        gap = (flat - described["mean"]) * seen
        # What is known depends on the outcome alone, so that one factorisation serves all images.
        mask = seen[0, 0].to(flat.dtype)
        directions, variances = described["directions"], described["variances"]
        inner = torch.diag(1 / variances) + directions.T @ (mask[:, None] * directions) / variance
        factor = torch.linalg.cholesky(inner)
        reach = gap @ directions / variance
        weights = torch.cholesky_solve(reach.flatten(0, 1).T, factor).T.view_as(reach)
        fit = gap.square().sum(2) / variance - (reach * weights).sum(2)
        volume = 2 * factor.diagonal().log().sum() + variances.log().sum() + mask.numel() * math.log(variance)
        likelihood = -0.5 * (fit + volume + off_black / self.noise**2) - spread * mask.sum()
        expected = described["mean"] + weights @ directions.T
        return torch.where(seen, flat, expected).view_as(found), likelihood


def _moved_back(image: Tensor, known: Tensor, operation: str, amount: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return images before a shift, what is known of them, and the squares (T, N) of what it brought in, summed."""
    turned = operation == "translate_y"
    image, known = (value.mT if turned else value for value in (image, known))
    offset = offsets(torch.full(image.shape[:2], amount, dtype=image.dtype, device=image.device), image.shape[-1])
    came_from_inside = shifted(torch.ones_like(image), offset)[1]
    brought = (image.square() * ~came_from_inside * known).sum((2, 3, 4))
    image, inside = shifted(image, -offset)
    known = shifted(known.to(image.dtype), -offset)[0].bool() & inside
    return (image.mT, known.mT, brought) if turned else (image, known, brought)


def _policies(knowledge: Knowledge) -> tuple[tuple[Step, ...], ...]:
    """Return the policies of ATS in the defense, where it is granted and among its parts."""
    try:
        parts = [part.params() for part in knowledge.defense.parts if getattr(part, "name", "") == "ats"]
    except NotGranted:
        return ()
    if not parts:
        return ()
    found: tuple[tuple[Step, ...], ...] = parse_policies(str(parts[0]["policies"]), always=bool(parts[0]["always"]))
    return found


def _outcomes(policies: tuple[tuple[Step, ...], ...]) -> Iterator[tuple[Outcome, float]]:
    """Give everything that policies can do to an image, with its probability."""
    for steps in policies:
        for ways in itertools.product((0, -1, 1), repeat=len(steps)):
            chance = 1 / len(policies)
            for step, way in zip(steps, ways, strict=True):
                chance *= step.probability / 2 if way else 1 - step.probability
            if chance > 0:
                pairs = zip(steps, ways, strict=True)
                yield tuple((step.operation, way * step.magnitude) for step, way in pairs if way), chance

"""Inverting Gradients through dropout, whose masks are read off the last layer's gradient or searched for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, Model, NotGranted, Observation, UserError, register
from leakbench.inversion import (
    Adam,
    Comparison,
    Cosine,
    Inversion,
    InversionAttack,
    Objective,
    Pixels,
    Rows,
    Source,
    TotalVariation,
)

TOLERANCE = 1e-3
"""Below it, next to an example's largest feature, a feature that was read counts as dropped."""


@register("dropout_inversion", version=1)
class DropoutInversion(InversionAttack):
    """Dropout inversion (DIA): matches the direction of the gradient, the masks being known or searched as well.

    The gradient of the last layer's weights is a sum over examples of (p - y) h^T, h being what dropout left of the
    features. Of one example, the columns of dropped features vanish. Of fewer examples than classes and features that
    are never negative, a feature that a single example kept has a column in the direction of that example's p - y;
    these are the corners of what all columns span (found by successive projection), and solving for h by them gives
    every example's mask. An answer that does not explain the gradient, or by negative features, is not used.

    Where masks cannot be read, they are relaxed to [0, 1] and optimised along with the inputs, their means being drawn
    to 1 - p. The first restart's start there, others' at random masks.

    Sees: gradients of all layers, weights, number of inputs, the defense's ``p``; labels where granted. Without
    dropout, or without the defense, it is ``inverting_gradients``. Several local steps are matched by one gradient.

    A re-implementation: of the paper the summary alone was at hand; that masks are relaxed and drawn to their rate is
    from memory, reading them off is done here.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation.
        lr: Learning rate of Adam, as in ``inverting_gradients``.
        restarts: Random initialisations, of inputs and of masks.
        labels: Label attack that runs first where labels are not granted.
        masks: ``read`` where they can be, else ``searched``; or always ``searched``.
        mask_lr: Learning rate of Adam for searched masks.
        rate: Weight of the squared distance of a searched mask's mean from 1 - p.

    Reference: Scheliga, Mäder, Seeland, "Dropout is NOT All You Need to Prevent Gradient Leakage", AAAI 2023,
    arXiv 2208.06163
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "llg",
        masks: str = "read",
        mask_lr: float = 0.1,
        rate: float = 0.1,
    ) -> None:
        if masks not in ("read", "searched"):
            raise UserError(f"dropout_inversion: masks: expected read or searched, got {masks!r}; write masks='read'")
        if mask_lr <= 0 or rate < 0:
            raise UserError(
                f"dropout_inversion: expected mask_lr above 0 and rate of at least 0, got {mask_lr} and {rate}; "
                "write dropout_inversion(mask_lr=0.1, rate=0.1)"
            )
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.labels = labels
        self.masks = masks
        self.mask_lr = mask_lr
        self.rate = rate
        self.inversion = Inversion(
            objective=Cosine(),
            priors=(TotalVariation(weight=tv),),
            optimiser=Adam(lr=lr, rates={"kept": mask_lr}, sign="hard", schedule="steps"),
            steps=steps,
            restarts=restarts,
            labels=labels,
        )

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion through dropout, where there is any."""
        p, model = _rate(knowledge), knowledge.model
        if p == 0 or not model.head_is_last:
            return self.inversion
        size = model.parameters[f"{model.head}.weight"].shape[2]
        return replace(
            self.inversion,
            objective=Kept(p=p, weight=self.rate),
            space=PixelsAndMasks(p=p, size=size),
            source=ThroughDropout(p=p, read=self.masks == "read" and _readable(knowledge)),
        )


def _rate(knowledge: Knowledge) -> float:
    """Return p, 0 where there is no dropout or the defense is withheld."""
    try:
        found = [part.params()["p"] for part in knowledge.defense.parts if getattr(part, "name", "") == "dropout"]
    except NotGranted:
        return 0.0
    return float(found[0]) if found else 0.0


def _readable(knowledge: Knowledge) -> bool:
    """Whether masks may show: one gradient, and one example or few and features of one sign."""
    once = knowledge.sends == "gradient" or (knowledge.grants("local_steps") and knowledge.local_steps == 1)
    few = knowledge.total_inputs < knowledge.num_classes and bool(knowledge.model.nonnegative_features)
    return once and (knowledge.total_inputs == 1 or few)


@dataclass(frozen=True, kw_only=True)
class Kept(Objective):
    """The cosine, and the squared distance of masks' means from 1 - p; candidates are chosen by the cosine alone.

    Args:
        p: Probability that a feature is dropped.
        weight: Of the distance.
    """

    p: float
    weight: float

    elementwise = Cosine.elementwise

    @property
    def judge(self) -> Objective:
        """The cosine."""
        return Cosine()

    def __call__(self, comparison: Comparison, unknowns: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of every row, (Q,)."""
        off = unknowns["kept"].mean(2) - (1 - self.p)
        return Cosine()(comparison, unknowns) + self.weight * off.square().mean(1)


@dataclass(frozen=True, kw_only=True)
class PixelsAndMasks(Pixels):
    """Inputs, and the share (Q, N, d) of every feature that is kept.

    Args:
        p: Probability that a feature is dropped.
        size: d, inputs of the last layer.
    """

    p: float
    size: int

    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:
        """Return the start values: masks at 1 - p in the first restart, random ones in the others."""
        kept = (observation.rand(restarts, count, self.size) >= self.p).to(observation.model.dtype)
        kept[:, 0] = 1 - self.p
        return super().start(observation, restarts, count) | {"kept": kept.flatten(0, 1)}

    def project(self, leaves: Mapping[str, Tensor], bounds: tuple[Tensor, Tensor]) -> None:
        """Clamp."""
        super().project(leaves, bounds)
        with torch.no_grad():
            leaves["kept"].clamp_(0, 1)


@dataclass(frozen=True, kw_only=True)
class ThroughDropout(Source):
    """The gradient of all inputs at the weights that were sent out, through dropout with given masks.

    Args:
        p: Probability that a feature is dropped.
        read: Whether masks that show in the update are taken from there.
    """

    p: float
    read: bool

    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `Source.gradients`."""
        seen, kept = rows.observation, unknowns["kept"]
        head = f"{rows.model.head}.weight"
        if self.read and labels.dim() == 2 and head in rows.target:
            masks, certain = read_masks(rows.target[head], labels)
            kept = torch.where(certain[:, None, None], masks.to(kept.dtype), kept)
        return masked_gradients(
            rows.model,
            inputs,
            labels,
            kept / (1 - self.p),
            names=list(rows.target),
            train=seen.examples_interact,
            mean=seen.reduction == "mean",
        )


def read_masks(gradient: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return who kept which feature, (T, B, d), and whether that is certain, (T,).

    Args:
        gradient: (T, C, d) of the last layer's weights, in any unit.
        labels: (T, B), B below C.
    """
    top = gradient.abs().amax((1, 2), keepdim=True)
    columns = (gradient.double() / top.where(top > 0, 1).double()).nan_to_num(0, 0, 0)
    count = labels.shape[1]
    # p - y is negative at the example's own class alone, so that this is positive for every column.
    present = F.one_hot(labels, columns.shape[1]).amax(1).to(columns.dtype)
    height = -torch.einsum("tc,tcd->td", present, columns)
    usable = height > TOLERANCE * height.amax(1, keepdim=True)
    points = columns / height.where(usable, 1)[:, None] * usable[:, None]
    left, corners = points, []
    for _ in range(count):
        farthest = left.square().sum(1).argmax(1)[:, None, None].expand(-1, columns.shape[1], 1)
        corners.append(points.gather(2, farthest)[..., 0])
        axis = F.normalize(left.gather(2, farthest)[..., 0], dim=1)
        left = left - axis[..., None] * torch.einsum("tc,tcd->td", axis, left)[:, None]
    rays = torch.stack(corners, 2)
    own = rays.argmin(1)
    order = own.argsort(dim=1, stable=True).gather(1, labels.argsort(dim=1, stable=True).argsort(dim=1))
    rays = rays.gather(2, order[:, None].expand_as(rays))
    features = torch.linalg.pinv(rays) @ columns
    largest = features.abs().amax(2, keepdim=True)
    masks = features.abs() > TOLERANCE * largest
    residual = torch.linalg.vector_norm(columns - rays @ features, dim=(1, 2))
    explained = residual <= TOLERANCE * torch.linalg.vector_norm(columns, dim=(1, 2))
    # Wrong corners leave columns outside of what they span; of one example there is no choice of a corner.
    inside = (features >= -TOLERANCE * largest).all(2).all(1) | (count == 1)
    named = (own.gather(1, order) == labels).all(1)
    return masks, explained & inside & named & masks.any(2).all(1)


def masked_gradients(
    model: Model, inputs: Tensor, labels: Tensor, kept: Tensor, *, names: list[str], train: bool, mean: bool
) -> dict[str, Tensor]:
    """Return the differentiable gradients (T, *shape) by name of T clients, each feature times what is given.

    Args:
        model: M = 1 or T; its last linear layer returns the logits.
        inputs: (T, B, *input_shape).
        labels: (T, B), or soft (T, B, C).
        kept: (T, B, d).
        names: Parameters to differentiate.
        train: Whether BatchNorm normalises by the batch.
        mean: Whether the loss is the mean over the batch, else the sum.
    """
    with torch.enable_grad():
        # Every trial needs its own copy of the weights, so that one backward pass keeps the trials apart.
        own = {n: model.parameters[n].expand(len(inputs), *model.parameters[n].shape[1:]) for n in names}
        own = {n: v if v.requires_grad else v.detach().requires_grad_() for n, v in own.items()}
        model = model.with_state(own)
        _, features, _ = model.run(inputs, batch_norm="train" if train else "eval")
        logits = torch.einsum("tbd,tcd->tbc", features * kept, model.parameters[f"{model.head}.weight"])
        if model.has_head_bias:
            logits = logits + model.parameters[f"{model.head}.bias"][:, None]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none")
        loss = losses.sum() / (labels.shape[1] if mean else 1)
        found = torch.autograd.grad(
            loss, list(own.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
    return dict(zip(names, found, strict=True))

"""GradViT: images of a vision transformer's batch, with a prior on the borders between patches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from leakbench import Knowledge, NotApplicable, UserError, register
from leakbench.inversion import Adam, Inversion, InversionAttack, L2Norm, Rows, SquaredL2, TotalVariation, Weighted


@register("gradvit", version=1)
class GradViT(InversionAttack):
    """GradViT: layer-wise L2 distance of gradients, with priors on patch borders, total variation and norm.

    A transformer sees an image as patches, which the gradients hold together only by the position embedding; the prior
    on their borders makes neighbors fit: the differences of the pixels on either side should be small.

    Sees: gradients of all layers, weights, number of inputs; learning rate and number of local steps of an update; a
    vision transformer as in timm, with a position embedding (others are declined); labels where granted.

    A re-implementation: the paper's prior from the BatchNorm statistics of another, self-supervised ResNet-50 is left
    out, as no such net is granted; the weights of the other priors are chosen here. As in the paper the first half of
    the steps matches gradients only; the iterate with the least objective is sought in the second half.

    Args:
        steps: Iterations; the paper takes 120,000.
        gradient: Weight of the distance of gradients, a sum of norms.
        borders: Weight of the prior on patch borders.
        tv: Weight of the total variation.
        l2: Weight of the inputs' norm.
        lr: Learning rate of Adam; falls to 0 along a cosine.
        restarts: Random starts.
        labels: Label attack that runs first where labels are not granted.

    Reference: Hatamizadeh, Yin, Roth, Li, Kautz, Xu, Molchanov, "GradViT: Gradient Inversion of Vision Transformers",
    CVPR 2022, arXiv 2203.11894
    """

    def __init__(
        self,
        *,
        steps: int = 20000,
        gradient: float = 1.0,
        borders: float = 1e-4,
        tv: float = 1e-4,
        l2: float = 1e-6,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "gradinversion_labels",
    ) -> None:
        if borders < 0:
            raise UserError(f"gradvit: borders: expected at least 0, got {borders}; write gradvit(borders=1e-4)")
        self.steps, self.restarts, self.labels, self.lr = steps, restarts, labels, lr
        self.gradient, self.borders, self.tv, self.l2 = gradient, borders, tv, l2
        self.inversion = Inversion(
            objective=SquaredL2(scale=gradient, root=True),
            priors=(TotalVariation(weight=tv), L2Norm(weight=l2)),
            optimiser=Adam(lr=lr, schedule="cosine"),
            steps=steps,
            restarts=restarts,
            late=0.5,
            labels=labels,
        )

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion for a task; decline nets that are no vision transformers with a position embedding."""
        if "pos_embed" not in knowledge.model.parameters:
            raise NotApplicable("no vision transformer as in timm: it has no parameter 'pos_embed'")
        borders = PatchBorders(weight=self.borders, size=patch_size(knowledge))
        return replace(self.inversion, priors=(*self.inversion.priors, borders))


@dataclass(frozen=True, kw_only=True)
class PatchBorders(Weighted):
    """Sum over the lines between patches of the L2 norm of the difference across them, averaged over the batch.

    Args:
        weight: Factor.
        size: Height and width of a patch.
    """

    size: tuple[int, int]

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        """Return the penalty (Q,) of inputs (Q, N, channels, height, width)."""
        down, right = self.size
        across = inputs.diff(dim=-2)[..., down - 1 :: down, :].movedim(-2, 2)
        along = inputs.diff(dim=-1)[..., right - 1 :: right].movedim(-1, 2)
        # A norm has no derivative at 0.
        norms = [lines.flatten(3).square().sum(3).add(1e-12).sqrt().sum(2) for lines in (across, along)]
        return self.weight * torch.stack(norms).sum(0).mean(1)


def patch_size(knowledge: Knowledge) -> tuple[int, int]:
    """Return height and width of a patch.

    Raises:
        NotApplicable: Patches are not projected by a convolution.
    """
    modules = dict(knowledge.model.module.named_modules())
    projection = modules.get("patch_embed.proj")
    if not isinstance(projection, nn.Conv2d):
        raise NotApplicable("patches are not projected by a convolution, as in timm")
    down, right = projection.stride
    return down, right

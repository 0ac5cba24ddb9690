"""GradInversion: images of a batch by matching gradients and the statistics of BatchNorm layers."""

from __future__ import annotations

from dataclasses import replace

from leakbench import Knowledge, register
from leakbench.inversion import (
    Adam,
    BatchNormStatistics,
    GroupConsistency,
    Inversion,
    InversionAttack,
    L2Norm,
    SquaredL2,
    TotalVariation,
)


@register("gradinversion", version=1)
class GradInversion(InversionAttack):
    """GradInversion: layer-wise L2 distance of gradients, BatchNorm statistics, and restarts that agree.

    Means and variances of what enters the BatchNorm layers are drawn to the statistics that the threat model grants;
    several starts run together and each is drawn to the mean of all; normal noise is added to the inputs' gradient
    (Langevin); total variation and norm are small. The start with the least distance of gradients is claimed.

    Sees: gradients of all layers, weights, number of inputs; learning rate and number of local steps of an update;
    BatchNorm statistics where there are such layers and they are granted, elsewhere the attack goes on without them;
    labels where granted.

    A re-implementation: no registration of the starts onto each other before they are averaged (the paper aligns them
    with RANSAC-flow). The gradient weighs 1, not 1e-3 as reported for the paper's ResNet-50 at 224x224: a smaller
    weight leaves the images of small nets to noise and priors (8.8 against 12.3 dB for two of CIFAR-10 behind LeNet).
    The running statistics of a net that was never trained say nothing: set their weight to 0 there.

    Args:
        steps: Iterations.
        groups: Starts that are drawn to their mean and count as restarts.
        gradient: Weight of the distance of gradients, a sum of norms.
        batch_norm: Weight of the BatchNorm statistics; those of the first layer count ten times.
        tv: Weight of the total variation.
        l2: Weight of the inputs' norm.
        group: Weight of the distance from the groups' mean.
        noise: Standard deviation of the noise in units of the step size; that of the library ``breaching``.
        lr: Learning rate of Adam; rises for 50 steps, then falls to 0 along a cosine.
        labels: Label attack that runs first where labels are not granted.

    Reference: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, "See through Gradients: Image Batch Recovery via
    GradInversion", CVPR 2021, arXiv 2104.07586
    """

    def __init__(
        self,
        *,
        steps: int = 20000,
        groups: int = 8,
        gradient: float = 1.0,
        batch_norm: float = 0.1,
        tv: float = 1e-4,
        l2: float = 1e-6,
        group: float = 0.01,
        noise: float = 0.01,
        lr: float = 0.1,
        labels: str = "gradinversion_labels",
    ) -> None:
        self.steps, self.groups, self.labels, self.lr, self.noise = steps, groups, labels, lr, noise
        self.gradient, self.batch_norm, self.tv, self.l2, self.group = gradient, batch_norm, tv, l2, group
        self.statistics = BatchNormStatistics(weight=batch_norm, first=10)
        self.inversion = Inversion(
            objective=SquaredL2(scale=gradient, root=True),
            priors=(TotalVariation(weight=tv), L2Norm(weight=l2), GroupConsistency(weight=group)),
            optimiser=Adam(lr=lr, schedule="cosine", warmup=50),
            steps=steps,
            restarts=groups,
            noise=noise,
            labels=labels,
        )

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion for a task, with the BatchNorm prior where there is something to draw to."""
        if not knowledge.model.has_batch_norm or not knowledge.grants("bn_statistics"):
            return self.inversion
        return replace(self.inversion, priors=(*self.inversion.priors, self.statistics))

"""The ``modern`` configuration of the library breaching: Inverting Gradients with later refinements."""

from __future__ import annotations

from leakbench import register
from leakbench.inversion import Adam, Cosine, FeatureMatch, Inversion, InversionAttack, Pixels, TotalVariation


@register("breaching_modern", version=1)
class BreachingModern(InversionAttack):
    """breaching's ``modern``: cosine distance, soft-signed Adam, color-aware total variation, feature matching.

    Against Inverting Gradients: the gradient's sign is softened, ever more towards the end; the learning rate rises for
    50 steps and falls to 0 along a cosine; inputs start from a tile of 4x4 random pixels; the total variation is
    isotropic and also asks that color channels change together; what enters the last layer is drawn to the quotient
    of that layer's weight and bias gradients, which for a class that occurs once nearly is its feature vector.

    Sees: gradients of all layers, weights, number of inputs; a last layer with a bias (others are declined); labels
    where granted. Nothing depends on the scale of the update, so where labels are granted the learning rate of local
    steps may be unknown; the default label attack needs it.

    Keeps the iterate with the least objective; the library keeps the one that follows it. A start is tiled from normal
    pixels of every channel, as there.

    Args:
        steps: Iterations.
        tv: Weight of the total variation.
        features: Weight of the feature matching.
        lr: Learning rate of Adam.
        restarts: Random starts.
        labels: Label attack that runs first where labels are not granted.

    Reference: none; a library, Geiping and others, github.com/JonasGeiping/breaching, its attack ``modern``
    """

    def __init__(
        self,
        *,
        steps: int = 24000,
        tv: float = 0.1,
        features: float = 0.1,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "bias_count",
    ) -> None:
        self.steps, self.restarts, self.labels = steps, restarts, labels
        self.tv, self.features, self.lr = tv, features, lr
        self.inversion = Inversion(
            objective=Cosine(),
            priors=(TotalVariation(weight=tv, p=2, q=0.5, opponents=True), FeatureMatch(weight=features)),
            optimiser=Adam(lr=lr, sign="soft", schedule="cosine", warmup=50),
            steps=steps,
            restarts=restarts,
            space=Pixels(init="patterned"),
            labels=labels,
        )

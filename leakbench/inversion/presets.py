"""Inversions that several attacks share."""

from __future__ import annotations

from leakbench.inversion.engine import Inversion
from leakbench.inversion.objectives import Cosine
from leakbench.inversion.optimisers import Adam
from leakbench.inversion.priors import TotalVariation
from leakbench.inversion.sources import OneStep, Source


def cosine_inversion(
    *, steps: int, tv: float, lr: float, restarts: int, labels: str, source: Source | None = None
) -> Inversion:
    """Return the search of Inverting Gradients: cosine and total variation, by Adam on the gradient's sign.

    Args:
        steps: Iterations.
        tv: Weight of the total variation.
        lr: Learning rate, a tenth after 3/8, 5/8 and 7/8 of the steps.
        restarts: Random initialisations.
        labels: Label attack that runs first where labels are not granted.
        source: Where the candidates' gradients come from; one step at the weights sent out where None.

    Source: Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020, arXiv 2003.14053
    """
    return Inversion(
        objective=Cosine(),
        priors=(TotalVariation(weight=tv),),
        optimiser=Adam(lr=lr, sign="hard", schedule="steps"),
        steps=steps,
        restarts=restarts,
        labels=labels,
        source=source or OneStep(),
    )

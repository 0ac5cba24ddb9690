"""Inverting Gradients: images by matching the direction of the gradient."""

from __future__ import annotations

from leakbench import register
from leakbench.inversion import (
    InversionAttack,
    OneStep,
    Unrolled,
    cosine_inversion,
)


@register("inverting_gradients", version=3)
class InvertingGradients(InversionAttack):
    """Inverting Gradients: cosine distance between gradients plus total variation, by Adam on the gradient's sign.

    The distance is one cosine over all layers; images stay within the valid pixel values; the learning rate falls to a
    tenth at 3/8, 5/8 and 7/8 of the steps; of several restarts the one with the least distance is claimed. The iterate
    with the least objective is kept, where the paper's code takes the last one.

    Sees: gradients of all layers, weights, number of inputs; labels where granted. An update after several local steps
    is matched by the gradient of all its inputs at the weights sent out (a direction needs no learning rate), or, with
    ``unroll``, by the client's own local steps, differentiated through: the paper's attack on FedAvg, which knows the
    learning rate and the number of steps, and takes the batches in order unless it is granted the true one.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier. The default is that of
            the paper's library.
        tv: Weight of the total variation. The default is that of the paper's ``reconstruct_image.py``; its library's
            0.1 is for 224x224 images and flattens 8x8 ones below the mean image (8.9 against 11.3 dB on digits).
        lr: Learning rate of Adam.
        restarts: Random initialisations.
        labels: Label attack that runs first where labels are not granted; its default is iDLG's rule for one input.
        unroll: Whether local steps are simulated.

    Reference: Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients - How easy is it to break privacy in
    federated learning?", NeurIPS 2020, arXiv 2003.14053
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "llg",
        unroll: bool = False,
    ) -> None:
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.labels = labels
        self.unroll = unroll
        self.inversion = cosine_inversion(
            steps=steps, tv=tv, lr=lr, restarts=restarts, labels=labels, source=Unrolled() if unroll else OneStep()
        )

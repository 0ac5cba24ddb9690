"""Deep Leakage from Gradients: inputs and labels whose gradient equals the one that was sent."""

from __future__ import annotations

from leakbench import register
from leakbench.inversion import LBFGS, Inversion, InversionAttack, Pixels, SquaredL2


@register("dlg", version=1)
class DLG(InversionAttack):
    """DLG: squared distance of the gradients, minimised over inputs and soft labels by L-BFGS from normal noise.

    No prior and no box, as in the paper's code; the iterate and the restart with the least distance are claimed, where
    the code takes the last one of a single start, which for many seeds diverges. A batch is optimised as a whole, where
    the paper updates one input of it at a time.

    Sees: gradients of all layers, weights, number of inputs; learning rate and number of local steps of an update.

    Args:
        steps: Outer iterations of L-BFGS, 20 evaluations each; the default is the code's.
        restarts: Random starts.
        labels: ``joint`` as in the paper, or a label attack that runs first where labels are not granted.
        stop: Distance below which a start rests.

    Reference: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935
    """

    recovers = frozenset({"inputs", "labels"})

    def __init__(
        self, *, steps: int = 300, restarts: int = 1, labels: str = "joint", stop: float | None = 1e-9
    ) -> None:
        self.steps = steps
        self.restarts = restarts
        self.labels = labels
        self.stop = stop
        self.inversion = Inversion(
            objective=SquaredL2(),
            steps=steps,
            restarts=restarts,
            optimiser=LBFGS(),
            space=Pixels(box=False),
            labels=labels,
            stop=stop,
        )

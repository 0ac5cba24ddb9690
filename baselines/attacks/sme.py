"""SME: the inputs of many local steps from one gradient between the weights before and after."""

from __future__ import annotations

from leakbench import UserError, register
from leakbench.inversion import Adam, Cosine, Inversion, InversionAttack, Surrogate, TotalVariation


@register("sme", version=1)
class SME(InversionAttack):
    """SME: an update after many local steps, matched by one gradient at weights between those before and after.

    The local steps sum gradients along a path; a point (1 - alpha) W_t + alpha W_t+1 on the straight line between its
    ends stands for all of it. The cosine distance of the gradient of all inputs at that point to the update is
    minimised over inputs and alpha, which costs as much per iteration as one local step. Neither the learning rate nor
    the number of steps nor the order of the batches is used.

    Sees: weights before and after, or their difference; number of inputs; labels where granted. A single gradient has
    no weights after it: such tasks are declined.

    The iterate with the least objective is kept, where the paper's code takes the last one.

    Args:
        steps: Iterations.
        lr: Learning rate of Adam on the inputs; like that of alpha it falls to a tenth at 3/8, 5/8 and 7/8 of them.
        alpha: Where alpha starts, from 0 (the gradient at the weights that were sent out) to 1.
        alpha_lr: Learning rate of Adam on alpha.
        tv: Weight of the total variation; the paper's 0.01 is that of half of what is meant here.
        restarts: Random starts.
        labels: Label attack that runs first where labels are not granted, as the paper assumes.

    Reference: Zhu, Yao, Blaschko, "Surrogate Model Extension (SME): A Fast and Accurate Weight Update Attack on
    Federated Learning", ICML 2023, arXiv 2306.00127
    """

    def __init__(
        self,
        *,
        steps: int = 1000,
        lr: float = 1.0,
        alpha: float = 0.5,
        alpha_lr: float = 1e-3,
        tv: float = 5e-3,
        restarts: int = 1,
        labels: str = "llg",
    ) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(f"sme: alpha: expected 0 <= alpha <= 1, got {alpha}; write sme(alpha=0.5)")
        self.steps, self.restarts, self.labels = steps, restarts, labels
        self.lr, self.alpha, self.alpha_lr, self.tv = lr, alpha, alpha_lr, tv
        self.inversion = Inversion(
            objective=Cosine(),
            priors=(TotalVariation(weight=tv),),
            optimiser=Adam(lr=lr, rates={"alpha": alpha_lr}, schedule="steps"),
            steps=steps,
            restarts=restarts,
            source=Surrogate(alpha=alpha),
            labels=labels,
        )

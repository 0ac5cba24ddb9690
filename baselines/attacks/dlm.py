"""Deep Leakage from Model: inputs from the weights before and after local training, their scale optimised as well."""

from __future__ import annotations

from leakbench_baselines.attacks.dlm_plus import dlm_optimiser

from leakbench import UserError, register
from leakbench.inversion import Inversion, InversionAttack, JointScale, Pixels


@register("dlm", version=1)
class DLM(InversionAttack):
    """DLM: squared distance between the gradient and k times the weight change; k is optimised with inputs and labels.

    The true k is one over the learning rate (for one local step). k = 0 with a label that the net predicts anyway makes
    the distance vanish for any input whatever (`log_scale` avoids it), so the iterate and the restart are chosen by
    DLM+'s distance, which knows no scale; the k of the claim is recorded. With labels that are optimised too k means
    little: a less certain label makes a longer gradient. Re-implementation of the objective in the authors' code; no
    prior, no box.

    Sees: the change of all weights in one or more local steps, weights, number of inputs; no learning rate.

    Args:
        scale: Where k starts; the authors sweep 60, 80, ..., 240.
        log_scale: Whether log k is optimised instead of k.
        steps: Iterations; the default is the code's for LeNet (L-BFGS: 20 evaluations each). For its MLP: 5,000 of Adam
            at lr 0.1.
        optimiser: ``lbfgs`` (LeNet) or ``adam`` (MLP).
        lr: Step size of the optimiser.
        labels: ``joint`` as in the code; a label attack is for tasks that do not grant them.
        restarts: Random starts.

    Reference: Zhao, Luo, Ding, "Deep Leakage from Model in Federated Learning", CPAL 2024, arXiv 2206.04887
    """

    recovers = frozenset({"inputs", "labels"})

    def __init__(
        self,
        *,
        scale: float = 200.0,
        log_scale: bool = False,
        steps: int = 200,
        optimiser: str = "lbfgs",
        lr: float = 1.0,
        labels: str = "joint",
        restarts: int = 1,
    ) -> None:
        if scale <= 0:
            raise UserError(f"dlm: expected a positive scale such as 1 / (learning rate), got {scale}")
        self.scale = scale
        self.log_scale = log_scale
        self.steps = steps
        self.optimiser = optimiser
        self.lr = lr
        self.labels = labels
        self.restarts = restarts
        self.inversion = Inversion(
            objective=JointScale(scale=scale, log=log_scale),
            steps=steps,
            restarts=restarts,
            optimiser=dlm_optimiser(optimiser, lr),
            space=Pixels(box=False),
            labels=labels,
        )

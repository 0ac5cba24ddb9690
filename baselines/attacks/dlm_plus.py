"""DLM+: inputs from the weights before and after local training, without their scale."""

from __future__ import annotations

from leakbench import UserError, register
from leakbench.inversion import LBFGS, Adam, Inversion, InversionAttack, MeanNorm, Optimiser, Pixels


def dlm_optimiser(name: str, lr: float) -> Optimiser:
    """Return what DLM's code uses: ``lbfgs`` for its LeNet, ``adam`` for its MLP.

    Raises:
        UserError: Neither is named.
    """
    if name not in ("lbfgs", "adam"):
        raise UserError(f"optimiser: expected 'lbfgs' (for LeNet) or 'adam' (for an MLP), got {name!r}")
    return LBFGS(lr=lr) if name == "lbfgs" else Adam(lr=lr)


@register("dlm_plus", version=1)
class DLMPlus(InversionAttack):
    """DLM+: distance of gradient and weight change, each divided by the mean of its layers' norms.

    One local step changes the weights by the gradient times the learning rate; the division cancels it, whatever it is.
    Re-implementation of the objective in the authors' code, with the weights' own tensors as layers; no prior, no box.

    Sees: the change of all weights in one or more local steps, weights, number of inputs; no learning rate.

    Args:
        steps: Iterations; the default is the code's for LeNet (L-BFGS: 20 evaluations each). For its MLP: 5,000 of Adam
            at lr 0.01.
        optimiser: ``lbfgs`` (LeNet) or ``adam`` (MLP).
        lr: Step size of the optimiser.
        labels: ``joint`` optimises them too, as in the code's runs with defenses; a label attack is for tasks that do
            not grant them.
        restarts: Random starts; the one with the least distance is claimed.
        stop: Distance below which a start rests.

    Reference: Zhao, Luo, Ding, "Deep Leakage from Model in Federated Learning", CPAL 2024, arXiv 2206.04887
    """

    recovers = frozenset({"inputs", "labels"})

    def __init__(
        self,
        *,
        steps: int = 200,
        optimiser: str = "lbfgs",
        lr: float = 1.0,
        labels: str = "joint",
        restarts: int = 1,
        stop: float | None = 1e-9,
    ) -> None:
        self.steps = steps
        self.optimiser = optimiser
        self.lr = lr
        self.labels = labels
        self.restarts = restarts
        self.stop = stop
        self.inversion = Inversion(
            objective=MeanNorm(),
            steps=steps,
            restarts=restarts,
            optimiser=dlm_optimiser(optimiser, lr),
            space=Pixels(box=False),
            labels=labels,
            stop=stop,
        )

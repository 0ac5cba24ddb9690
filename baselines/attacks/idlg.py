"""iDLG: the sign rule for labels with its extension to batches, and the inversion with that label."""

from __future__ import annotations

from leakbench_baselines.attacks.llg import head_rows
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, Observation, Recovery, register
from leakbench.inversion import LBFGS, Inversion, InversionAttack, Pixels, SquaredL2


@register("idlg", version=2)
class IDLG(InversionAttack):
    """iDLG: the label of a single example is the class with the least row sum of the last layer's weight gradient.

    With non-negative features that is the only negative row, as softmax minus one-hot label is negative for the label
    alone. Of more examples, every class with a negative row sum is named once, as in iLRG's comparison; how often it
    occurs is not asked. Nothing depends on the scale of the update, so for labels the learning rate may be unknown.

    Where inputs are asked for, they are searched with that label by L-BFGS on the squared distance of the gradients,
    without prior or box. The iterate and the restart with the least distance are claimed.

    Sees: gradient of the last layer's weight, or its change over local steps; number of inputs behind the update. For
    inputs: all layers' gradients, weights, and the learning rate of an update.

    Args:
        steps: Outer iterations of L-BFGS, 20 evaluations each; the default is the code's.
        restarts: Random starts.
        stop: Distance below which a start rests; the default is the code's.

    Reference: Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", arXiv 2001.02610; for batches: Ma,
    Sun, Cui, Li, Guan, Liu, "Instance-wise Batch Label Restoration via Gradients in Federated Learning", ICLR 2023
    """

    recovers = frozenset({"labels", "inputs"})
    reads = ("labels:head.weight", "inputs:*")

    def __init__(self, *, steps: int = 300, restarts: int = 1, stop: float | None = 1e-6) -> None:
        self.steps = steps
        self.restarts = restarts
        self.stop = stop
        self.inversion = Inversion(
            objective=SquaredL2(),
            steps=steps,
            restarts=restarts,
            optimiser=LBFGS(),
            space=Pixels(box=False),
            labels="idlg",
            stop=stop,
        )

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline inputs of which the update's scale is unknown."""
        return super().prepare(knowledge) if knowledge.target == "inputs" else {}

    def run(self, observation: Observation) -> Recovery:
        """Return label counts (T, 1, C), none above 1, or inputs (T, K * N, *input_shape)."""
        if observation.target == "inputs":
            return super().run(observation)
        g = head_rows(observation).sum(-1)
        single = observation.total_inputs == 1
        counts = F.one_hot(g.argmin(1), observation.num_classes) if single else (g < 0).long()
        return Recovery(label_counts=counts[:, None])

"""iDLG's sign rule, and its extension to batches."""

from __future__ import annotations

from leakbench_baselines.attacks.llg import head_rows
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Observation, Recovery, register


@register("idlg", version=1)
class IDLG(Attack):
    """iDLG: the label of a single example is the class with the least row sum of the last layer's weight gradient.

    With non-negative features that is the only negative row, as softmax minus one-hot label is negative for the label
    alone. Of more examples, every class with a negative row sum is named once, as in iLRG's comparison; how often it
    occurs is not asked. Nothing depends on the scale of the update, so the learning rate may be unknown.

    Sees: gradient of the last layer's weight, or its change over local steps; number of inputs behind the update.

    Reference: Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", arXiv 2001.02610; for batches: Ma,
    Sun, Cui, Li, Guan, Liu, "Instance-wise Batch Label Restoration via Gradients in Federated Learning", ICLR 2023
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "weights"})
    reads = ("head.weight",)

    def run(self, observation: Observation) -> Recovery:
        """Return label counts (T, 1, C), none above 1."""
        g = head_rows(observation).sum(-1)
        if observation.inputs_per_client * observation.clients == 1:
            counts = F.one_hot(g.argmin(1), observation.num_classes)
        else:
            counts = (g < 0).long()
        return Recovery(label_counts=counts[:, None])

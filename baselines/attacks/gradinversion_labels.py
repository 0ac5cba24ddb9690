"""GradInversion's rule for the labels of a batch without repeats."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.llg import head_rows

from leakbench import Attack, Observation, Recovery, UserError, register


@register("gradinversion_labels", version=1)
class GradInversionLabels(Attack):
    """GradInversion's labels: the N classes whose rows of the last layer's weight gradient have the lowest entries.

    A feature that is large for one example and small for the others shows that example's negative softmax error even
    where the row's sum is positive. Each class is named at most once, so that at most C labels are named. Assumes
    non-negative features. Nothing depends on the scale of the update, so the learning rate may be unknown.

    Sees: gradient of the last layer's weight, or its change over local steps; number of inputs behind the update.

    Args:
        rule: ``lowest``: the N lowest classes, as in the paper; ``negative``: every class with a negative entry, the
            extension to repeated labels in iLRG's comparison.

    Reference: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, "See through Gradients: Image Batch Recovery via
    GradInversion", CVPR 2021, arXiv 2104.07586; ``negative``: Ma, Sun, Cui, Li, Guan, Liu, "Instance-wise Batch Label
    Restoration via Gradients in Federated Learning", ICLR 2023
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "weights"})
    reads = ("head.weight",)

    def __init__(self, *, rule: str = "lowest") -> None:
        if rule not in ("lowest", "negative"):
            raise UserError(
                f"gradinversion_labels: rule: expected 'lowest' or 'negative', got {rule!r}; write either, as in "
                "gradinversion_labels(rule='negative')"
            )
        self.rule = rule

    def run(self, observation: Observation) -> Recovery:
        """Return label counts (T, 1, C), none above 1."""
        lowest = head_rows(observation).amin(-1)
        total = observation.total_inputs
        if self.rule == "negative":
            counts = (lowest < 0).long()
        else:
            named = lowest.argsort(dim=1, stable=True)[:, :total]  # the lower class wins ties
            counts = torch.zeros_like(lowest, dtype=torch.int64).scatter(1, named, 1)
        return Recovery(label_counts=counts[:, None])

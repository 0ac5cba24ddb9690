"""Label Leakage from Gradients, the variant that needs nothing but the shared gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Attack, Observation, Recovery, register


def extract_counts(g: Tensor, impact: Tensor, total: int, offset: Tensor | None = None) -> Tensor:
    """Turn class signals into label counts, LLG's extraction step for T trials at once.

    Args:
        g: (T, C) class signals: row sums of the last layer's weight gradient, summed over local steps.
        impact: (T,) change of a class's signal per occurrence, m <= 0.
        total: Labels to output (N = B times local steps).
        offset: (T, C) part of ``g`` that other classes cause, s.

    Returns:
        (T, C) int64 counts; each row sums to ``total``, or to the number of negative signals where that is larger.
    """
    present = g < 0  # on the raw signal, before the offset is taken away
    signal = g if offset is None else g - offset
    counts = present.long()
    signal = signal - impact[:, None] * counts
    left = total - counts.sum(1)
    rows = torch.arange(len(g), device=g.device)
    # The greedy rule is sequential in the labels of one trial (at most N steps) and runs over all trials at once.
    for step in range(int(left.max().clamp(min=0)) if len(left) else 0):
        active = (step < left).long()
        label = signal.argmin(1)
        counts[rows, label] += active
        signal[rows, label] -= impact * active
    return counts


@register("llg", version=1)
class LLG(Attack):
    """LLG: labels from the signs and sizes of the last layer's weight-gradient rows.

    A class with a negative row sum is in the batch (for non-negative features); each occurrence moves the row sum by
    about the impact m = (1 + 1/C) / N * (sum of negative row sums), which is how repeated labels are counted.

    Sees: gradients of the last layer's weight, batch size, number of local steps.

    Reference: Wainakh, Ventola, Müßig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Mühlhäuser, "User-Level Label
    Leakage from Gradients in Federated Learning", PoPETs 2022, arXiv 2105.09369
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "local_steps", "weights"})
    reads = ("head.weight",)

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        g = observation.head_weight.sum(-1)
        total = observation.batch_size * observation.local_steps * observation.clients
        impact = g.clamp(max=0).sum(1) * (1 + 1 / observation.num_classes) / total
        return Recovery(label_counts=extract_counts(g, impact, total)[:, None])

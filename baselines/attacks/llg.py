"""Label Leakage from Gradients, the variant that needs nothing but the shared gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Attack, Observation, Recovery, register


def row_sums(observation: Observation) -> Tensor:
    """Return the row sums (T, C) of the last layer's weight gradient, up to a positive factor.

    The factor is the learning rate where differences of weights are sent, so that it need not be known.
    """
    name = f"{observation.model.head}.weight"
    sent = observation.update[name]
    if observation.sends == "weights":
        sent = observation.model.parameters[name] - sent
    return sent.sum(-1)


def extract_counts(
    g: Tensor, impact: Tensor, total: int, *, offset: Tensor | None = None, capped: bool = False
) -> Tensor:
    """Turn class signals into label counts, LLG's extraction step for T trials at once.

    Args:
        g: (T, C) class signals: row sums of the last layer's weight gradient, summed over local steps.
        impact: (T,) change of a class's signal per occurrence, m <= 0.
        total: Labels to output (N, for all clients behind the update).
        offset: (T, C) part of ``g`` that other classes cause, s.
        capped: Whether, of more than ``total`` negative signals, only the most negative count.

    Returns:
        (T, C) int64 counts; each row sums to ``total``, or, where not capped, to the number of negative signals if that
        is larger.
    """
    present = g < 0  # on the raw signal, before the offset is taken away
    if capped:
        present &= g.argsort(dim=1, stable=True).argsort(1) < total
    counts = present.long()
    signal = g if offset is None else g - offset
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


def impact_of_negatives(g: Tensor, total: int) -> Tensor:
    """Return LLG's estimate (T,) of the impact m from the negative ones of the signals ``g`` (T, C)."""
    return g.clamp(max=0).sum(1) * (1 + 1 / g.shape[1]) / total


@register("llg", version=1)
class LLG(Attack):
    """LLG: labels from the signs and sizes of the last layer's weight-gradient rows.

    A class with a negative row sum is in the batch (for non-negative features); each occurrence moves the row sum by
    about the impact m = (1 + 1/C) / N * (sum of negative row sums), which is how repeated labels are counted. Nothing
    depends on the scale of the update, so the learning rate may be unknown.

    Sees: gradient of the last layer's weight, or its change over local steps; number of inputs behind the update.

    Reference: Wainakh, Ventola, Müßig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Mühlhäuser, "User-Level Label
    Leakage from Gradients in Federated Learning", PoPETs 2022, arXiv 2105.09369
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "weights"})
    reads = ("head.weight",)

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        g = row_sums(observation)
        total = observation.inputs_per_client * observation.clients
        return Recovery(label_counts=extract_counts(g, impact_of_negatives(g, total), total)[:, None])

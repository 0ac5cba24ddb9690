"""Label Leakage from Gradients, the variant that needs nothing but the shared gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Attack, Observation, Recovery, register

HUGE = 1e290
"""Stands for infinity in signals; sums of many are still finite."""
SLACK = 1e-6
"""In units of the impact: more than rounding errors, less than 1/C."""


def head_rows(observation: Observation) -> Tensor:
    """Return the last layer's weight gradient (T, C, d), up to a positive factor.

    The factor is the learning rate where differences of weights are sent, so that it need not be known.
    """
    name = f"{observation.model.head}.weight"
    return observation.difference({name: observation.update[name]})[name]


def extract_counts(
    g: Tensor, impact: Tensor, total: int, *, offset: Tensor | None = None, capped: bool = False
) -> Tensor:
    """Turn class signals into label counts, LLG's extraction step for T trials at once.

    The paper's loop names the class of least signal and raises that signal by a = -m, until all labels are named: of
    the levels s_i + j a (j = 0, 1, ...) of all classes i it takes the least. Here they are counted instead, at a cost
    that does not depend on their number: `total` units of water, poured into the signals, stand at a height below
    which a class has taken every level but perhaps one; the labels still missing go to the least of those.

    Args:
        g: (T, C) class signals: row sums of the last layer's weight gradient.
        impact: (T,) change of a class's signal per occurrence, m <= 0.
        total: Labels to output (N, for all clients behind the update).
        offset: (T, C) part of ``g`` that other classes cause, s.
        capped: Whether, of more than ``total`` negative signals, only the most negative count.

    Returns:
        (T, C) int64 counts; each row sums to ``total``, or, where not capped, to the number of negative signals if that
        is larger.
    """
    g = g.double().nan_to_num(0.0, HUGE, -HUGE)
    step = -impact.double().nan_to_num(0.0, HUGE, -HUGE)[:, None]
    most = min(total, g.shape[1])  # classes that any choice can touch
    present = g < 0  # on the raw signal, before the offset is taken away
    if capped:
        present &= _least(g, g.new_full((len(g), 1), total).clamp(max=most), most)
    signal = (g if offset is None else g - offset) + step * present
    left = (total - present.sum(1, keepdim=True)).clamp(min=0)
    rises = step > 0
    unit = torch.where(rises, step, 1)
    lowest = signal.topk(most, largest=False).values
    depth = ((lowest - lowest[:, :1]) / unit).clamp(max=total + 1)
    height = ((left + depth.cumsum(1)) / torch.arange(1, most + 1, device=g.device)).amin(1, keepdim=True)
    # The slack keeps rounding from taking a level too many; one too few is among those still missing.
    taken = (height - (signal - lowest[:, :1]) / unit - SLACK).floor().clamp(min=0)
    missing = left - taken.sum(1, keepdim=True)
    taken += _least(signal + unit * taken, missing, most)
    # A signal that does not rise stays the least.
    taken = torch.where(
        rises, taken, torch.zeros_like(taken).scatter_(1, signal.argmin(1, keepdim=True), left.double())
    )
    return taken.long() + present


def impact_of_negatives(g: Tensor, total: int) -> Tensor:
    """Return LLG's estimate (T,) of the impact m from the negative ones of the signals ``g`` (T, C)."""
    return g.clamp(max=0).sum(1) * (1 + 1 / g.shape[1]) / total


def _least(values: Tensor, count: Tensor, most: int) -> Tensor:
    """Mark the ``count`` (T, 1) <= ``most`` least ``values`` (T, C) of a row; of equal ones those of lower classes."""
    bound = values.topk(most, largest=False).values.gather(1, (count.long() - 1).clamp(min=0))
    below, equal = values < bound, values == bound
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


@register("llg", version=2)
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
        g = head_rows(observation).sum(-1)
        total = observation.total_inputs
        return Recovery(label_counts=extract_counts(g, impact_of_negatives(g, total), total)[:, None])

"""Label Leakage from Bias Gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Attack, Observation, Recovery, UserError, register

HALVINGS = 64


def smallest_counts(start: Tensor, step: Tensor, total: Tensor) -> Tensor:
    """Return how many of the ``total`` smallest numbers start_c + j step_c (j = 0, 1, ...) belong to each class.

    That is what the greedy rule picks which takes the class of the smallest number and adds the class's step to it.
    Of equal numbers those of the first class count.

    Args:
        start: (T, C) finite numbers.
        step: (T, C) positive numbers.
        total: (T,) integers, at least 0.

    Returns:
        (T, C) int64 counts; row t sums to total[t].
    """
    height = start - start.amin(1, keepdim=True)  # relative to the least, so that huge starts cannot swallow a step
    wanted = total[:, None]

    def below(level: Tensor) -> Tensor:
        return ((level - height) / step).ceil().clamp(min=0).minimum(wanted.to(level)).long()

    low = height.new_zeros(len(height), 1)
    high = (wanted + 1) * step.amax(1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = below(middle).sum(1, keepdim=True) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    counts = below(low)
    # What is left lies closer together than the halvings can tell: the least next number first.
    order = (height + counts * step).argsort(dim=1, stable=True)
    tied = (below(high) - counts).gather(1, order)
    room = wanted - counts.sum(1, keepdim=True) - (tied.cumsum(1) - tied)
    return counts.scatter_add(1, order, tied.minimum(room.clamp(min=0)))


def counts_from_bias(gradient: Tensor, confidence: Tensor, total: int) -> Tensor:
    """Return LLBG's label counts (T, C).

    Args:
        gradient: (T, C) bias gradient of the mean loss, averaged over local steps.
        confidence: (C,), or (T, C) mean confidence of the correct class, below 1.
        total: Labels behind the update.
    """
    g = gradient.double()
    step = ((1 - confidence.double()) / total).expand_as(g)
    present = (g < 0) & (g.argsort(dim=1, stable=True).argsort(1) < total)
    return present + smallest_counts(g + present * step, step, total - present.sum(1))


@register("llbg", version=1)
class LLBG(Attack):
    """LLBG: labels from the signs and sizes of the last layer's bias gradient, whatever the activation.

    A class with a negative entry is in the batch. One occurrence of class c lowers its entry by (1 - gamma) / N, with
    gamma the mean confidence of the correct class: labels go greedily to the least entry, which rises by that step each
    time. (The paper's offset 1 / C is the same for every class and changes no choice.)

    Sees: gradient of the last layer's bias, or its change over local steps; number of inputs behind the update,
    learning rate, local steps.

    Differs from the released code where more entries are negative than there are labels (noise): only the most negative
    count. See `llbg_aux` for confidences measured per class.

    Args:
        gamma: Confidence of the correct class: 0 for an untrained model; the paper guesses 0.5, 0.7 or 0.9 for a
            trained one.

    Reference: Gat, Sharif, "Harmful Bias: A General Label-Leakage Attack on Federated Learning from Bias Gradients",
    AISec 2024 (github.com/nadbag98/LLBG), after the greedy rule of Wainakh et al., PoPETs 2022, arXiv 2105.09369
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "head_bias", "local_steps", "lr", "weights"})
    reads = ("head.bias",)

    def __init__(self, *, gamma: float = 0.0) -> None:
        if not 0 <= gamma < 1:
            raise UserError(f"llbg: gamma: expected 0 <= gamma < 1, got {gamma}; write llbg(gamma=0.0)")
        self.gamma = gamma

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        g = observation.mean_head_bias
        total = observation.total_inputs
        counts = counts_from_bias(g, torch.full_like(g[0], self.gamma), total)
        return Recovery(label_counts=counts[:, None])

"""Floor of label attacks: the best guess without looking at the update."""

from __future__ import annotations

import torch
from scipy.stats import binom
from torch import Tensor

from leakbench import Attack, Observation, Recovery, register


@register("prior_labels", version=1)
class PriorLabels(Attack):
    """Prior labels: the one multiset of labels with the greatest expected instance recall under the class prior.

    For N labels drawn independently, class c occurs at least j times with a probability that falls in j; the N
    greatest of these probabilities are the best N labels to name.

    Sees: the class frequencies of the data source, the number of inputs per client; no update.

    Reference: none; the best constant guess, which a label attack has to beat on the same sampler
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "label_prior"})
    reads = ()

    def run(self, observation: Observation) -> Recovery:
        """Return the same label counts (T, K, C) for every trial and client."""
        sizes = observation.client_sizes.tolist()
        best = {inputs: _best(inputs, observation.class_prior) for inputs in set(sizes)}
        counts = torch.stack([best[inputs] for inputs in sizes])
        return Recovery(label_counts=counts.expand(observation.trials, -1, -1))


def _best(inputs: int, prior: Tensor) -> Tensor:
    """Return the best counts (C,) for ``inputs`` labels."""
    times = torch.arange(inputs)[:, None]
    probability = torch.as_tensor(binom.sf(times, inputs, prior))  # of more than `times`, (N, C)
    best = probability.flatten().argsort(descending=True, stable=True)[:inputs]  # fewer occurrences win ties
    return torch.bincount(best % len(prior), minlength=len(prior))

"""Floor of label attacks: guesses that look at nothing."""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Observation, Recovery, register


@register("random_labels", version=1)
class RandomLabels(Attack):
    """Random labels: every label drawn uniformly from the classes.

    Sees: the number of classes and of inputs per client; no update.

    Reference: none; the random-guess baseline of label-leakage papers (Wainakh et al. 2022, arXiv 2105.09369)
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size"})
    reads = ()

    def run(self, observation: Observation) -> Recovery:
        """Draw label counts (T, K, C)."""
        sizes = observation.client_sizes
        guesses = observation.randint(observation.num_classes, observation.clients, int(sizes.max()))
        drawn = F.one_hot(guesses, observation.num_classes)
        held = torch.arange(drawn.shape[2], device=drawn.device) < sizes[:, None]
        return Recovery(label_counts=(drawn * held[..., None]).sum(2))

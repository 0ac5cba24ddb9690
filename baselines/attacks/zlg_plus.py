"""ZLG with the model's behavior measured on auxiliary data."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.llg_star import piece_size
from leakbench_baselines.attacks.zlg import estimated_counts, mean_behavior
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, register


@register("zlg_plus", version=1)
class ZLGPlus(Attack):
    """ZLG+: counts n = N (p - dW / O) as in ZLG, with p and O measured on auxiliary data.

    Sees: gradient of the last layer's weight; auxiliary data, weights, batch size, local steps, learning rate.

    Differs from the released code, which measures p of class k on examples of class k only: in the formula p_k belongs
    to all examples of the batch, and on a trained model the two are far apart. That code also averages in the
    statistics of the client's model after its steps; here they are those of the model that was sent out.

    Reference: Chen, Vikalo, "Recovering Labels from Local Updates in Federated Learning", ICML 2024, arXiv 2405.00955
    (as a baseline); Geng et al., "Towards General Deep Leakage in Federated Learning", arXiv 2110.09074
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"auxiliary", "batch_size", "local_steps", "lr", "nonnegative_features", "weights"})
    reads = ("head.weight",)

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure ``confidence`` (M, C) and ``mass`` (M, 1)."""
        inputs, _ = knowledge.auxiliary
        size = piece_size(knowledge)
        if knowledge.examples_interact:  # whole batches only: go round the examples
            inputs = inputs[torch.arange(-(-len(inputs) // size) * size, device=inputs.device) % len(inputs)]
        pieces = (inputs[None, first : first + size] for first in range(0, len(inputs), size))
        behavior: dict[str, Tensor] = mean_behavior(knowledge, pieces)
        return behavior

    def run(self, observation: Observation) -> Recovery:
        """Estimate and round label counts (T, 1, C)."""
        prepared = observation.prepared
        return Recovery(
            label_counts=estimated_counts(observation, prepared["confidence"], 1 / prepared["mass"])[:, None]
        )

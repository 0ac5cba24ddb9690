"""Label counts from the last layer's bias gradient."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.random_image import uniform_pixels
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register


def round_to_total(estimate: Tensor, total: int) -> Tensor:
    """Round estimated counts to non-negative integers that sum to ``total``, by largest remainder.

    Args:
        estimate: (T, C) real numbers; negative ones count as 0, the rest is rescaled to ``total``.
        total: Sum of every row of the result.

    Returns:
        (T, C) int64 counts.
    """
    share = estimate.double().clamp(min=0)
    mass = share.sum(1, keepdim=True)
    share = torch.where(mass > 0, share / mass * total, total / share.shape[1])
    counts = share.floor()
    missing = total - counts.sum(1, keepdim=True)
    rank = (share - counts).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (counts + (rank < missing)).long()


@register("bias_count", version=2)
class BiasCount(Attack):
    """Bias rule: counts n = N (p - db), from the bias gradient db and the model's mean confidence p in each class.

    The bias gradient of the mean cross-entropy is p - n/N whatever the activations are, so only p has to be guessed: an
    untrained model's confidences hardly depend on its inputs, and dummies show them.

    Sees: gradient of the last layer's bias; weights, batch size, local steps, learning rate.

    Args:
        confidence: ``model``: p is the mean over batches of uniform random dummy inputs; ``uniform``: p = 1/C.
        rounds: Batches of dummies.

    Reference: Geng et al., "Towards General Deep Leakage in Federated Learning", arXiv 2110.09074 (confidences from
    dummies); Gat, Sharif, "Harmful Bias: A General Label-Leakage Attack on Federated Learning from Bias Gradients",
    AISec 2024 (counting from the bias gradient alone, there with a greedy rule)
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "head_bias", "local_steps", "lr", "weights"})
    reads = ("head.bias",)

    def __init__(self, *, confidence: str = "model", rounds: int = 4) -> None:
        if confidence not in ("model", "uniform"):
            raise UserError(f"bias_count: confidence: expected 'model' or 'uniform', got {confidence!r}; write either")
        if rounds < 1:
            raise UserError(f"bias_count: rounds: expected at least 1, got {rounds}; write bias_count(rounds=4)")
        self.confidence = confidence
        self.rounds = rounds

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure the mean confidences ``p`` (M, C) on dummies."""
        if self.confidence == "uniform":
            return {}
        mean = []
        for _ in range(self.rounds):
            dummies = uniform_pixels(knowledge, knowledge.batch_size, knowledge.model.dtype)
            mean.append(knowledge.forward(dummies)[0].double().softmax(-1).mean(1))
        return {"p": torch.stack(mean).mean(0)}

    def run(self, observation: Observation) -> Recovery:
        """Estimate and round label counts (T, 1, C)."""
        total = observation.total_inputs
        p = observation.prepared.get("p", torch.tensor(1 / observation.num_classes))
        return Recovery(label_counts=round_to_total(p - observation.mean_head_bias.double(), total)[:, None])

"""Label counts from the last layer's bias gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Attack, Observation, Recovery, UserError, register


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


@register("bias_count", version=1)
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

    def run(self, observation: Observation) -> Recovery:
        """Estimate and round label counts (T, 1, C)."""
        total = observation.inputs_per_client * observation.clients
        dummies = [_dummies(observation) for _ in range(self.rounds)]
        zeros = [_bias_gradient(observation, batch, 0) for batch in dummies]
        # The same batch labelled otherwise: the gap is 1 where the client averages its loss, B where it sums.
        unit = (_bias_gradient(observation, dummies[0], 1) - zeros[0])[:, :1]
        if self.confidence == "model":
            p = torch.stack(zeros).mean(0) / unit
            p[:, 0] += 1
        else:
            p = torch.full_like(zeros[0], 1 / observation.num_classes)
        estimate = p - observation.head_bias / (unit * observation.local_steps)
        return Recovery(label_counts=round_to_total(estimate, total)[:, None])


def _dummies(observation: Observation) -> Tensor:
    """Draw one batch (T, B, *input_shape) of uniform pixels."""
    model = observation.model
    low, high = (bound.to(model.device, model.dtype) for bound in observation.bounds)
    pixels = observation.rand(observation.batch_size, *observation.input_spec.shape).to(model.dtype)
    return low + (high - low) * pixels


def _bias_gradient(observation: Observation, inputs: Tensor, label: int) -> Tensor:
    """Return the bias gradient (T, C) of batches of one class, as the client computes it."""
    name = f"{observation.model.head}.bias"
    labels = torch.full(inputs.shape[:2], label, device=inputs.device)
    return observation.gradients(inputs, labels, names=[name], create_graph=False)[name]

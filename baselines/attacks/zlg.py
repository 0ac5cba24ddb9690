"""Zero-shot label counts from the last layer's weight gradient and the model's behavior on noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from leakbench_baselines.attacks.bias_count import round_to_total
from leakbench_baselines.attacks.llg_star import piece_size
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register

HUGE = 1e250
"""Stands for infinity in estimated shares; sums of many counts are still finite."""


def noise(knowledge: Knowledge, samples: int) -> Iterator[Tensor]:
    """Draw at least ``samples`` standard normal inputs, in pieces (T, n, *input_shape) that fit in memory."""
    size = min(piece_size(knowledge), samples)
    for done in range(0, samples, size):
        knowledge.progress(done, samples)
        yield knowledge.randn(size, *knowledge.model.input_shape).to(knowledge.model.dtype)


def mean_behavior(
    knowledge: Knowledge, pieces: Iterable[Tensor], *, parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return what the model makes of inputs on average.

    Args:
        knowledge: What runs the model.
        pieces: Inputs (M or 1, n, *input_shape).
        parameters: Of the model, where they are others than those that the clients received.

    Returns:
        ``confidence`` (M, C), the mean probabilities, and ``mass`` (M, 1), the mean sum of the last layer's inputs, in
        float64.
    """
    model = knowledge.model.with_state(parameters=parameters)
    confidence, mass, count = [], [], 0
    for piece in pieces:
        logits, features = knowledge.forward(piece.expand(model.draws, *piece.shape[1:]), model=model)
        confidence.append(logits.double().softmax(-1).sum(1))
        mass.append(features.double().sum((1, 2))[:, None])
        count += piece.shape[1]
    return {"confidence": torch.stack(confidence).sum(0) / count, "mass": torch.stack(mass).sum(0) / count}


def estimated_counts(observation: Observation, confidence: Tensor, mass_inverse: Tensor) -> Tensor:
    """Return counts (T, C) = N (p - dW / O), with dW the row sums of the mean loss's gradient, rounded to the total N.

    Args:
        observation: What holds the gradient.
        confidence: (M, C) mean probabilities p.
        mass_inverse: (M, 1) of the mean sum O of the last layer's inputs.
    """
    total = observation.total_inputs
    share = confidence - observation.mean_head_weight.double().sum(-1) * mass_inverse
    # Where no feature is active O is 0, and dW with it.
    counts: Tensor = round_to_total(share.nan_to_num(0.0, HUGE, -HUGE), total)
    return counts


@register("zlg", version=1)
class ZLG(Attack):
    """ZLG: counts n = N (p - dW / O) from row sums dW of the last layer's weight gradient and statistics on noise.

    The row sum of class k is the mean over examples of (p_k - [label is k]) times the example's sum of features. For
    features that are not negative and whose sum O hardly depends on the example, that can be solved for the counts;
    mean probabilities p and O are measured on standard normal noise. Negative counts become 0, the rest is rescaled to
    N and rounded.

    Sees: gradient of the last layer's weight; weights, batch size, local steps, learning rate.

    Args:
        samples: Noise inputs, at least.

    Reference: Geng et al., "Towards General Deep Leakage in Federated Learning", arXiv 2110.09074
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "local_steps", "lr", "nonnegative_features", "weights"})
    reads = ("head.weight",)

    def __init__(self, *, samples: int = 1000) -> None:
        if samples < 1:
            raise UserError(f"zlg: samples: expected at least 1, got {samples}; write zlg(samples=1000)")
        self.samples = samples

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure ``confidence`` (M, C) and ``mass`` (M, 1)."""
        return mean_behavior(knowledge, noise(knowledge, self.samples))

    def run(self, observation: Observation) -> Recovery:
        """Estimate and round label counts (T, 1, C)."""
        prepared = observation.prepared
        return Recovery(
            label_counts=estimated_counts(observation, prepared["confidence"], 1 / prepared["mass"])[:, None]
        )

"""What a claimed probability of one bit is worth, per trial."""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 0.01
"""Least probability that a claim gives to either answer: one mistake then costs at most log2(1 / CLIP) bits."""

CHANCE = {"inference_accuracy": 0.5, "inference_bits": 0.0}
"""What a claim of .5, the prior, gets; of accuracy any other claim that knows nothing gets the same on average."""


def score_inference(truth: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Return the metrics of attribute and membership inference, (T,) float64 each.

    The mean of ``inference_bits`` is the entropy of the fair coin, 1 bit, minus the cross-entropy of the claims: on
    trials that the attack was not fitted on, a lower bound on the information that is usable by its family (Xu et al.
    2020, arXiv 2002.10689), as far as the claims are calibrated.

    Args:
        truth: (T,) 0 or 1.
        scores: (T,) claimed probability of 1.
    """
    scores = scores.double()
    given = torch.where(truth == 1, scores, 1 - scores)
    return {
        "inference_accuracy": torch.where(scores == 0.5, 0.5, (given > 0.5).double()),
        "inference_bits": 1 + given.clamp(CLIP, 1 - CLIP).log2(),
    }

"""The sign of the update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, register

NOISE = 0.1
"""Scale of the logistic noise of the likelihood, in units of a tensor's mean magnitude."""


@register("sign", version=1)
class Sign(Defense):
    """Sign: sends -1, 0 or 1 for every coordinate, the sign of the update; of 0 it is 0.

    With ``scaled`` each tensor's signs are multiplied by its mean magnitude, which is the multiple of them that is
    nearest to the tensor. Meant for gradients and differences of weights: where the weights themselves are sent, it is
    their sign that is.

    Acts on: the update, each tensor by itself.

    Args:
        scaled: Whether each tensor's mean magnitude is sent with it.

    Reference: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems",
    ICML 2018, arXiv 1802.04434; scaled, Karimireddy, Rebjock, Stich, Jaggi, "Error Feedback Fixes SignSGD and other
    Gradient Compression Schemes", ICML 2019, arXiv 1901.09847, here without the error feedback
    """

    acts_on = frozenset({"update"})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, scaled: bool = False) -> None:
        self.scaled = scaled

    @property
    def tensorwise(self) -> bool:
        """Always: each tensor has a scale of its own."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Take the signs."""
        return {
            name: value.sign() * self._scale(value) if self.scaled else value.sign() for name, value in update.items()
        }

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return a surrogate (T,): the log-probability of the signs if ``clean`` had a little logistic noise.

        A coordinate of 0 says nothing.
        """
        each = []
        for name, value in sent.items():
            size = self._scale(clean[name]).clamp(min=torch.finfo(value.dtype).tiny)
            agreement = value.sign() * clean[name] / (NOISE * size)
            each.append((-F.softplus(-agreement) * (value != 0)).flatten(1).sum(1))
        return torch.stack(each).sum(0)

    @staticmethod
    def _scale(value: Tensor) -> Tensor:
        """Return the mean magnitude, broadcastable to ``value`` (T, *shape)."""
        return value.abs().flatten(1).mean(1).view(-1, *(1,) * (value.dim() - 1))

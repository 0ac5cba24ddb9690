"""The sign of the update."""

from __future__ import annotations

from torch import Tensor

from leakbench import Defense, DefenseContext, register


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

    @staticmethod
    def _scale(value: Tensor) -> Tensor:
        """Return the mean magnitude, broadcastable to ``value`` (T, *shape)."""
        return value.abs().flatten(1).mean(1).view(-1, *(1,) * (value.dim() - 1))

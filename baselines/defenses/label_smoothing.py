"""Label smoothing."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, UserError, register


def as_soft(labels: Tensor, inputs: Tensor, classes: int) -> Tensor:
    """Return ``labels``, classes (T, B) or probabilities (T, B, C), as probabilities in the dtype of ``inputs``."""
    return labels if labels.dim() == 3 else F.one_hot(labels, classes).to(inputs.dtype)


@register("label_smoothing", version=1)
class LabelSmoothing(Defense):
    """Label smoothing: trains on (1 - alpha) onehot(y) + alpha / C instead of the label y.

    Acts on: the labels of the local batch.

    Args:
        alpha: Weight of the uniform distribution.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision",
    CVPR 2016, arXiv 1512.00567
    """

    acts_on = frozenset({"batch"})
    strength = ("alpha", "higher")
    neutral = MappingProxyType({"alpha": 0.0})
    likelihood = "simulated"
    adaptive = ("analytic", "bayes_adaptive", "learning_to_invert", "learned_labels", "soft_label", "llg")

    def __init__(self, *, alpha: float = 0.1) -> None:
        if not 0 <= alpha <= 1:
            raise UserError(
                f"label_smoothing: alpha: expected 0 <= alpha <= 1, got {alpha}; write label_smoothing(alpha=0.1)"
            )
        self.alpha = alpha

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Smooth the labels."""
        if self.alpha == 0:
            return inputs, labels
        classes = ctx.model.num_classes
        return inputs, (1 - self.alpha) * as_soft(labels, inputs, classes) + self.alpha / classes

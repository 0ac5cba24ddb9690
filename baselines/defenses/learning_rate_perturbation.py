"""Learning-rate perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from leakbench_baselines.defenses.clip_l2 import direction_fit, moved
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("learning_rate_perturbation", version=1)
class LearningRatePerturbation(Defense):
    """Learning-rate perturbation (LRP): trains with a private learning rate, drawn uniformly around the agreed one.

    A client draws its rate once a round, from (1 - width) to (1 + width) times the agreed one, and keeps it over its
    local steps. A gradient that is sent stands for one step at the agreed rate and grows by the same factor. So one
    step is only rescaled, which no attack that ignores the scale notices. Weight decay keeps the agreed rate.

    A re-implementation from the abstract, without ada-LRP, which gives every client a mean of its own.

    Acts on: the gradient of each local step.

    Args:
        width: Half the range, as a share of the agreed rate; chosen here.

    Reference: none; no arXiv id: Wan and others, "Enhancing Privacy Preservation in Federated Learning via Learning
    Rate Perturbation", ICCV 2023
    """

    acts_on = frozenset({"step"})
    strength = ("width", "higher")
    neutral = MappingProxyType({"width": 0.0})
    draws = "the learning rate of a round"
    likelihood = "surrogate"
    adaptive = ("analytic", "bayes_adaptive", "learning_to_invert", "learned_labels", "dlm_plus")

    def __init__(self, *, width: float = 0.5) -> None:
        if not 0 <= width < 1:
            raise UserError(
                f"learning_rate_perturbation: width: expected 0 <= width < 1, got {width}; "
                "write learning_rate_perturbation(width=0.5)"
            )
        self.width = width

    @property
    def tensorwise(self) -> bool:
        """Always: the rate does not depend on the gradient."""
        return True

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Scale the gradient, which scales the step."""
        if self.width == 0:
            return grads
        if ctx.local_step == 0:
            ctx.state["factor"] = 1 + self.width * (2 * ctx.random.rand().double() - 1)
        factor = ctx.state["factor"]
        return {n: v * factor.to(v.dtype).view(-1, *(1,) * (v.dim() - 1)) for n, v in grads.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): how well the directions of what changed agree; exact after one local step."""
        score: Tensor = direction_fit(moved(sent, ctx), moved({name: clean[name] for name in sent}, ctx))
        return score

"""A client looks at the model before it trains."""

from __future__ import annotations

from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register
from leakbench.metrics.stealth import Thresholds, findings


@register("detect_and_abort", version=1)
class DetectAndAbort(Defense):
    """Detect and abort: a client refuses a model that looks planted, by what it alone can see on its first batch.

    Stops models with a nearly zeroed normalisation layer, with the same logits for all inputs, with layers that get no
    gradient, or far away from the model before: the crude forms of BatchNorm fishing and of planted heads. A client
    that refuses stays out. Behind an aggregate of others this does not stop gradient suppression, whose other clients
    are to be silent anyway. Does not stop attacks that stay within ordinary numbers (scales above the limit, imprint
    layers and trap weights of ordinary size, SEER). Whether others got the same model is the business of
    ``consistency_check``. Costs no accuracy while it does not fire, and a gradient of the first batch in each round (of
    each example with `d_snr`).

    Acts on: whether the client takes part.

    Args:
        least_norm_scale: Refuse where the largest scale of a normalisation layer is below it.
        logit_spread: Refuse where the largest range of a logit over the batch is below it, as a share of the largest
            logit.
        dead_gradient_share: Refuse where more of the parameters lie in tensors without any gradient.
        head_gradient_rank: Refuse where the rank of the last layer's gradient is below it.
        d_snr: Refuse above this D-SNR. None: not checked, because converged honest models reach any value on a
            small batch with one example that they get wrong; 10 suits untrained models.
        parameter_distance: Refuse where the parameters moved by more than so many times their norm.

    A choice of checks of our own, thresholds included; the checks are those that the authors of the attacks name.

    Reference: Garov, Dimitrov, Jovanovic, Vechev, "Hiding in Plain Sight: Disguising Data Stealing Attacks in
    Federated Learning", ICLR 2024, arXiv 2306.03013
    """

    acts_on = frozenset({"accept"})
    adaptive = ("robbing_the_fed", "curious_abandon_honesty", "learned_labels")

    def __init__(
        self,
        *,
        least_norm_scale: float = 0.03,
        logit_spread: float = 5e-7,
        dead_gradient_share: float = 0.5,
        head_gradient_rank: float = 1.0,
        d_snr: float | None = None,
        parameter_distance: float = 10.0,
    ) -> None:
        self.least_norm_scale = least_norm_scale
        self.logit_spread = logit_spread
        self.dead_gradient_share = dead_gradient_share
        self.head_gradient_rank = head_gradient_rank
        self.d_snr = d_snr
        self.parameter_distance = parameter_distance
        for name, limit in self.params().items():
            if limit is not None and limit < 0:
                raise UserError(
                    f"detect_and_abort: {name}: expected at least 0, got {limit}; write detect_and_abort({name}=1)"
                )

    def accept(self, ctx: DefenseContext) -> Tensor:
        """Refuse where a check fails."""
        found = findings(
            ctx.model,
            ctx.previous or ctx.model,
            ctx.inputs,
            ctx.labels,
            batch_norm=ctx.batch_norm,
            reduction=ctx.reduction,
            thresholds=Thresholds(**self.params()),
            with_d_snr=self.d_snr is not None,
        )
        return found["detected"] == 0

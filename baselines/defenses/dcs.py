"""DCS: concealing samples that imitate the private ones' gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from leakbench_baselines.defenses.label_smoothing import as_soft
from torch import Tensor

from leakbench import Defense, DefenseContext, Model, UserError, per_trial_gradients, register

FAR = 500.0
"""Mean distance of concealing samples at which a trial's search ends."""
MARGIN, RIDGE = 0.5, 1e-3
"""Of the projection: least weight of the true gradient that is added, and what is added to its square."""


@register("dcs", version=1)
class DCS(Defense):
    """DCS: trains on every example together with a made one that is far from it and has almost the same gradient.

    The made examples start as ``lam_y`` noise and 1 - ``lam_y`` the private example. They minimise, by Adam,

        1 - cos(g(made), g(private)) + exp(-lam_x distance of inputs) + lam_z (relative distance of logits - eps)

    under a wrong label each, g being the gradient of a trial's batch. The client then trains on lam_y CE(made, wrong
    label) + (1 - lam_y) CE(made, true label) + CE(private, true label), over 3 (over 2 where lam_y is 0 or 1). Where
    that gradient and the private batch's have a negative inner product, the latter is added at least half and as often
    as makes up for it.

    Acts on: the local batch, made examples first; and the gradient of the step. Write it last among the defenses that
    change the batch. A step costs the client ``steps`` second-order gradients.

    Args:
        steps: Of Adam, whose rate falls to a tenth at 3/8, 5/8 and 7/8. The paper's code takes 1,000; the default is
            for training on a CPU.
        lr: Of Adam.
        lam_x: Weight of the inputs' distance.
        lam_z: Weight of the logits' distance.
        eps: A constant of the objective, kept for the record: it has no gradient.
        lam_y: Share of noise in the start, and weight of the wrong label.

    Differs from the released code, which starts from other images of the client or from noise: noise here, between
    black and white, since a batch has no images to spare, with a random wrong label each.

    Reference: Wu, Hayat, Zhou, Harandi, "Concealing Sensitive Samples against Gradient Leakage in Federated Learning",
    AAAI 2024, arXiv 2209.05724
    """

    acts_on = frozenset({"batch", "step"})
    draws = "where the made examples start, and their labels"
    likelihood = "simulated"
    adaptive = ("dcs_separation", "bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(
        self,
        *,
        steps: int = 30,
        lr: float = 0.1,
        lam_x: float = 0.01,
        lam_z: float = 0.01,
        eps: float = 0.01,
        lam_y: float = 0.7,
    ) -> None:
        if steps < 1 or lr <= 0:
            raise UserError(f"dcs: expected steps of at least 1 and lr above 0, got {steps} and {lr}; write dcs()")
        if not 0 <= lam_y <= 1 or min(lam_x, lam_z, eps) < 0:
            raise UserError(
                f"dcs: expected 0 <= lam_y <= 1 and lam_x, lam_z, eps of at least 0, got {lam_y}, {lam_x}, {lam_z}, "
                f"{eps}; write dcs(lam_y=0.7)"
            )
        self.steps = steps
        self.lr = lr
        self.lam_x = lam_x
        self.lam_z = lam_z
        self.eps = eps
        self.lam_y = lam_y

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Add the made examples."""
        classes = ctx.model.num_classes
        soft = as_soft(labels, inputs, classes)
        low, high = (bound.to(inputs) for bound in ctx.bounds)
        noise = low + (high - low) * ctx.random.rand(*inputs.shape[1:]).to(inputs)
        other = (soft.detach().argmax(2) + 1 + ctx.random.randint(max(1, classes - 1), inputs.shape[1])) % classes
        made = self.made(ctx.model, inputs.detach(), labels.detach(), noise, other)
        mixed = self.lam_y * as_soft(other, inputs, classes) + (1 - self.lam_y) * soft
        return torch.cat([made, inputs], 1), torch.cat([mixed, soft], 1)

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Scale to the paper's loss, and turn a gradient that works against the private batch."""
        if not grads:
            return grads
        count = 2 if self.lam_y in (0.0, 1.0) else 3
        factor = (2 if ctx.reduction == "mean" else 1) / count  # the batch has twice as many examples
        sent = {name: factor * value for name, value in grads.items()}
        half = ctx.inputs.shape[1] // 2
        true = per_trial_gradients(
            ctx.model,
            ctx.inputs[:, half:],
            ctx.labels[:, half:],
            names=list(grads),
            batch_norm=ctx.batch_norm,
            reduction=ctx.reduction,
            create_graph=any(value.requires_grad for value in grads.values()),
        ).tensors
        product = _product(sent, true)
        weight = (-product / (_product(true, true) + RIDGE)).clamp(min=MARGIN)
        weight = torch.where(product < 0, weight, 0)
        return {name: value + weight.view(-1, *(1,) * (value.dim() - 1)) * true[name] for name, value in sent.items()}

    def made(self, model: Model, inputs: Tensor, labels: Tensor, noise: Tensor, other: Tensor) -> Tensor:
        """Return made examples (T, B, *input_shape) that start at a mixture with ``noise``, under labels ``other``."""
        with torch.enable_grad():
            goal = {n: v.detach() for n, v in per_trial_gradients(model, inputs, labels).tensors.items()}
            wanted = model.logits(inputs).detach()
            made = (self.lam_y * noise + (1 - self.lam_y) * inputs).detach().requires_grad_()
            optimiser = torch.optim.Adam([made], lr=self.lr)
            drops = [int(self.steps // part) for part in (2.667, 1.6, 1.142)]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, drops)
            for _ in range(self.steps):
                loss, distance = self._objective(model, made, other, inputs, goal, wanted)
                (slope,) = torch.autograd.grad(loss.sum(), [made])
                before, resting = made.detach().clone(), distance > FAR
                made.grad = slope.nan_to_num(0, 0, 0)
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    made.copy_(torch.where(resting.view(-1, *(1,) * (made.dim() - 1)), before, made))
        return made.detach()

    def _objective(
        self, model: Model, made: Tensor, other: Tensor, inputs: Tensor, goal: Mapping[str, Tensor], wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the objective (T,) and the mean distance of inputs (T,)."""
        found = per_trial_gradients(model, made, other, create_graph=True).tensors
        size = (_product(found, found) * _product(goal, goal)).clamp(min=1e-24).sqrt()
        distance = (made - inputs).flatten(2).square().sum(2).clamp(min=1e-24).sqrt().mean(1)
        gap = (model.logits(made) - wanted).square().sum(2).clamp(min=1e-24).sqrt()
        relative = (gap / wanted.square().sum(2).clamp(min=1e-24).sqrt()).mean(1)
        alike = 1 - _product(found, goal) / size
        return alike + (-self.lam_x * distance).exp() + self.lam_z * (relative - self.eps), distance


def _product(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product (T,) over all tensors."""
    return torch.stack([(one[name] * other[name]).flatten(1).sum(1) for name in one]).sum(0)

"""GradDefense: noise in a random half of the gradient, cut where it is equally sensitive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from leakbench_baselines.defenses.clip_l2 import nearness
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, per_trial_gradients, register

EXACT = 0.1
"""Standard deviation, in units of the noise, that the likelihood grants to entries without noise."""


@register("graddefense", version=1)
class GradDefense(Defense):
    """GradDefense: cuts the gradient into slices of equal sensitivity and adds Gaussian noise to some, drawn at random.

    The sensitivity of a tensor is the mean over examples x of ||d (sum of its gradient's entries) / d x||, spread
    evenly over its entries. All tensors one after the other are cut where the running sum reaches 1 / slices,
    2 / slices, ... of the whole. Sensitivities are measured on the round's first local batch and kept for the round;
    every local step draws other slices.

    Simplified. The released code measures them once, on a root set of five examples of each class; a client here has
    nothing but its batch. It cuts between groups of entries of equal size and leaves what remains to the last slice;
    here cuts are between any two entries. Its second form, which clips every example's gradient inside the drawn
    slices, is left out (see ``fed_cdp``), and so is the server's denoising, which changes accuracy, not what is seen.

    Acts on: the gradient of each local step.

    Args:
        scale: Standard deviation of the noise.
        slices: Into how many slices the gradient is cut.
        perturbed: How many get noise.

    Reference: Wang, Guo, Xie, Qi, "Protect Privacy from Gradient Leakage Attack in Federated Learning", INFOCOM 2022,
    doi 10.1109/INFOCOM48880.2022.9796841
    """

    acts_on = frozenset({"step"})
    strength = ("scale", "higher")
    draws = "slices and noise"
    neutral = MappingProxyType({"scale": 0.0})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, scale: float = 0.01, slices: int = 10, perturbed: int = 5) -> None:
        if scale < 0 or not 0 <= perturbed <= slices or slices < 1:
            raise UserError(
                "graddefense: expected scale >= 0, slices >= 1 and 0 <= perturbed <= slices, got "
                f"{scale}, {slices}, {perturbed}; write graddefense(scale=0.01, slices=10, perturbed=5)"
            )
        self.scale = scale
        self.slices = slices
        self.perturbed = perturbed

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Add noise to the drawn slices."""
        if self.scale == 0 or not grads:
            return grads
        if ctx.local_step == 0:
            ctx.state["sensitivity"] = self.sensitivity(ctx, list(grads))
        chosen = ctx.random.at("slices").rand(self.slices).argsort(1).argsort(1) < self.perturbed
        sent = {}
        for (name, value), place in zip(grads.items(), self.places(ctx.state["sensitivity"], grads), strict=True):
            noise = ctx.random.at("noise", name).randn(*value.shape[1:]).to(value)
            sent[name] = value + self.scale * noise * chosen.gather(1, place).view(value.shape)
        return sent

    def sensitivity(self, ctx: DefenseContext, names: list[str]) -> Tensor:
        """Return the sensitivities (T, P) of the named tensors."""
        model = ctx.model.with_state(parameters={name: v.detach() for name, v in ctx.model.parameters.items()})
        with torch.enable_grad():
            inputs = ctx.inputs.detach().requires_grad_()
            grads = per_trial_gradients(
                model,
                inputs,
                ctx.labels.detach(),
                names=names,
                batch_norm=ctx.batch_norm,
                reduction=ctx.reduction,
                create_graph=True,
            ).tensors
            sums = [grads[name].sum() for name in names]
        each = []
        for value in sums:
            if not value.requires_grad:  # a tensor that does not depend on the input, as the bias of a linear model
                each.append(inputs.new_zeros(len(inputs)))
                continue
            (slope,) = torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
            each.append(torch.linalg.vector_norm(slope.flatten(2), dim=2).mean(1))
        return torch.stack(each, 1)

    def places(self, sensitivity: Tensor, grads: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the slice that every entry falls into, (T, n) int64 for each tensor."""
        sizes = [value[0].numel() for value in grads.values()]
        share = sensitivity.double()
        none = share.sum(1, keepdim=True) == 0
        count = torch.tensor(sizes, dtype=torch.float64, device=share.device)
        share = torch.where(none, count, share)
        share = share / share.sum(1, keepdim=True)
        before = share.cumsum(1) - share
        found = []
        for index, size in enumerate(sizes):
            middle = (torch.arange(size, dtype=torch.float64, device=share.device) + 0.5) / size
            at = before[:, index, None] + share[:, index, None] * middle
            found.append((self.slices * at).long().clamp(max=self.slices - 1))
        return found

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return the log-density (T,) of a mixture: noise in the share of slices that get it, next to none elsewhere.

        Which entries those are is not known, so that every entry is taken by itself. A surrogate: slices hold unequal
        numbers of entries, and an exact entry is granted a tenth of the noise. Of several local steps the noises are
        added up as if each fell into the same slices. Without noise it is `nearness`.
        """
        if self.scale == 0 or self.perturbed == 0:
            exact: Tensor = nearness(sent, {name: clean[name] - value for name, value in sent.items()})
            return exact
        unit = 1 if ctx.sends == "gradient" else ctx.lr * math.sqrt(ctx.local_step + 1)
        scale = self.scale * unit
        share = min(max(self.perturbed / self.slices, 1e-6), 1 - 1e-6)
        z = torch.cat([(value - clean[name]).flatten(1) for name, value in sent.items()], 1) / scale
        loud = math.log(share) - z.square() / 2
        exact = math.log((1 - share) / EXACT) - (z / EXACT).square() / 2
        constant = math.log(scale) + math.log(2 * math.pi) / 2
        return (torch.logaddexp(loud, exact) - constant).sum(1)

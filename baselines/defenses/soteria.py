"""Soteria: columns of one dense layer's weight gradient pruned, those of the features of lowest score."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

import torch
from leakbench_baselines.defenses.clip_l2 import direction_fit, moved
from torch import Tensor, nn

from leakbench import Defense, DefenseContext, Model, UserError, layer_inputs, register

ENTRIES = 2**19
"""Most entries of Jacobians computed at once; more are slower on a CPU."""

EMPTY = 1e-4
"""Greatest magnitude of a column that counts as pruned, in units of the greatest of all."""


@register("soteria", version=1)
class Soteria(Defense):
    """Soteria: zeros the columns of one dense layer's weight gradient whose features have the lowest score.

    A feature r_f of the layer's input is scored by the sum over the batch of ||d r_f / d x|| / (|r_f| + stabiliser),
    and the p percent of lowest score lose their column: of d features exactly floor(p d / 100), the first of equals.
    Those features are the largest for how far the input moves them. All else is sent as it is, the layer's bias too.

    On an mlp without a convolution the default layer is the first dense one, whose input is the image itself: every
    pixel moves with itself alone, and those farthest from 0 lose their column. ``layer`` chooses a later one.

    Departures: the score is the released code's estimate of the paper's ||r (dr/dx)^-1||; that sums signed ratios,
    which a feature near 0 can turn anywhere, so magnitudes are taken here. Percentiles of the code keep ties, and
    prune nothing of a layer whose scores are all equal; here as many are pruned as p says.

    Acts on: the gradient of each local step.

    Args:
        p: Percentage of the columns that is pruned.
        layer: Name of the defended layer, e.g. ``fc``; the first one that takes a vector where empty, whose input is,
            behind convolutions, the representation that the paper defends.
        stabiliser: Added to |r_f|. Public code adds 0.1, 1e-10 or nothing.

    Reference: Sun, Li, Wang, Yang, Li, Chen, "Soteria: Provable Defense against Privacy Leakage in Federated Learning
    from Representation Perspective", CVPR 2021, arXiv 2012.06043
    """

    acts_on = frozenset({"step"})
    strength = ("p", "higher")
    neutral = MappingProxyType({"p": 0.0})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "drop_layer", "learning_to_invert", "learned_labels")

    def __init__(self, *, p: float = 60.0, layer: str = "", stabiliser: float = 0.1) -> None:
        if not 0 <= p <= 100:
            raise UserError(f"soteria: p: expected a percentage from 0 to 100, got {p}; write soteria(p=60)")
        if stabiliser <= 0:
            raise UserError(f"soteria: stabiliser: expected more than 0, got {stabiliser}; write stabiliser=0.1")
        self.p = p
        self.layer = layer
        self.stabiliser = stabiliser

    @property
    def tensorwise(self) -> bool:
        """Always: scores come from the batch and the model."""
        return True

    def defended(self, model: Model) -> str:
        """Return the name of the defended layer.

        Raises:
            UserError: The model has no such dense layer.
        """
        seen: list[tuple[str, int]] = []
        dense = {name: module for name, module in model.module.named_modules() if isinstance(module, nn.Linear)}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0].dim())))
            for name, module in dense.items()
        ]
        some = next(iter(model.parameters.values()))
        try:
            with torch.no_grad():
                model.trials(0, 1).logits(some.new_zeros(1, 1, *model.input_shape))
        finally:
            for hook in hooks:
                hook.remove()
        found = [name for name, dim in seen if dim == 2 and f"{name}.weight" in model.parameters]
        if not found or (self.layer and self.layer not in found):
            known = ", ".join(found) or "none"
            raise UserError(f"soteria: layer: expected a dense layer that takes a vector ({known}), got {self.layer!r}")
        return self.layer or found[0]

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Zero the columns."""
        layer = self.defended(ctx.model)
        name = f"{layer}.weight"
        if self.p == 0 or name not in grads:
            return grads
        scores = self.scores(ctx, layer)
        pruned = scores.argsort(dim=1, stable=True)[:, : int(Fraction(str(self.p)) * scores.shape[1] / 100)]
        kept = torch.ones_like(scores, dtype=grads[name].dtype).scatter(1, pruned, 0.0)
        return {**grads, name: grads[name] * kept[:, None]}

    def scores(self, ctx: DefenseContext, layer: str) -> Tensor:
        """Return the scores (T, d) of the features that ``layer`` takes."""
        model = ctx.model.with_state(parameters={name: v.detach() for name, v in ctx.model.parameters.items()})
        with torch.enable_grad():
            inputs = ctx.inputs.detach().requires_grad_()
            (features,) = layer_inputs(model, inputs, [layer])
        size = features.shape[2]
        norms, every = [], torch.eye(size, dtype=features.dtype, device=features.device)
        for wanted in torch.split(every, max(1, ENTRIES // inputs.numel())):
            directions = wanted[:, None, None].expand(-1, *features.shape)
            (jacobian,) = torch.autograd.grad(features, inputs, directions, is_grads_batched=True, retain_graph=True)
            norms.append(torch.linalg.vector_norm(jacobian.flatten(3), dim=3))
        ratios = torch.cat(norms).permute(1, 2, 0) / (features.detach().abs() + self.stabiliser)
        return ratios.sum(1)

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): how well directions agree but for the pruned columns, which are those of zeros."""
        goal, found = moved(sent, ctx), moved({name: clean[name] for name in sent}, ctx)
        name = f"{self.defended(ctx.model)}.weight"
        if name in goal:
            size = goal[name].abs().amax(1, keepdim=True)
            # Not exactly: a later part's tiny noise would hide which columns are empty.
            found = {**found, name: found[name] * (size > EMPTY * size.amax(2, keepdim=True))}
        fit: Tensor = direction_fit(goal, found)
        return fit

"""Dropout before the last layer."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, UserError, register

CHUNK = 16


@register("dropout", version=1)
class Dropout(Defense):
    """Dropout: computes the gradient with the last layer's inputs randomly zeroed, a mask per example and local step.

    Kept inputs are scaled by 1 / (1 - p). At every strength an input is dropped by the same draw, so that what is
    dropped at a smaller p is dropped at a greater one too.

    Acts on: each local step's gradient, computed anew from the batch as the client trains on it. What other defenses
    made of the gradient before is lost: write dropout first in a chain, and not with one that clips per example.

    Args:
        p: Probability that an input is dropped.

    Reference: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way to Prevent Neural
    Networks from Overfitting", JMLR 2014, doi 10.5555/2627435.2670313; against label attacks Wainakh et al., PoPETs
    2022, arXiv 2105.09369
    """

    acts_on = frozenset({"step"})
    strength = ("p", "higher")
    neutral = MappingProxyType({"p": 0.0})
    draws = "which of the last layer's inputs are dropped"
    likelihood = "simulated"
    adaptive = ("analytic", "bayes_adaptive", "learning_to_invert", "learned_labels", "dropout_inversion")

    def __init__(self, *, p: float = 0.5) -> None:
        if not 0 <= p < 1:
            raise UserError(f"dropout: p: expected 0 <= p < 1, got {p}; write dropout(p=0.5)")
        self.p = p

    @property
    def tensorwise(self) -> bool:
        """Always: a tensor's gradient is computed without the others."""
        return True

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Compute the gradient under the masks.

        Raises:
            UserError: The model does more after its last linear layer than return the logits.
        """
        if self.p == 0 or not grads:
            return grads
        if not ctx.model.head_is_last:
            raise UserError(
                f"dropout: expected a net that returns its last linear layer's output, got "
                f"{ctx.model.architecture.name!r}; choose another architecture"
            )
        create_graph = any(value.requires_grad for value in grads.values())
        draws = ctx.random.rand(ctx.inputs.shape[1], ctx.model.parameters[f"{ctx.model.head}.weight"].shape[2])
        # Every trial needs its own copy of the weights and activations, so trials take turns.
        parts = [
            self._gradients(ctx, draws, slice(first, first + CHUNK), tuple(grads), create_graph)
            for first in range(0, len(draws), CHUNK)
        ]
        return {name: torch.cat(values) for name, values in zip(grads, zip(*parts, strict=True), strict=True)}

    def _gradients(
        self, ctx: DefenseContext, draws: Tensor, part: slice, names: tuple[str, ...], create_graph: bool
    ) -> tuple[Tensor, ...]:
        """Return the gradients of some trials by ``names``; ``draws`` (T, B, d) are uniform in [0, 1)."""
        draws, labels = draws[part], ctx.labels[part]
        model = ctx.model.trials(part.start, part.stop)
        with torch.enable_grad():
            own = {n: model.parameters[n].expand(len(draws), *model.parameters[n].shape[1:]) for n in names}
            own = {n: v if v.requires_grad else v.detach().requires_grad_() for n, v in own.items()}
            model = model.with_state(parameters=own)
            _, features, _ = model.run(ctx.inputs[part], batch_norm=ctx.batch_norm)
            kept = features * (draws >= self.p) / (1 - self.p)
            logits = torch.einsum("tbd,tcd->tbc", kept, model.parameters[f"{model.head}.weight"])
            if model.has_head_bias:
                logits = logits + model.parameters[f"{model.head}.bias"][:, None]
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="none")
            loss = losses.sum() / (draws.shape[1] if ctx.reduction == "mean" else 1)
            return torch.autograd.grad(
                loss, list(own.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
            )

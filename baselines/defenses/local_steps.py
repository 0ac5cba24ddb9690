"""Several SGD steps on a batch in place of one."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, per_trial_gradients, register


@register("local_steps", version=1)
class LocalSteps(Defense):
    """Local steps: takes several SGD steps on the same batch for each one of the protocol.

    What the protocol then takes for one step's gradient is (w - w_n) / lr, the sum of n gradients along the way: the
    same update as that of a client with n local steps on one batch, and a defense only as far as an attack does not
    simulate them. Plain SGD at the protocol's learning rate. Of the n gradients only the first passes other defenses
    that act on steps before it in a chain. BatchNorm's running statistics are those after the first.

    Acts on: the gradient of each local step.

    Args:
        steps: n.

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, arXiv 1602.05629
    """

    acts_on = frozenset({"step"})
    strength = ("steps", "higher")
    neutral = MappingProxyType({"steps": 1})
    likelihood = "simulated"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, steps: int = 10) -> None:
        if steps < 1 or steps != int(steps):
            raise UserError(
                f"local_steps: steps: expected a whole number >= 1, got {steps}; write local_steps(steps=10)"
            )
        self.steps = steps

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Go on from where the first gradient leads, and add up."""
        if not grads:
            return grads
        total, model = dict(grads), ctx.model
        graph = any(value.requires_grad for value in grads.values())
        moved = grads
        for _ in range(int(self.steps) - 1):
            model = model.with_state(parameters={n: model.parameters[n] - ctx.lr * v for n, v in moved.items()})
            moved = per_trial_gradients(
                model,
                ctx.inputs,
                ctx.labels,
                names=list(grads),
                batch_norm=ctx.batch_norm,
                reduction=ctx.reduction,
                create_graph=graph,
            ).tensors
            total = {name: value + moved[name] for name, value in total.items()}
        return total

"""Inversion that leaves out what Soteria masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from leakbench import Observation, UserError, register
from leakbench.inversion import (
    Comparison,
    InversionAttack,
    OneStep,
    Rows,
    cosine_inversion,
)

LEFT_OUT = ("columns", "tensor")


class Unmasked(OneStep):
    """The gradient of all inputs at the weights sent out, without the entries that were masked.

    Args:
        leave_out: See `DropLayer`.
    """

    def __init__(self, leave_out: str) -> None:
        self.leave_out = leave_out

    def target(
        self, observation: Observation, units: Literal["gradient", "difference", "direction"]
    ) -> dict[str, Tensor]:
        """Return what gradients are compared with, (T, *shape), zeros in the place of tensors that are left out."""
        target = super().target(observation, units)
        if self.leave_out == "columns":
            return target
        told = {name: (value != 0).flatten(1).any(1) for name, value in target.items()}
        kept = {name: told[name] & ~masked(value).flatten(1).any(1) for name, value in target.items()}
        nothing = ~torch.stack(list(kept.values())).any(0)  # where all would go, all stays
        return {
            name: value * (kept[name] | nothing).view(-1, *(1,) * (value.dim() - 1)) for name, value in target.items()
        }

    def compare(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,
        unknowns: Mapping[str, Tensor],
        *,
        elementwise: bool,  # noqa: ARG002  (masks need the gradients themselves)
    ) -> Comparison:
        """Compare the candidates' gradients with the target where it is not masked."""
        found = self.gradients(rows, inputs, labels, unknowns)
        pairs = [((found[name] * ~masked(goal)).flatten(1), goal.flatten(1)) for name, goal in rows.target.items()]
        return Comparison(rows.goal, tuple(pairs))


def masked(tensor: Tensor) -> Tensor:
    """Return where (T, 1, d) a dense layer's weight gradient (T, C, d) has columns of zeros; nowhere for other tensors.

    Columns of inputs that a ReLU keeps at 0 look alike.
    """
    none = torch.zeros((1,) * tensor.dim(), dtype=torch.bool, device=tensor.device)
    return (tensor == 0).all(1, keepdim=True) if tensor.dim() == 3 else none


@register("drop_layer", version=1)
class DropLayer(InversionAttack):
    """Drop layer: Inverting Gradients without the entries that Soteria pruned, the bypass of Balunovic and others.

    Soteria zeroes columns of one dense layer's weight gradient and leaves the rest as it is. Zeros show which; what a
    candidate's gradient has there is not compared. The rest, convolutions before that layer above all, tells the input.

    Sees: gradients of all layers, weights, number of inputs; labels where granted. It does not ask for the defense.

    Departures: the paper's code gives the whole defended layer weight 0, which it knows by its place in a net
    (``leave_out='tensor'`` here); the columns that are left are exact, so that leaving out the masked ones alone keeps
    more. Objective, prior and optimiser are those of ``inverting_gradients``.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation.
        lr: Learning rate of Adam.
        restarts: Random initialisations.
        labels: Label attack that runs first where labels are not granted.
        leave_out: ``columns`` of zeros of dense layers, or every ``tensor`` that has one.

    Reference: Balunović, Dimitrov, Staab, Vechev, "Bayesian Framework for Gradient Leakage", ICLR 2022,
    arXiv 2111.04706
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "llg",
        leave_out: str = "columns",
    ) -> None:
        if leave_out not in LEFT_OUT:
            raise UserError(f"drop_layer: leave_out: expected 'columns' or 'tensor', got {leave_out!r}; write columns")
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.labels = labels
        self.leave_out = leave_out
        self.inversion = cosine_inversion(
            steps=steps, tv=tv, lr=lr, restarts=restarts, labels=labels, source=Unmasked(leave_out)
        )

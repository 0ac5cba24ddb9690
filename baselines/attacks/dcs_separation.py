"""Inverting Gradients against DCS: private and made examples are searched together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, NotGranted, Observation, Recovery, register
from leakbench.inversion import (
    Comparison,
    Inversion,
    InversionAttack,
    OneStep,
    Rows,
    cosine_inversion,
)

LEAVES = ("made", "made_labels")


@register("dcs_separation", version=1)
class DCSSeparation(InversionAttack):
    """DCS separation: inverts the gradient of twice as many examples, and claims those that are not the made ones.

    Whoever knows DCS knows what the client's loss looks like: every private example has a made one beside it, with a
    label that is part wrong and part its own. Inputs of both and the wrong labels are optimised together so that the
    gradient of that loss has the direction of the update. The label tells a private example from its made one, and
    only what is private has to be smooth.

    Sees: gradients of all layers, weights, number of inputs; the defense, and labels where granted. Without DCS it is
    ``inverting_gradients``. An update of several local steps is matched by one gradient; the rare turn of a gradient
    that works against the private batch is not simulated.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation of private inputs.
        lr: Learning rate of Adam, as in ``inverting_gradients``; made inputs take the same, without the sign.
        restarts: Random initialisations.
        labels: Label attack that runs first where labels are not granted.

    Reference: none; the adaptive attack on Wu, Hayat, Zhou, Harandi, AAAI 2024, arXiv 2209.05724, that its knowledge
    of the client's loss suggests
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "llg",
    ) -> None:
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.labels = labels
        self.inversion = cosine_inversion(steps=steps, tv=tv, lr=lr, restarts=restarts, labels=labels)

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion of private and made examples, where the defense makes any."""
        try:
            found = [part.params() for part in knowledge.defense.parts if getattr(part, "name", "") == "dcs"]
        except NotGranted:
            found = []
        if not found:
            return self.inversion
        shape = (knowledge.total_inputs, *knowledge.input_spec.shape)
        middle = sum(float(bound.mean()) for bound in knowledge.bounds) / 2
        source = WithMade(
            wrong=float(str(found[0]["lam_y"])), shape=shape, classes=knowledge.num_classes, middle=middle
        )
        return replace(self.inversion, source=source)

    def run(self, observation: Observation) -> Recovery:
        """Optimise private inputs (T, K * N, *input_shape) and those made for them."""
        recovery = super().run(observation)
        return replace(recovery, notes={k: v for k, v in recovery.notes.items() if k not in LEAVES})


@dataclass(frozen=True, kw_only=True)
class WithMade(OneStep):
    """The gradient of all inputs and as many made ones at the weights that were sent out.

    Args:
        wrong: Weight of the made inputs' wrong labels.
        shape: (N, *input_shape).
        classes: C.
        middle: Where made inputs start.
    """

    wrong: float
    shape: tuple[int, ...]
    classes: int
    middle: float

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:
        """Return start values of the made inputs (Q, N, *input_shape) and of their wrong labels' logits (Q, N, C)."""
        made = like.new_full((len(like), *self.shape), self.middle)
        return {"made": made, "made_labels": like.new_zeros(len(like), self.shape[0], self.classes)}

    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `leakbench.inversion.Source.gradients`."""
        union, soft = self._union(inputs, labels, unknowns)
        return super().gradients(rows, union, soft, unknowns)

    def compare(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor], *, elementwise: bool
    ) -> Comparison:
        """Compare with the target."""
        if elementwise:
            return super().compare(rows, inputs, labels, unknowns, elementwise=True)
        union, soft = self._union(inputs, labels, unknowns)
        return super().compare(rows, union, soft, unknowns, elementwise=False)

    def _union(self, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return all inputs (Q, 2N, *input_shape) and their soft labels (Q, 2N, C), made ones first."""
        soft = labels if labels.dim() == 3 else F.one_hot(labels, self.classes).to(inputs.dtype)
        wrong = unknowns["made_labels"].softmax(-1)
        mixed = self.wrong * wrong + (1 - self.wrong) * soft
        return torch.cat([unknowns["made"], inputs], 1), torch.cat([mixed, soft], 1)

"""InstaHide in two stages: encodings from gradients, private images from the encodings' absolute values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, NotGranted, Observation, Recovery, UserError, register
from leakbench.inversion import Adam, Comparison, Cosine, Inversion, OneStep, Rows, TotalVariation

REFERENCE = "instahide/mean"
MIX = "mix"


@register("instahide_decode", version=1)
class InstaHideDecode(Attack):
    """InstaHide decoding: inverts every round's gradient, then solves |weights @ images| = |encodings|.

    The first stage looks for inputs of either sign, and mixtures of the batch's labels, whose gradient has the
    direction of the update. An absolute value removes InstaHide's signs. The absolute values of all encodings are
    mixtures of the same few images: images and weights (each row sums to 1, none above what the defense allows) are
    fitted together by least squares, the best of several starts. If the same batch was sent in several rounds, each has
    fresh weights and signs and adds equations; one round has as many as there are images, and only the bounds of pixels
    and weights tell solutions apart. The absolute value of a single input is claimed itself, each pixel with the sign
    that is possible or, where both are, nearer to the auxiliary mean.

    Sees: gradients of all layers in all rounds, weights, number of inputs; labels and auxiliary data where granted.
    Behind an aggregate, or an update of several local steps, each round is matched by one gradient.

    A re-implementation: the paper clusters encodings with a learned similarity and assigns them before it solves for
    images, for thousands of encodings; a batch's encodings all hold the same few images, so that step falls away.

    Args:
        steps: Iterations of the first stage, of all rounds together; fewer where the suite's budget of gradient
            evaluations ends earlier.
        tv: Weight of the total variation of absolute values.
        lr: Learning rate of Adam in the first stage.
        labels: Label attack that runs first where labels are not granted.
        starts: Of the second stage.
        fits: Iterations of the second stage.

    Reference: Carlini, Deng, Garg, Jha, Mahloujifar, Mahmoody, Song, Thakurta, Tramèr, "Is Private Learning Possible
    with Instance Encoding?", IEEE S&P 2021, arXiv 2011.05315
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size", "weights"})

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        labels: str = "llg",
        starts: int = 8,
        fits: int = 600,
    ) -> None:
        if min(steps, starts, fits) < 1:
            raise UserError(
                f"instahide_decode: expected steps, starts and fits of at least 1, got {steps}, {starts} and {fits}"
            )
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.labels = labels
        self.starts = starts
        self.fits = fits

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Prepare the label attack, and average auxiliary inputs where they are granted."""
        prepared = self._inversion(knowledge, self.steps).prepare(knowledge)
        try:
            return prepared | {REFERENCE: knowledge.auxiliary[0].mean(0)}
        except NotGranted:
            return prepared

    def run(self, observation: Observation) -> Recovery:
        """Recover inputs (T, K * N, *input_shape)."""
        # Every encoding of one input has the same absolute values: the last round is as good as all.
        several = observation.clients == 1 and len(observation.updates) > 1 and observation.total_inputs > 1
        seen = [observation]
        if several:
            seen = [
                observation.isolated(update, 0, index).with_prepared(observation.prepared)
                for index, update in enumerate(observation.updates)
            ]
        steps = self.steps if observation.budget is None else min(self.steps, observation.budget)
        each = max(1, steps // len(seen) - 1)
        found = [self._inversion(one, each).run(one) for one in seen]
        encodings = torch.cat(
            [signed(recovery.inputs, observation) for recovery in found if recovery.inputs is not None], 1
        )
        low, high = (bound.to(encodings) for bound in observation.bounds)
        if observation.total_inputs > 1:
            inputs = self._decoded(encodings.abs(), observation)
        else:
            inputs = self._with_signs(encodings[:, -observation.total_inputs :].abs(), observation)
        return Recovery(
            inputs=torch.minimum(torch.maximum(inputs, low), high),
            visible_loss=found[-1].visible_loss,
            model_evaluations=sum(recovery.model_evaluations or 0 for recovery in found),
        )

    def _inversion(self, knowledge: Knowledge, steps: int) -> Inversion:
        return Inversion(
            objective=Cosine(),
            priors=(AbsoluteVariation(weight=self.tv),),
            optimiser=Adam(lr=self.lr, sign="hard", schedule="steps"),
            steps=steps,
            labels=self.labels,
            source=EitherSign(count=knowledge.total_inputs, classes=knowledge.num_classes),
        )

    def _with_signs(self, sizes: Tensor, observation: Observation) -> Tensor:
        """Return absolute values with the signs that are possible and likely."""
        low, high = (bound.to(sizes) for bound in observation.bounds)
        reference = observation.prepared.get(REFERENCE)
        nearer = sizes if reference is None else torch.where(reference.to(sizes) < 0, -sizes, sizes)
        return torch.where(-sizes < low, sizes, torch.where(sizes > high, -sizes, nearer))

    def _decoded(self, sizes: Tensor, observation: Observation) -> Tensor:
        """Return the images (T, N, *input_shape) of which absolute encodings (T, E, *input_shape) are mixtures."""
        trials, count = len(sizes), observation.total_inputs
        wanted = sizes.flatten(2)[:, None]
        low, high = (bound.to(wanted).expand(sizes.shape[2:]).flatten() for bound in observation.bounds)
        start = observation.rand(self.starts, count, wanted.shape[3]).to(wanted)
        guess = wanted[:, :, : max(1, count)].mean(2, keepdim=True) * (0.5 + start)
        images = torch.minimum(torch.maximum(guess, low), high).requires_grad_()
        logits = observation.randn(self.starts, wanted.shape[2], count).to(wanted).requires_grad_()
        optimiser = torch.optim.Adam([{"params": [images], "lr": 0.03}, {"params": [logits], "lr": 0.1}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.fits)
        largest = _largest(observation)

        def misfit(images: Tensor, weights: Tensor) -> Tensor:
            above = (weights - largest).clamp(min=0).square().mean((2, 3))
            return ((weights @ images).abs() - wanted).square().mean((2, 3)) + above

        for _ in range(self.fits):
            error = misfit(images, logits.softmax(3))
            images.grad, logits.grad = torch.autograd.grad(error.sum(), [images, logits])
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                images.copy_(torch.minimum(torch.maximum(images, low), high))
        with torch.no_grad():
            error = misfit(images, logits.softmax(3)).nan_to_num(math.inf)
        best = images.detach()[torch.arange(trials, device=images.device), error.argmin(1)]
        return best.view(trials, count, *sizes.shape[2:])


def _largest(knowledge: Knowledge) -> float:
    """Return the greatest weight that InstaHide allows, where the defense is granted and it is a part; else 1."""
    try:
        found = [
            part.params()["largest"] for part in knowledge.defense.parts if getattr(part, "name", "") == "instahide"
        ]
    except NotGranted:
        return 1.0
    return float(str(found[0])) if found else 1.0


@dataclass(frozen=True, kw_only=True)
class AbsoluteVariation(TotalVariation):
    """Total variation of absolute values."""

    def __call__(self, inputs: Tensor, rows: Rows) -> Tensor:
        """Return the penalty of every row, (Q,)."""
        return super().__call__(signed(inputs, rows.observation).abs(), rows)


@dataclass(frozen=True, kw_only=True)
class EitherSign(OneStep):
    """The gradient of inputs of either sign, for which those between the bounds stand, and of mixed labels.

    Args:
        count: N.
        classes: C.
    """

    count: int
    classes: int

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:
        """Return start values of the logits (Q, N, N) of which labels are mixed with which weights."""
        own = torch.eye(self.count, dtype=like.dtype, device=like.device)
        return {MIX: own.expand(len(like), -1, -1).clone()}

    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `leakbench.inversion.Source.gradients`."""
        return super().gradients(
            rows, signed(inputs, rows.observation), self._mixed(labels, inputs, unknowns), unknowns
        )

    def compare(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor], *, elementwise: bool
    ) -> Comparison:
        """Compare with the target."""
        if elementwise:
            return super().compare(rows, inputs, labels, unknowns, elementwise=True)
        mixed = self._mixed(labels, inputs, unknowns)
        return super().compare(rows, signed(inputs, rows.observation), mixed, unknowns, elementwise=False)

    def _mixed(self, labels: Tensor, inputs: Tensor, unknowns: Mapping[str, Tensor]) -> Tensor:
        """Return probabilities (Q, N, C)."""
        soft = labels if labels.dim() == 3 else F.one_hot(labels, self.classes).to(inputs.dtype)
        return unknowns[MIX].softmax(-1) @ soft


def signed(inputs: Tensor, knowledge: Knowledge) -> Tensor:
    """Stretch inputs between the bounds to between minus and plus the greatest absolute value."""
    low, high = (bound.to(inputs) for bound in knowledge.bounds)
    most = torch.maximum(low.abs(), high.abs())
    return (2 * (inputs - low) / (high - low) - 1) * most

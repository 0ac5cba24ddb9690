"""Membership inference: whether one example's gradient is part of what was sent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from leakbench_baselines.attacks.property_inference import MEMORY, changed, fitted_scores, shuffled, simulated
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, NotApplicable, Observation, Recovery, UserError, register

LIMIT = 1e30
"""Largest number read: updates of any size stay finite in float32."""
RULES = ("loss", "gradient_norm", "cosine", "inner", "nasr")


@register("membership_inference", version=1)
class MembershipInference(Attack):
    """Membership inference: thresholds on one number, or a net on the gradients of every layer.

    What is read of an update and a candidate: how much the update lowers the candidate's `loss`, or its
    `gradient_norm`; the `cosine` between the update and the candidate's gradient, or their `inner` product; or, for
    `nasr`, per layer both norms, cosine and inner product, with loss and gradient norm on top. Clients that are
    simulated on auxiliary data, the granted defense included, decide the threshold at which a claim of .5 is best
    balanced, and how sure a distance from it is; for `nasr` they train the net.

    Sees: updates, weights, batch size, candidates, auxiliary data, learning rate and number of local steps where more
    than a gradient is sent; the defense where it is granted. Not for nets in which an example's gradient depends on the
    others of its batch (BatchNorm in train mode).

    A re-implementation: the works read a model that many rounds have trained, here it is one update whose examples are
    asked for. So loss and gradient norm are compared before and after the update, of a gradient after one step of
    length `step`; and the net of `nasr` reads the numbers above instead of convolving over whole gradients, with one
    hidden layer of 64 and Platt scaling by cross-validation. Clients that differ in size are simulated with their mean
    size.

    Args:
        rule: What is read, see above.
        simulations: Updates to simulate; each is asked about one of its examples and one other.
        step: Learning rate with which `loss` and `gradient_norm` follow a gradient.

    Reference: Nasr, Shokri, Houmansadr, "Comprehensive Privacy Analysis of Deep Learning: Passive and Active White-box
    Inference Attacks against Centralized and Federated Learning", IEEE S&P 2019, arXiv 1812.00910; loss: Yeom,
    Giacomelli, Fredrikson, Jha, CSF 2018, arXiv 1709.01604
    """

    recovers = frozenset({"membership"})
    needs = frozenset({"auxiliary", "batch_size", "weights"})

    def __init__(self, *, rule: str = "cosine", simulations: int = 200, step: float = 0.1) -> None:
        if rule not in RULES or simulations < 20 or step <= 0:
            raise UserError(
                f"membership_inference: expected rule out of {', '.join(RULES)}, simulations >= 20 and step > 0, got "
                f"{rule!r}, {simulations}, {step}; write membership_inference(rule='cosine')"
            )
        self.rule = rule
        self.simulations = simulations
        self.step = step

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Return ``features`` (M, 2 s, F) of simulated updates with a member or another example, ``truth`` (2 s,)."""
        if knowledge.examples_interact:
            raise NotApplicable(
                "membership_inference: no example has a gradient of its own under BatchNorm in train mode"
            )
        inputs, labels = knowledge.auxiliary
        total, clients = knowledge.inputs_per_client, knowledge.clients
        if len(labels) <= total:
            raise NotApplicable(
                f"membership_inference: expected more auxiliary examples than a client's {total}, got {len(labels)}"
            )
        every = torch.arange(len(labels), device=labels.device)
        drawn = [shuffled(knowledge, every, clients * total + 1) for _ in range(self.simulations)]
        order = torch.stack(drawn, 1)
        picks = order[:, :, : clients * total].reshape(knowledge.trials, self.simulations, clients, total)
        # The next one of the order, which no client has; where it has begun anew, one that the first has not.
        other = order[:, :, min(clients * total, len(labels) - 1)]
        asked = torch.stack([order[:, :, 0], other])  # (2, M, s): a member, and another

        def read(part: slice, change: dict[str, Tensor]) -> Tensor:
            both = [one[:, part].flatten() for one in asked]
            told = [self._numbers(knowledge, change, inputs[one], labels[one]) for one in both]
            return torch.stack(told, 1).flatten(1)

        features = simulated(knowledge, picks, read)
        truth = torch.tensor([1, 0], device=labels.device).repeat(self.simulations)
        return {"features": features.reshape(len(features), 2 * self.simulations, -1), "truth": truth}

    def run(self, observation: Observation) -> Recovery:
        """Read the numbers of every trial and turn them into probabilities."""
        numel = sum(value[0].numel() for value in observation.model.parameters.values())
        step = max(1, MEMORY // numel)
        parts = []
        for first in range(0, observation.trials, step):
            seen = observation.block(first, min(first + step, observation.trials))
            parts.append(self._numbers(seen, changed(seen, seen.update), *seen.candidates))
        features, prepared = torch.cat(parts), observation.prepared
        if self.rule == "nasr":
            return Recovery(scores=fitted_scores(_net, prepared, features), model_evaluations=3)
        known, truth = prepared["features"][..., 0].double(), prepared["truth"]
        mine = features[:, 0].double()
        rows = [mine] if len(known) == 1 else mine[:, None]
        scores = [calibrated(one, truth, row) for one, row in zip(known, rows, strict=True)]
        return Recovery(scores=torch.cat(scores), model_evaluations=3)

    def _numbers(self, knowledge: Knowledge, change: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """Return what the rule reads of updates (R, *shape) and one candidate each, (R, F) float32."""
        read = partial(self._read, knowledge, change, inputs[:, None], labels[:, None])
        if self.rule != "nasr":
            return _bounded(read(self.rule))[:, None]
        own = self._gradient(knowledge, inputs[:, None], labels[:, None])
        layers = [
            number
            for name, gradient in own.items()
            for number in _compared(change[name].double().flatten(1), gradient.double().flatten(1))
        ]
        return torch.stack([_bounded(value) for value in (*layers, read("loss"), read("gradient_norm"))], 1)

    def _read(
        self, knowledge: Knowledge, change: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, rule: str
    ) -> Tensor:
        """Return one number (R,) of updates and their candidates (R, 1, ...); more speaks for a member."""
        if rule in ("cosine", "inner"):
            own = self._gradient(knowledge, inputs, labels)
            flat = (torch.cat([part[name].double().flatten(1) for name in own], 1) for part in (change, own))
            _, _, inner, cosine = _compared(*flat)
            return cosine if rule == "cosine" else inner
        before, length = knowledge.model, self.step if knowledge.sends == "gradient" else 1.0
        moved = {name: value - length * change[name].nan_to_num() for name, value in before.parameters.items()}
        after = before.with_state(parameters=moved)

        def level(model: Any) -> Tensor:
            if rule == "gradient_norm":
                own = self._gradient(knowledge, inputs, labels, model=model)
                return torch.stack([value.double().flatten(1).square().sum(1) for value in own.values()]).sum(0).sqrt()
            logits, _ = knowledge.forward(inputs, model=model)
            return F.cross_entropy(logits[:, 0].double(), labels[:, 0], reduction="none")

        return level(before) - level(after)

    def _gradient(self, knowledge: Knowledge, inputs: Tensor, labels: Tensor, model: Any = None) -> dict[str, Tensor]:
        return knowledge.gradients(inputs, labels, create_graph=False, model=model)


def _compared(update: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return norms, inner product and cosine of rows (R, n), (R,) each."""
    update = update.nan_to_num()
    norms = update.norm(dim=1), own.norm(dim=1)
    inner = (update * own).sum(1)
    return *norms, inner, inner / (norms[0] * norms[1]).clamp(min=torch.finfo(torch.float64).tiny)


def _bounded(values: Tensor) -> Tensor:
    return values.detach().nan_to_num(0, LIMIT, -LIMIT).clamp(-LIMIT, LIMIT).float()


def _net() -> CalibratedClassifierCV:
    net = MLPClassifier(64, early_stopping=True, max_iter=300, random_state=0)
    return CalibratedClassifierCV(net, method="sigmoid", cv=5, ensemble=False)


def calibrated(known: Tensor, truth: Tensor, asked: Tensor) -> Tensor:
    """Return probabilities (T,) float64 that rise with ``asked``; .5 where the balanced accuracy on ``known`` is best.

    Args:
        known: (n,) numbers of simulated updates.
        truth: (n,) 0 or 1.
        asked: (T,) numbers of the trials.
    """
    false, true, levels = roc_curve(truth.cpu().numpy(), known.cpu().numpy())
    best = int(np.argmax(true - false))
    if best == 0:  # no threshold is better than a coin
        return torch.full((len(asked),), 0.5, dtype=torch.float64)
    below = known[known < levels[best]]
    middle = float(levels[best]) if len(below) == 0 else (float(levels[best]) + float(below.max())) / 2
    spread = float((known - middle).abs().median()) or 1.0
    distance = torch.asinh((known - middle) / spread).cpu().numpy()[:, None]
    slope = float(LogisticRegression(fit_intercept=False).fit(distance, truth.cpu().numpy()).coef_[0, 0])
    return torch.sigmoid(max(slope, 0.0) * torch.asinh((asked - middle) / spread)).cpu()

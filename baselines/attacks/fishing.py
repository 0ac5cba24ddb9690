"""Fishing for user data: a planted last layer lets one example of a large batch dominate the averaged gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from leakbench_baselines.attacks.random_image import uniform_pixels
from torch import Tensor

from leakbench import Cohort, Knowledge, Model, NotApplicable, Observation, Recovery, UserError, register
from leakbench.inversion import (
    Adam,
    Comparison,
    Cosine,
    Inversion,
    InversionAttack,
    OneStep,
    Pixels,
    Rows,
    TotalVariation,
)

MODES = ("class", "feature")
PROBES = 64
"""Random inputs that stand for the clients' where no auxiliary ones are granted."""
LEVELS = 16
"""Most thresholds of feature fishing; a round beyond repeats the last one."""
CERTAIN = 1e5
"""Bias of a class that is as good as certain."""
SATURATED = 20.0
"""Least gap of logits at which a softmax counts as 0."""


@register("fishing", version=1)
class Fishing(InversionAttack):
    """Fishing: the last layer magnifies one example's gradient, and a passive inversion takes the sum for that example.

    Class fishing: the target class has the same small weight for every feature, the other classes have weight 0 and a
    large bias. Only an example whose label is the target class then sends a gradient below the last layer; if there is
    one, that gradient is the batch's. Feature fishing: the weights of the target class are so large that its
    probability jumps from 0 to 1 where the mean feature passes a threshold. Of other labels only examples above it send
    a gradient, of the target class only those below: the difference between two rounds is the examples between their
    thresholds, whatever their labels. The first threshold is the auxiliary quantile that one of the n examples is
    expected to pass, the second is out of reach, every further one lets one more pass; what is nearest to one example
    is taken. With a single round an absent class is hoped for.

    Both work on aggregates, with one model for all clients. The inversion matches one example's gradient, of the last
    layer only the target class's row, by cosine distance and total variation as in inverting_gradients. For a gradient
    the note ``hooked`` tells how many examples it belongs to (in one round of feature fishing: how many more above than
    below).

    Sees: gradients of all layers, or their change over local steps (one step is exact); weights; number of inputs; for
    feature fishing auxiliary inputs.

    Departures: the authors fish for one feature, here it is the mean of all: without global pooling one feature sees a
    patch. Its multiplier is per standard deviation. The authors add the bias of 1000 to feature fishing too, which
    moves the threshold by 1000 / 300. They take the labels as known, and every query's answer chooses the next
    threshold; here one model is for all trials, and thresholds are set beforehand.

    Args:
        mode: ``class`` or ``feature``.
        target_class: Class that is fished for. None: by the class prior, the one likeliest to occur exactly once; in
            one round of feature fishing the rarest.
        class_multiplier: Weight of the target class in class fishing.
        feat_multiplier: Its weight in feature fishing, per standard deviation of the mean feature.
        bias: Bias of the other classes in class fishing.
        steps: Iterations.
        tv: Weight of the total variation.
        lr: Learning rate of Adam.
        restarts: Random initialisations.

    Reference: Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch Federated Learning via
    Gradient Magnification", ICML 2022, arXiv 2202.00580
    """

    needs = frozenset({"batch_size", "change_parameters", "head_bias", "weights"})

    def __init__(
        self,
        *,
        mode: str = "class",
        target_class: int | None = None,
        class_multiplier: float = 0.5,
        feat_multiplier: float = 300.0,
        bias: float = 1000.0,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"fishing: mode: expected {' or '.join(MODES)}, got {mode!r}; write mode='class'")
        if not all(0 < value < math.inf for value in (class_multiplier, feat_multiplier, bias)):
            raise UserError(
                "fishing: expected class_multiplier, feat_multiplier and bias above 0, got "
                f"{class_multiplier}, {feat_multiplier}, {bias}; write fishing(class_multiplier=0.5)"
            )
        if target_class is not None and target_class < 0:
            raise UserError(f"fishing: target_class: expected a class from 0, got {target_class}; write target_class=0")
        self.mode = mode
        self.target_class = target_class
        self.class_multiplier = class_multiplier
        self.feat_multiplier = feat_multiplier
        self.bias = bias
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.inversion = Inversion(
            objective=Cosine(),
            priors=(TotalVariation(weight=tv),),
            optimiser=Adam(lr=lr, sign="hard", schedule="steps"),
            space=OneInput(),
            steps=steps,
            restarts=restarts,
            labels="joint",  # not used: the source knows the class
        )

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Choose the ``class`` (), its planted ``weight`` (d,), and ``bias`` (R, 2): its own and the others', by round.

        Raises:
            NotApplicable: The examples of a batch depend on each other, the planted layer does not separate them, or
                its threshold would depend on the weights, of which each trial has its own.
        """
        if knowledge.examples_interact:
            raise NotApplicable("fishing: BatchNorm in train mode mixes the examples' gradients; use batch_norm: eval")
        if self.target_class is not None and self.target_class >= knowledge.num_classes:
            raise NotApplicable(f"fishing: target_class={self.target_class}: there are {knowledge.num_classes} classes")
        planted = self._class_hook(knowledge) if self.mode == "class" else self._feature_hook(knowledge)
        return super().prepare(knowledge) | planted

    def plant(self, model: Model, cohort: Cohort, history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the last layer's weight (1, C, d) and bias (1, C)."""
        prepared = cohort.prepared
        own, others = prepared["bias"][min(len(history), len(prepared["bias"]) - 1)]
        head = last_layer(model, int(prepared["class"]), prepared["weight"], float(others))
        head[f"{model.head}.bias"][:, int(prepared["class"])] = own
        return head

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion that knows the class."""
        if not isinstance(knowledge, Observation):
            return self.inversion
        return replace(
            self.inversion, source=Hooked(target_class=int(knowledge.prepared["class"]), weight=self.class_multiplier)
        )

    def run(self, observation: Observation) -> Recovery:
        """Invert one input (T, 1, *input_shape)."""
        recovery, examples = super().run(observation), hooked(observation)[1]
        return recovery if examples is None else replace(recovery, notes={**recovery.notes, "hooked": examples})

    def _class_hook(self, knowledge: Knowledge) -> dict[str, Tensor]:
        total = knowledge.total_inputs
        features = _features(knowledge)
        sums = features.sum(-1)
        if bool((self.class_multiplier * sums).max() > self.bias - SATURATED):
            raise NotApplicable(
                f"fishing: the sum of the features, up to {float(sums.max()):.0f}, outweighs the bias; "
                "lower class_multiplier, or raise bias"
            )
        prior = _prior(knowledge)
        once = prior.clamp(1e-12, 1 - 1e-12)
        once = once.log() + (total - 1) * (1 - once).log()
        chosen = int(once.argmax()) if self.target_class is None else self.target_class
        width = features.shape[-1]
        return {
            "class": torch.tensor(chosen),
            "weight": torch.full((width,), self.class_multiplier),
            "bias": torch.tensor([[0.0, self.bias]]),
        }

    def _feature_hook(self, knowledge: Knowledge) -> dict[str, Tensor]:
        _ = knowledge.auxiliary  # declines the task where it is withheld
        if knowledge.model.draws > 1:
            raise NotApplicable("fishing: the threshold depends on the weights; use model_draws: one")
        features = _features(knowledge)[0].double()
        width = features.shape[-1]
        means = features.mean(-1)
        deviation = float(means.std())
        if not deviation > torch.finfo(knowledge.model.dtype).eps * float(means.abs().max()) * self.feat_multiplier:
            raise NotApplicable("fishing: the mean feature is the same for all auxiliary inputs; choose another net")
        total = max(2, knowledge.total_inputs)
        levels = means.quantile(1 - torch.arange(1, min(total, LEVELS)).to(means) / total)
        beyond = means.max() + (means.max() - means.min())
        thresholds = torch.cat([levels[:1], beyond[None], levels[1:]])
        scale = self.feat_multiplier / deviation
        chosen = int(_prior(knowledge).argmin()) if self.target_class is None else self.target_class
        own = -scale * thresholds
        return {
            "class": torch.tensor(chosen),
            "weight": torch.full((width,), scale / width),
            "bias": torch.stack([own, torch.zeros_like(own)], 1).float(),
        }


@dataclass(frozen=True, kw_only=True)
class OneInput(Pixels):
    """One input, whatever the batch."""

    def start(self, observation: Observation, restarts: int, count: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the start value of one input a row."""
        return super().start(observation, restarts, 1)


@dataclass(frozen=True, kw_only=True)
class Hooked(OneStep):
    """The gradient of one example of the target class at the class-fishing layer, whatever layer was planted.

    Of the last layer only the target class's row is seen: the example's features.

    Args:
        target_class: What was fished for.
        weight: Of the features.
    """

    target_class: int = 0
    weight: float = 0.5

    def target(self, observation: Observation, units: str) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the direction of what was fished out, (T, *shape) by parameter name."""
        found, _ = hooked(observation)
        head, planted = f"{observation.model.head}.weight", float(observation.prepared["weight"][0])
        seen = {
            k: v * (self.weight / planted) for k, v in found.items() if not k.startswith(f"{observation.model.head}.")
        }
        row, rows = found[head][:, self.target_class], torch.zeros_like(found[head])
        rows[:, self.target_class], rows[:, self._other(observation.num_classes)] = row, -row
        seen[head] = rows
        length = torch.cat([value.flatten(1) for value in seen.values()], 1).double().norm(dim=1)
        length = length.where(length > 0, 1)
        return {k: (v / length.view(-1, *(1,) * (v.dim() - 1))).to(v.dtype) for k, v in seen.items()}

    def gradients(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,  # noqa: ARG002  (known)
        unknowns: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `Source.gradients`."""
        return super().gradients(self._matched(rows), inputs, self._classes(inputs), unknowns)

    def compare(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,  # noqa: ARG002  (known)
        unknowns: Mapping[str, Tensor],
        *,
        elementwise: bool,
    ) -> Comparison:
        """Compare the candidates' gradients with the target."""
        classes = self._classes(inputs)
        return super().compare(self._matched(rows), inputs, classes, unknowns, elementwise=elementwise)

    def _matched(self, rows: Rows) -> Rows:
        """Return rows with a last layer whose loss is linear in the features: one other class takes all probability."""
        model = rows.model
        weight = torch.full(model.parameters[f"{model.head}.weight"].shape[2:], self.weight)
        head = last_layer(model, self.target_class, weight, 0.0)
        head[f"{model.head}.bias"][:, self._other(model.num_classes)] = CERTAIN
        return replace(rows, model=model.with_state(head))

    def _other(self, num_classes: int) -> int:
        return (self.target_class + 1) % num_classes

    def _classes(self, inputs: Tensor) -> Tensor:
        return torch.full(inputs.shape[:2], self.target_class, device=inputs.device)


def last_layer(model: Model, target_class: int, weight: Tensor, bias: float) -> dict[str, Tensor]:
    """Return a last layer of weight 0 and ``bias``, but for one class of ``weight`` (d,) and bias 0."""
    zeros = torch.zeros_like(model.parameters[f"{model.head}.weight"][:1])
    zeros[:, target_class] = weight.to(zeros)
    biases = torch.full_like(model.parameters[f"{model.head}.bias"][:1], bias)
    biases[:, target_class] = 0
    return {f"{model.head}.weight": zeros, f"{model.head}.bias": biases}


def hooked(observation: Observation) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the change of the weights by what was fished out, and how many examples (T,) that is, where it shows.

    Of several rounds of feature fishing it is the difference between neighbouring thresholds that is nearest to one
    example. The sign is that of the target class's own examples; the others give the opposite.
    """
    changes = [observation.difference(update) for update in observation.updates]
    rounds = min(len(changes), len(observation.prepared["bias"]))
    order = [1, 0, *range(2, rounds)][:rounds]  # by descending threshold, see `Fishing._feature_hook`
    bins = [{name: changes[low][name] - changes[high][name] for name in changes[0]} for high, low in pairwise(order)]
    bins = bins or changes[:1]
    if observation.sends != "gradient":  # the planted bias leaves no digits of its change
        side = 1 if len(observation.prepared["bias"]) == 1 else -1
        return {name: side * value for name, value in bins[0].items()}, None
    own = f"{observation.model.head}.bias", int(observation.prepared["class"])
    total = observation.total_inputs if observation.reduction == "mean" else observation.clients
    counts = torch.stack([total * change[own[0]][:, own[1]].nan_to_num() for change in bins])
    best = (counts.abs() - 1).abs().argmin(0)
    trial = torch.arange(len(best), device=best.device)
    found = {name: torch.stack([change[name] for change in bins])[best, trial] for name in bins[0]}
    sign = -counts[best, trial].sign()
    return {name: sign.view(-1, *(1,) * (v.dim() - 1)) * v for name, v in found.items()}, counts[best, trial].abs()


def _features(knowledge: Knowledge) -> Tensor:
    """Return features (M, n, d) of auxiliary inputs, of random ones where these are withheld."""
    if knowledge.grants("auxiliary"):
        auxiliary = knowledge.auxiliary[0].to(knowledge.model.dtype)
        inputs = auxiliary.expand(knowledge.model.draws, *auxiliary.shape)
    else:
        inputs = uniform_pixels(knowledge, PROBES, knowledge.model.dtype)
    return knowledge.forward(inputs)[1]


def _prior(knowledge: Knowledge) -> Tensor:
    """Return class frequencies (C,): the prior, those of the auxiliary labels, or equal ones."""
    if knowledge.grants("label_prior"):
        return knowledge.class_prior
    if knowledge.grants("auxiliary"):
        counts = torch.bincount(knowledge.auxiliary[1], minlength=knowledge.num_classes)
        return counts.double() / counts.sum()
    return torch.full((knowledge.num_classes,), 1 / knowledge.num_classes, dtype=torch.float64)

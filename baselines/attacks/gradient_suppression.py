"""Gradient suppression: dead models silence every client but one, so that an aggregate is that client's update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from leakbench_baselines.attacks.bias_count import round_to_total
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.attacks.random_image import uniform_pixels
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Cohort, Knowledge, Model, NotApplicable, Observation, Recovery, UserError, register
from leakbench.inversion import LabelSource

PLANT = "plant/"
PROBES = 16
"""Inputs on which a silenced model's gradient has to vanish."""


@register("gradient_suppression", version=1)
class GradientSuppression(Attack):
    """Gradient suppression: all clients but a target get a model with a dead last layer, which undoes the aggregation.

    A large negative bias, or shift of a normalisation layer, below the last activation makes all features 0: a client's
    gradients vanish but for the last layer's bias, which is left unread. What is read of the aggregate is the target's
    update times its weight; a passive attack then takes it for a single client's. In round r the target is client r, so
    that K rounds give every client's labels; clients whose turn did not come, or who sent nothing, get the class prior.
    Inputs are those of the last round's target.

    Sees: gradient of the last layer's weight, or its change over local steps (a dead layer stays dead, so any number of
    steps); batch sizes; weights. For inputs: all layers but the last one's bias.

    A re-implementation: what makes a layer dead, and which one it is, are choices made here. It is the last layer for
    which silence holds exactly, with half the shift, for random inputs and for auxiliary ones where granted. An
    activation that is 0 in floating point far below 0 will do as well as a ReLU (sigmoid, SiLU, GELU); tanh, ELU and
    transformers, whose last normalisation meets no activation, have no such layer.

    Args:
        labels: Label attack that runs on the isolated update, for labels or before the inversion; it may read no more
            than the last layer's weight.
        shift: How far the layer is shifted below 0.
        steps: Iterations of the inversion, that of inverting_gradients.
        tv: Weight of its total variation.
        lr: Its learning rate.
        restarts: Its random initialisations.

    Reference: Pasquini, Francati, Ateniese, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
    CCS 2022, arXiv 2111.07380
    """

    recovers = frozenset({"labels", "inputs"})
    needs = frozenset({"batch_size", "change_parameters", "per_client", "weights"})
    reads = ("labels:head.weight", "inputs:*")

    def __init__(
        self,
        *,
        labels: str = "llg",
        shift: float = 1e4,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
    ) -> None:
        if not 0 < shift < math.inf:
            raise UserError(f"gradient_suppression: shift: expected above 0, got {shift}; write shift=1e4")
        self.source = LabelSource(labels)
        if self.source.joint:
            raise UserError("gradient_suppression: labels: expected a label attack, got 'joint'; write labels='llg'")
        self.labels = labels
        self.shift = shift
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.passive: Attack = InvertingGradients(steps=steps, tv=tv, lr=lr, restarts=restarts, labels=labels)

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Choose the bias that silences a client, and prepare the passive attack.

        Raises:
            NotApplicable: No bias does, it would depend on the weights, of which each trial has its own, or the label
                attack reads what is not silenced.
        """
        asks = knowledge.target == "labels" or not knowledge.grants("labels")
        if asks and not _read_for_labels(self.source.attack) <= {"head.weight"}:
            raise NotApplicable(f"labels={self.source.name!r} reads more than the head's weight; use labels='llg'")
        passive = self.source if knowledge.target == "labels" else self.passive
        prepared = passive.prepare(knowledge)
        if knowledge.clients == 1:
            return prepared
        if knowledge.model.draws > 1:
            raise NotApplicable("gradient_suppression: a target gets the honest weights; use model_draws: one")
        name = self._silencer(knowledge)
        return prepared | {PLANT + name: torch.full_like(knowledge.model.parameters[name], -self.shift)}

    def plant(self, model: Model, cohort: Cohort, history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the silencing bias (K, d), honest for the target."""
        planted = {}
        for name, dead in _planted(cohort.prepared).items():
            planted[name] = dead.repeat(cohort.clients, *(1,) * (dead.dim() - 1))
            planted[name][len(history) % cohort.clients] = model.parameters[name][0]
        return planted

    def run(self, observation: Observation) -> Recovery:
        """Return label counts (T, K, C), or inputs (T, N of the target, *input_shape)."""
        rounds = len(observation.updates)
        if observation.target == "inputs":
            return self.passive.run(self._alone(observation, rounds - 1))
        classes, sizes = observation.num_classes, observation.client_sizes.tolist()
        prior = torch.full((classes,), 1 / classes, dtype=torch.float64)
        if observation.grants("label_prior"):
            prior = observation.class_prior
        guessed = [round_to_total(prior[None], size) for size in sizes[rounds:]]
        counts = [guess.expand(observation.trials, classes).to(observation.model.device) for guess in guessed]
        found = []
        for index in range(min(rounds, observation.clients)):
            alone = self._alone(observation, index)
            labels = self.source.labels(alone)
            assert labels is not None  # noqa: S101 - not joint
            silent = torch.stack([(v == 0).flatten(1).all(1) for v in alone.difference(alone.update).values()]).all(0)
            guess = round_to_total(prior[None], sizes[index]).to(labels.device)
            found.append(torch.where(silent[:, None], guess, F.one_hot(labels, classes).sum(1)))
        return Recovery(label_counts=torch.stack([*found, *counts], 1))

    def _silencer(self, knowledge: Knowledge) -> str:
        """Return the last bias that silences a client at half the shift already."""
        model = knowledge.model
        inputs = uniform_pixels(knowledge, PROBES, model.dtype)
        if knowledge.grants("auxiliary"):
            inputs = torch.cat([inputs, knowledge.auxiliary[0][None, :PROBES].to(inputs)], 1)
        labels = torch.arange(inputs.shape[1], device=inputs.device)[None] % knowledge.num_classes
        read = [name for name in model.parameters if name != f"{model.head}.bias"]
        for name in reversed(read):
            if not name.endswith(".bias"):
                continue
            dead = model.with_state({name: torch.full_like(model.parameters[name], -self.shift / 2)})
            found = knowledge.gradients(inputs, labels, names=read, create_graph=False, model=dead)
            if not any(bool(value.any()) for value in found.values()):
                return name
        raise NotApplicable(
            "gradient_suppression: needs a bias under the last activation that makes all features 0, as under a "
            "ReLU; choose another net"
        )

    def _alone(self, observation: Observation, index: int) -> Observation:
        """Return what would be seen if the target of round ``index`` had sent its update on its own."""
        if observation.clients == 1:
            return observation
        target, start = index % observation.clients, observation.model.parameters
        weight = float(observation.client_weights[target])
        unread = {f"{observation.model.head}.bias"}
        if observation.sends == "weights":  # the large bias leaves no digits of the target's
            unread |= set(_planted(observation.prepared))
        update = {k: v for k, v in observation.updates[index].items() if k in start and k not in unread}
        if observation.sends == "weights":
            update = {name: start[name] + (value - start[name]) / weight for name, value in update.items()}
        else:
            update = {name: value / weight for name, value in update.items()}
        return observation.isolated(update, target, index).with_prepared(observation.prepared)


def _planted(prepared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PLANT): value for name, value in prepared.items() if name.startswith(PLANT)}


def _read_for_labels(attack: Attack) -> set[str]:
    led = [name.rpartition(":") for name in attack.reads]
    return {pattern for lead, _, pattern in led if lead in ("", "labels")}

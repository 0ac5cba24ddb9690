"""What an attack sees: `Knowledge` plus what the clients sent, or before that plus what it prepared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from leakbench.errors import NotGranted
from leakbench.federation.client import ClientState, batch_order
from leakbench.federation.planting import Planted
from leakbench.knowledge import Knowledge
from leakbench.models.functional import Model


@dataclass(frozen=True)
class Seen:
    """What one block of trials shows the adversary.

    Args:
        updates: One update per round, tensors (T, *shape) by name.
        labels: (T, K, N) private labels in batch order, where granted.
        order: (T, K, local_steps, B) batch order, where granted and not that of the examples themselves.
        prepared: What `Attack.prepare` returned.
        statistics: (T, channels) BatchNorm statistics of the last round, where the grant goes beyond the server's own.
        planted: What clients got, per round; empty where nothing may be planted.
        candidates: Inputs (T, *input_shape) and labels (T,) of whom membership is asked, where that is the target.
    """

    updates: Sequence[Mapping[str, Tensor]]
    labels: Tensor | None = None
    order: Tensor | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    planted: Sequence[Planted] = ()
    candidates: tuple[Tensor, Tensor] | None = None


class Cohort(Knowledge):
    """The clients that a model is planted for: `Knowledge` plus what the attack prepared."""

    def __init__(self, prepared: Mapping[str, Tensor], **knowledge: Any) -> None:
        super().__init__(**knowledge)
        self._prepared = prepared

    @property
    def prepared(self) -> Mapping[str, Tensor]:
        """What `Attack.prepare` returned."""
        return self._prepared


class Observation(Knowledge):
    """`Knowledge` plus what the clients sent."""

    def __init__(self, seen: Seen, **knowledge: Any) -> None:
        super().__init__(**knowledge)
        self._seen = seen

    def block(self, first: int, last: int) -> Observation:
        """Return what is seen of trials ``first`` to ``last`` (exclusive), with fresh streams of the same trials.

        What is drawn from it does not depend on the block's other trials, so work may be cut to fit the memory. What
        was prepared is handed on whole: cut it where it has a model per trial.
        """
        part = slice(first, last)

        def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[part] for name, value in tensors.items()}

        seen = self._seen
        part_of = Observation(
            Seen(
                [cut(update) for update in seen.updates],
                labels=None if seen.labels is None else seen.labels[part],
                order=None if seen.order is None else seen.order[part],
                prepared=seen.prepared,
                statistics=cut(seen.statistics),
                planted=[planted.trials(first, last) for planted in seen.planted],
                candidates=None if seen.candidates is None else (seen.candidates[0][part], seen.candidates[1][part]),
            ),
            facts=self._facts,
            random=self._random.part(first, last),
            model=None if self._model is None else self._model.trials(first, last),
            auxiliary=self._auxiliary,
            auxiliary_attribute=self._auxiliary_attribute,
            defense=self._defense,
            report=self._report,
        )
        part_of._count, part_of._begun = self._count, self.evaluations
        return part_of

    def with_prepared(self, prepared: Mapping[str, Tensor]) -> Observation:
        """Return the same observation for an attack that another one runs, with what it prepared."""
        other = copy(self)
        other._seen = replace(self._seen, prepared=prepared)
        return other

    @property
    def update(self) -> Mapping[str, Tensor]:
        """The last round's update: tensors (T, *shape) by parameter name, restricted to what the attack `reads`."""
        return self._seen.updates[-1]

    @property
    def updates(self) -> Sequence[Mapping[str, Tensor]]:
        """The updates of all rounds, oldest first."""
        return self._seen.updates

    @property
    def model(self) -> Model:
        """The model that the clients got in the last round, M = 1 or T; the honest one where theirs differ."""
        honest = super().model
        planted = self._seen.planted
        return honest if not planted or planted[-1].differs else planted[-1].model_of(0)

    @property
    def planted(self) -> Mapping[str, Tensor]:
        """What this attack replaced in the last round: leading dimension 1, K, or, where K = 1, T."""
        return self.plants[-1] if self._seen.planted else {}

    @property
    def plants(self) -> Sequence[Mapping[str, Tensor]]:
        """What this attack replaced in every round, oldest first."""
        return [planted.tensors for planted in self._seen.planted]

    def client_model(self, client: int, round_index: int = -1) -> Model:
        """Return what client ``client`` (from 0) of every trial got in a round, M = 1 or T."""
        honest, planted = super().model, self._seen.planted
        return planted[round_index].model_of(client) if planted else honest

    def isolated(self, update: Mapping[str, Tensor], client: int, round_index: int = -1) -> Observation:
        """Return what would be seen if client ``client`` had sent ``update`` on its own, so that any attack can run.

        BatchNorm statistics that were granted beyond the server's own are those of the aggregate, and not handed on.

        Args:
            update: (T, *shape) by name, in the units of what is sent.
            client: Which one, from 0; its model and its number of examples are taken.
            round_index: The round whose model it is.
        """
        seen, each = self._seen, self._facts.client_sizes
        own = self._facts.inputs_per_client if each is None else each[client]
        facts = replace(
            self._facts,
            clients=1,
            client_sizes=None,
            inputs_per_client=own,
            batch_size=None if own is None else own // self._local_batches,
            granted=self._facts.granted - ({"bn_statistics"} if seen.statistics else set()),
            protocol=self._facts.protocol.model_copy(update={"clients": 1, "weighting": "equal"}),
        )
        alone = Observation(
            Seen(
                [update],
                labels=None if seen.labels is None else seen.labels[:, client : client + 1],
                order=None if seen.order is None else seen.order[:, client : client + 1],
                candidates=seen.candidates,
            ),
            facts=facts,
            random=self._random.at("client", client),
            model=None if self._model is None else self.client_model(client, round_index),
            auxiliary=self._auxiliary,
            auxiliary_attribute=self._auxiliary_attribute,
            defense=self._defense,
            report=self._report,
        )
        alone._count = self._count
        return alone

    @property
    def prepared(self) -> Mapping[str, Tensor]:
        """What `Attack.prepare` returned."""
        return self._seen.prepared

    @property
    def bn_statistics(self) -> Mapping[str, Tensor]:
        """BatchNorm means and variances (M or T, channels) by buffer name; which ones, the threat model says.

        ``running``: what the model that was sent out holds; ``updated_running``: what the client's local steps made of
        it; ``exact_batch``: mean and unbiased variance of the client's first batch. Of an aggregate: the mean.
        """
        return self._seen.statistics or super().bn_statistics

    @property
    def labels(self) -> Tensor:
        """(T, N) private labels; for K > 1 clients their labels one after the other."""
        labels = self._grant("labels", self._seen.labels).flatten(1)
        return labels[:, labels[0] >= 0]  # clients of a cohort may hold fewer than N

    @property
    def candidates(self) -> tuple[Tensor, Tensor]:
        """Inputs (T, *input_shape) and labels (T,): of each, whether it is an example of the first client is asked.

        Raises:
            NotGranted: The task does not ask for membership.
        """
        if self._seen.candidates is None:
            raise NotGranted(f"the task asks for {self.target}, not for membership: there are no candidates")
        return self._seen.candidates

    @property
    def batch_order(self) -> Tensor:
        """(T, K, local_steps, B) indices into a client's N examples of every local step's batch."""
        self._grant("batch_order", True)
        if self._seen.order is not None:
            return self._seen.order
        self._grant("local_steps", True)
        order = batch_order(self._facts.protocol, self.batch_size).to(self._random.device)
        return order.expand(self.trials, self.clients, -1, -1)

    def difference(
        self, update: Mapping[str, Tensor], *, model: Model | None = None, round_index: int = -1
    ) -> dict[str, Tensor]:
        """Return what an update changed; see `Knowledge.difference`.

        Where clients got different models and sent weights, their mean is what the aggregate started from.

        Args:
            update: One of `updates`, or what `simulate` returned.
            model: The model they received; that of the round where None.
            round_index: Which of `updates` it is.
        """
        planted = self._seen.planted
        if model is None and self.sends == "weights" and planted:
            model = planted[round_index].mean(self.client_weights)
        return super().difference(update, model=model)

    def log_likelihood(
        self,
        sent: Sequence[Mapping[str, Tensor]],
        inputs: Tensor,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        model: Model | None = None,
        scaled: bool = False,
    ) -> Tensor:
        """Return how well updates fit (T, N, ...) candidate examples by what the defense declares, (T,).

        The sum over rounds, in which clients train on the same examples at the same model. One draw of an expectation
        over the defense's randomness; differentiable in inputs and labels.

        Args:
            sent: Of each round, oldest first: (T, *shape) by parameter name, in the units of what is sent.
            inputs: (T, N, *input_shape), T being any multiple of the trials.
            labels: (T, N), or soft (T, N, C).
            order: (T, local_steps, B) indices into N of every local step's batch; the order of ``inputs`` where None.
            model: Where the local steps start, M = 1 or T; the model that the clients received where None.
            scaled: Whether the candidates' update is taken at the scale that fits best; see `Client.log_likelihood`.

        Raises:
            NotGranted: The defense, the model, the batch size, or of several local steps their number or learning rate
                is withheld.
            NotImplementedError: No part of the defense declares a likelihood.
        """
        state, scores = ClientState(), []
        for index, update in enumerate(sent):
            client, random = self._simulated(self.defense, len(labels))
            scores.append(
                client.log_likelihood(
                    update,
                    model or self.model,
                    inputs,
                    labels,
                    random=random,
                    order=order,
                    scaled=scaled,
                    state=state,
                    round_index=index,
                )
            )
        return torch.stack(scores).sum(0)

    @property
    def gradient(self) -> dict[str, Tensor]:
        """The update in units of a gradient: itself, or the sum of the local steps' gradients under plain SGD.

        Buffers that were sent are left out.

        Raises:
            NotGranted: The update is a difference of weights and the learning rate is withheld; or weights were sent,
                or buffers, and the model is withheld.
        """
        difference = self.difference(self.update)
        return difference if self.sends == "gradient" else {n: value / self.lr for n, value in difference.items()}

    @property
    def head_weight(self) -> Tensor:
        """(T, C, d) `gradient` of the last linear layer's weight."""
        return self._head("weight")

    @property
    def head_bias(self) -> Tensor:
        """(T, C) `gradient` of the last linear layer's bias."""
        return self._head("bias")

    @property
    def mean_head_weight(self) -> Tensor:
        """(T, C, d) `head_weight` per local step and example: the mean loss's gradient, averaged over local steps.

        Of clients that differ in size: weighted as in the aggregate, under a summed loss by examples on top.
        """
        return self.head_weight / self._examples_per_unit

    @property
    def mean_head_bias(self) -> Tensor:
        """(T, C) `head_bias` per local step and example: softmax minus one-hot label, averaged over all examples."""
        return self.head_bias / self._examples_per_unit

    @property
    def _examples_per_unit(self) -> float:
        if self._facts.protocol.reduction == "mean":
            return self.local_steps
        merged = math.prod(part.merges for part in (() if self._defense is None else self._defense.parts))
        batches = (self.client_sizes / self._local_batches / merged).ceil()
        return self.local_steps * float(self.client_weights @ batches.double())

    @property
    def _local_batches(self) -> int:
        return self._facts.local_batches or self.inputs_per_client // self.batch_size

    def _head(self, part: str) -> Tensor:
        name = f"{self.model.head}.{part}"
        gradient = self.gradient
        if name not in gradient:
            raise NotGranted(f"{name!r} was not sent or not read; `reads` must name head.{part} (or `*`)")
        return gradient[name]

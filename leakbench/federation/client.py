"""The client: turns (model, private inputs, defense) into an update, for T trials at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext, unit_bounds
from leakbench.federation.gradients import per_example_gradients, per_trial_gradients
from leakbench.models.functional import Model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Protocol


@dataclass
class ClientState:
    """What one client keeps between rounds.

    Args:
        defense: State of every defense part, by (name, occurrence).
        buffers: (T, *shape) buffers as the last update's local steps left them.
    """

    defense: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Received:
    """What T clients got in a round, one each.

    Args:
        model: The model, M = 1 or T.
        previous: The model of the round before, or the honest global model in the first.
        digests: Hash of the parameters that each client of the cohort got, (K,).
        state: What they keep between rounds.
        round_index: Index of the round.
        client: Index of the client.
        order: (T, local_steps, B) indices of every local step's batch; the order of their examples where None.
    """

    model: Model
    previous: Model | None = None
    digests: tuple[str, ...] = ()
    state: ClientState = field(default_factory=ClientState)
    round_index: int = 0
    client: int = 0
    order: Tensor | None = None


@dataclass(frozen=True)
class Client:
    """One client's protocol and defense.

    Args:
        protocol: What it does and sends.
        batch_size: B, examples of one local batch.
        defense: Hooks around its work.
        bounds: Least and greatest valid input, each broadcastable to (..., *input_shape).
    """

    protocol: Protocol
    batch_size: int
    defense: DefenseChain = field(default_factory=DefenseChain)
    bounds: tuple[Tensor, Tensor] = field(default_factory=unit_bounds)

    def update(
        self,
        model: Model,
        inputs: Tensor,
        labels: Tensor,
        *,
        random: TrialRandom,
        state: ClientState | None = None,
        names: Collection[str] | None = None,
        order: Tensor | None = None,
        round_index: int = 0,
        client: int = 0,
        create_graph: bool = False,
    ) -> dict[str, Tensor]:
        """Compute what T clients send.

        Args:
            model: The model they received, M = 1 or T.
            inputs: (T, N, *input_shape) their examples, N = B * local batches.
            labels: (T, N), or soft (T, N, C).
            random: Streams of the defense.
            state: Kept by the caller between rounds.
            names: Tensors to send; all where None. Gradients of others are computed only where local steps or a defense
                that looks across tensors need them.
            order: (T, local_steps, B) indices into N of every local step's batch; the order of ``inputs`` where None.
            round_index: Index of the round.
            client: Index of the client.
            create_graph: Whether the update stays differentiable in inputs and labels.

        Returns:
            Tensors by parameter name, each (T, *shape); with ``send_buffers`` also the running statistics.
        """
        state = state or ClientState()
        moment = (round_index, client)
        made, ctx = self._made(model, inputs, labels, order, random, state, moment, names, create_graph=create_graph)
        update = self.defense.tensors("update", made, ctx)
        buffers = ctx.model.buffers
        state.buffers = {name: v.expand(labels.shape[0], *v.shape[1:]) for name, v in buffers.items()}
        if self.protocol.send_buffers:
            update = {**update, **state.buffers}
        return update if names is None else {name: v for name, v in update.items() if name in names}

    def log_likelihood(
        self,
        sent: Mapping[str, Tensor],
        model: Model,
        inputs: Tensor,
        labels: Tensor,
        *,
        random: TrialRandom,
        order: Tensor | None = None,
        scaled: bool = False,
        state: ClientState | None = None,
        round_index: int = 0,
    ) -> Tensor:
        """Return the score (T,) that the defense gives what was sent if these were T clients' examples.

        Differentiable in inputs and labels; see `DefenseChain.log_likelihood`.

        Args:
            sent: What was sent, (T, *shape) by parameter name.
            model: The model they received, M = 1 or T.
            inputs: (T, N, *input_shape) their supposed examples.
            labels: (T, N), or soft (T, N, C).
            random: Streams of the defense's fresh draws.
            order: (T, local_steps, B) indices into N of every local step's batch; the order of ``inputs`` where None.
            scaled: Whether the clean update is first multiplied by the positive number that brings it nearest to what
                was sent. Weights stay as they are.
            state: Kept by the caller between rounds: what the candidates' client would keep.
            round_index: Index of the round.

        Raises:
            NotImplementedError: No part of the defense declares a likelihood.
        """
        within = replace(self, defense=self.defense.inside)
        state, moment = state or ClientState(), (round_index, 0)
        made, ctx = within._made(model, inputs, labels, order, random, state, moment, None, create_graph=True)
        clean = within.defense.tensors("update", made, ctx)
        if scaled and self.protocol.sends != "weights":
            clean = _nearest(clean, sent)
        return self.defense.log_likelihood(sent, clean, replace(ctx, received=model))

    def _made(
        self,
        model: Model,
        inputs: Tensor,
        labels: Tensor,
        order: Tensor | None,
        random: TrialRandom,
        state: ClientState,
        moment: tuple[int, int],
        names: Collection[str] | None,
        *,
        create_graph: bool,
    ) -> tuple[dict[str, Tensor], DefenseContext]:
        """Return what T clients have to send before the defense's ``update`` hook, and what that hook sees.

        ``moment`` is (round, client).
        """
        protocol = self.protocol
        trained = model
        velocity: dict[str, Tensor] = {}
        single = protocol.sends == "gradient"
        computed = None if names is None else [name for name in model.parameters if name in names]
        if not single or self.defense.needs_all_tensors:
            computed = None
        if order is None:
            order = batch_order(protocol, self.batch_size).expand(labels.shape[0], -1, -1)
        for step in range(protocol.local_steps):
            index = order[:, step].to(inputs.device)
            ctx = self._context(trained, inputs, labels, index, random, state, (*moment, step))
            grads, trained, ctx = self._gradient(trained, ctx, computed, create_graph=create_graph)
            if not single:
                trained = self._descend(trained, grads, velocity)
        return grads if single else self._difference(model, trained), replace(ctx, model=trained)

    def accepts(self, received: Received, inputs: Tensor, labels: Tensor, *, random: TrialRandom) -> Tensor:
        """Return whether T clients take part in a round, (T,) bool; see `leakbench.Defense.accept`.

        Args:
            received: The round, and what they got.
            inputs: (T, N, *input_shape) their examples.
            labels: (T, N).
            random: Streams of the defense.
        """
        if not self.defense.acts_in("accept"):
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        ctx = self._first(received, inputs, labels, random)
        return self.defense.accept(replace(ctx, previous=received.previous, digests=received.digests))

    def shown(self, received: Received, inputs: Tensor, labels: Tensor, *, random: TrialRandom) -> dict[str, Tensor]:
        """Return what an adversary sees of the model that T clients got, where a defense changes it; else nothing.

        Args:
            received: The round, and what they got.
            inputs: (T, N, *input_shape) their examples.
            labels: (T, N).
            random: Streams of the defense.
        """
        if not self.defense.acts_in("broadcast"):
            return {}
        ctx = self._first(received, inputs, labels, random)
        parameters = received.model.parameters
        weights = {name: value.expand(len(labels), *value.shape[1:]) for name, value in parameters.items()}
        shown = self.defense.tensors("broadcast", weights, ctx)
        return shown if any(shown[name] is not value for name, value in weights.items()) else {}

    def _first(self, received: Received, inputs: Tensor, labels: Tensor, random: TrialRandom) -> DefenseContext:
        """Return what hooks see before training."""
        order = received.order
        if order is None:
            order = batch_order(self.protocol, self.batch_size).expand(len(labels), -1, -1)
        index = order[:, 0].to(inputs.device)
        moment = (received.round_index, received.client, 0)
        return self._context(received.model, inputs, labels, index, random, received.state, moment)

    def _context(
        self,
        model: Model,
        inputs: Tensor,
        labels: Tensor,
        index: Tensor,
        random: TrialRandom,
        state: ClientState,
        moment: tuple[int, int, int],
    ) -> DefenseContext:
        """Return what hooks see at ``moment`` (round, client, local step) of the batch ``index`` (T, B)."""
        protocol, (round_index, client, step) = self.protocol, moment
        return DefenseContext(
            model=model,
            inputs=_take(inputs, index),
            labels=_take(labels, index),
            loss=None,
            round=round_index,
            client=client,
            local_step=step,
            lr=protocol.lr,
            random=random.at(*moment),
            states=state.defense,
            batch_norm=protocol.batch_norm,
            reduction=protocol.reduction,
            sends=protocol.sends,
            bounds=self.bounds,
        )

    def _gradient(
        self, model: Model, ctx: DefenseContext, names: Collection[str] | None, *, create_graph: bool
    ) -> tuple[dict[str, Tensor], Model, DefenseContext]:
        """Return one step's gradient, the model with the buffers it leaves, and the context of the batch as used."""
        inputs, labels = self.defense.batch(ctx.inputs, ctx.labels, ctx)
        ctx = replace(ctx, inputs=inputs, labels=labels)
        mode, reduction = self.protocol.batch_norm, self.protocol.reduction
        if self.defense.acts_in("per_example"):
            examples = per_example_gradients(
                model, inputs, labels, names=names, batch_norm=mode, create_graph=create_graph
            )
            kept = self.defense.tensors("per_example", examples, ctx)
            grads = {n: v.mean(1) if reduction == "mean" else v.sum(1) for n, v in kept.items()}
        else:
            result = per_trial_gradients(
                model, inputs, labels, names=names, batch_norm=mode, reduction=reduction, create_graph=create_graph
            )
            grads, ctx = result.tensors, replace(ctx, loss=result.losses)
            if result.buffers:
                model = model.with_state(buffers=result.buffers)
        return self.defense.tensors("step", grads, ctx), model, ctx

    def _descend(self, model: Model, grads: dict[str, Tensor], velocity: dict[str, Tensor]) -> Model:
        """One step of SGD as in torch.optim.SGD, functional so that it can be differentiated through."""
        protocol, moved = self.protocol, {}
        for name, weight in model.parameters.items():
            direction = grads[name] + protocol.weight_decay * weight if protocol.weight_decay else grads[name]
            if protocol.momentum:
                direction = protocol.momentum * velocity[name] + direction if name in velocity else direction
                velocity[name] = direction
            moved[name] = weight - protocol.lr * direction
        return model.with_state(parameters=moved)

    def _difference(self, before: Model, after: Model) -> dict[str, Tensor]:
        if self.protocol.sends == "weights":
            return dict(after.parameters)
        return {name: before.parameters[name] - weight for name, weight in after.parameters.items()}


def batch_order(protocol: Protocol, batch_size: int) -> Tensor:
    """Return (local_steps, B) indices of every local step's batch into a client's examples, in their own order."""
    step = torch.arange(protocol.local_steps) % protocol.local_batches
    return step[:, None] * batch_size + torch.arange(batch_size)


def _nearest(clean: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``clean`` times the positive number, one a trial, that brings it nearest to ``sent``.

    A tenth of the size of ``sent`` is the least, so that what points away still has a direction.
    """
    found = torch.cat([clean[name].flatten(1) for name in sent], 1)
    goal = torch.cat([value.flatten(1) for value in sent.values()], 1)
    square = found.square().sum(1).clamp(min=torch.finfo(found.dtype).tiny)
    least = 0.1 * goal.square().sum(1).sqrt() / square.sqrt()
    factor = torch.maximum((found * goal).sum(1) / square, least)
    return {name: value * factor.view(-1, *(1,) * (value.dim() - 1)) for name, value in clean.items()}


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Select (T, B, ...) rows of ``values`` (T, N, ...) by ``index`` (T, B)."""
    return values[torch.arange(values.shape[0], device=values.device)[:, None], index]

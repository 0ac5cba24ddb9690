"""What a defense is: hooks into the client, the context they see, and composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from leakbench.entry import Entry
from leakbench.errors import InvalidOutput
from leakbench.federation.gradients import Reduction
from leakbench.mechanism import Mechanism
from leakbench.models.functional import BatchNormMode, Model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Protocol


def unit_bounds() -> tuple[Tensor, Tensor]:
    """Return the bounds of inputs that are not normalised."""
    return torch.tensor(0.0), torch.tensor(1.0)


@dataclass(frozen=True, kw_only=True)
class DefenseContext:
    """What a hook sees of the moment it is called in. Frozen; fields may be added.

    Args:
        model: The model as it is now, M = 1 or T.
        inputs: (T, B, *input_shape) the current local batch; after the ``batch`` hooks what they made of it.
        labels: (T, B) or soft (T, B, C), like ``inputs``.
        loss: (T,) loss of that batch, in ``step`` and ``update``; None where examples have losses of their own.
        round: Index of the round.
        client: Index of the client.
        local_step: Index of the local step.
        lr: Local learning rate.
        random: Streams of this (defense, hook, trial, client, round, step).
        state: (T, ...) tensors that the harness keeps between steps and rounds of one client (error feedback).
        states: The harness's store of every part's ``state``.
        batch_norm: How BatchNorm normalises in the client: ``eval`` or ``train``.
        reduction: Of the loss over the batch: ``mean`` or ``sum``.
        sends: What leaves the client: ``gradient``, ``delta`` or ``weights``.
        previous: The model that the client got before this round's, M = 1 or T; the honest global model in the first.
        digests: What clients may compare: a hash of the parameters that each of the K clients got this round. Empty
            where a client is simulated on its own.
        bounds: Least and greatest valid input, each broadcastable to (..., *input_shape): black and white of images.
        received: The model that the client got in this round, M = 1 or T, in `Defense.log_likelihood`, where ``model``
            is what became of it.
    """

    model: Model
    inputs: Tensor
    labels: Tensor
    loss: Tensor | None
    round: int
    client: int
    local_step: int
    lr: float
    random: TrialRandom
    state: dict[str, Tensor] = field(default_factory=dict)
    states: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict, repr=False)
    batch_norm: BatchNormMode = "eval"
    reduction: Reduction = "mean"
    sends: Literal["gradient", "delta", "weights"] = "gradient"
    previous: Model | None = None
    digests: tuple[str, ...] = ()
    bounds: tuple[Tensor, Tensor] = field(default_factory=unit_bounds)
    received: Model | None = None


class Defense(Entry):
    """One paper's defense. A subclass overrides the one or two hooks it is about; the others change nothing.

    Hooks see T explicitly and are called outside vmap. The same object runs under attack and in utility training.
    """

    acts_on: ClassVar[frozenset[str]] = frozenset()
    """Where it acts: ``model``, ``accept``, ``broadcast``, ``batch``, ``per_example``, ``step``, ``update``."""
    strength: ClassVar[tuple[str, str] | None] = None
    """The swept parameter and which way is stronger: ``("std", "higher")``."""
    merges: ClassVar[int] = 1
    """How many private examples of a batch go into one that the client trains on."""
    neutral: ClassVar[Mapping[str, object] | None] = None
    """Parameters with which it changes nothing, whatever the others are: strength zero; None where there are none."""
    draws: ClassVar[str] = ""
    """What it draws at random; empty for a deterministic defense."""
    likelihood: ClassVar[Literal["density", "surrogate", "simulated"] | None] = None
    """How an adversary who knows it takes it into account: `log_likelihood` is the log-density of the sent update, or
    a differentiable score that is greatest where the clean one fits; or the defense is run in a simulated client, with
    fresh draws. None: it is never seen in an update."""
    adaptive: ClassVar[tuple[str, ...]] = ()
    """Names of the attacks that know it and that it has to face before it is ranked."""

    @property
    def tensorwise(self) -> bool:
        """Whether each tensor is treated without looking at the others, so that unread ones need not be computed."""
        return False

    def model(self, model: nn.Module) -> nn.Module:
        """Change the architecture before it is trained; the result is what the server holds."""
        return model

    def accept(self, ctx: DefenseContext) -> Tensor:
        """Decide whether the client takes part, (T,) bool, given what it got; called once a round, before training.

        A client that refuses sends nothing new, zeros or the weights it got, then and in all later rounds. See
        ``ctx.model``, ``ctx.previous``, ``ctx.digests``; ``ctx.inputs`` and ``ctx.labels`` are its first local batch.
        """
        return torch.ones(ctx.inputs.shape[0], dtype=torch.bool, device=ctx.inputs.device)

    def broadcast(self, weights: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Change what an adversary on the wire sees of the model that was sent to the client, (T, *shape) by name.

        The client trains on the true weights. A server knows what it sent: a defense that relies on this hook protects
        against others only.
        """
        return weights

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Change the local batch; labels may become soft (T, B, C) and B may change."""
        return inputs, labels

    def per_example(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Change per-example gradients (T, B, *shape) before they are averaged."""
        return grads

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Change the gradient (T, *shape) of one local step."""
        return grads

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Change the update (T, *shape) before it is sent."""
        return update

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Log-density or surrogate (T,) of the sent update given the clean one; see `likelihood`.

        Differentiable in ``clean``, over the tensors of ``sent``. ``clean`` is the update of a client that runs what
        `inside` returns.

        Raises:
            NotImplementedError: The defense declares none.
        """
        raise NotImplementedError(f"{type(self).__name__} declares no likelihood")

    def inside(self) -> Defense | None:
        """Return what of it an adversary runs in a simulated client; `log_likelihood` accounts for the rest.

        By default all of it, or nothing where it declares a density or a surrogate.
        """
        return None if self.likelihood in ("density", "surrogate") else self

    def withholds(self, model: Model) -> frozenset[str]:  # noqa: ARG002
        """Name the parameters of which nothing is sent, zeros in their place; whoever knows the defense knows which."""
        return frozenset()

    def mechanism(self, before: Mechanism, *, batch_size: int, reduction: Reduction) -> Mechanism | None:  # noqa: ARG002
        """Declare what the client promises with this defense; proved bounds and audits are computed from it.

        In units of what the hook gets: of one step's gradient in ``per_example`` and ``step``, of what is sent in
        ``update``. A declared mechanism must hold for every model, batch and draw.

        Args:
            before: What the client promises without it.
            batch_size: B of the client.
            reduction: Of the loss over the batch.

        Returns:
            What it promises with it; None where nothing is declared.
        """
        return None

    @final
    def overrides(self, hook: str) -> bool:
        """Whether the subclass brings its own ``hook``."""
        return getattr(type(self), hook) is not getattr(Defense, hook)


HOOKS = ("model", "accept", "broadcast", "batch", "per_example", "step", "update")
"""The hooks, in the order in which a client calls them."""
_IN_STEPS = ("accept", "batch", "per_example", "step")


class DefenseChain:
    """Defenses in order: each hook of the first acts before the same hook of the second.

    Args:
        parts: The defenses; none at all is the undefended client.
    """

    def __init__(self, parts: Sequence[Defense] = ()) -> None:
        self.parts = tuple(parts)

    def acts_in(self, hook: str) -> bool:
        """Whether any part brings its own ``hook``."""
        return any(part.overrides(hook) for part in self.parts)

    @property
    def needs_all_tensors(self) -> bool:
        """Whether some part of the chain looks across tensors of a gradient or update."""
        acting = (p for p in self.parts if any(p.overrides(h) for h in ("per_example", "step", "update")))
        return any(not part.tensorwise for part in acting)

    def withholds(self, model: Model) -> frozenset[str]:
        """Return the names of the parameters that some part keeps back."""
        return frozenset[str]().union(*(part.withholds(model) for part in self.parts))

    @property
    def inside(self) -> DefenseChain:
        """What an adversary runs in a simulated client; `log_likelihood` accounts for the rest."""
        return DefenseChain([kept for part in self.parts if not _idle(part) and (kept := part.inside()) is not None])

    @property
    def scored_by(self) -> str | None:
        """What `log_likelihood` is: ``density`` or ``surrogate``; None where no part that acts declares either."""
        return self.parts[self._scoring[-1]].likelihood if self._scoring else None

    @property
    def _scoring(self) -> list[int]:
        """Places of the parts that declare a likelihood; strength zero, which has no density, is left out."""
        scored = ("density", "surrogate")
        return [i for i, part in enumerate(self.parts) if part.likelihood in scored and not _idle(part)]

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return the log-density or surrogate (T,) of the sent update, differentiable in the clean one.

        The last part that declares one scores; those before it are applied to ``clean`` with fresh draws (where one has
        no derivative, straight through), so that the score is one draw of an expectation over their randomness.

        Args:
            sent: The update, (T, *shape) by name.
            clean: That of a client with the defenses `inside`.
            ctx: The moment of the client's ``update``.

        Raises:
            NotImplementedError: No part declares one.
        """
        scoring = self._scoring
        if not scoring:
            raise NotImplementedError("no part of the chain declares a likelihood")
        for index in scoring[:-1]:
            part = self.parts[index]
            if part.overrides("update"):
                mapped = part.update(dict(clean), self._context(ctx, index, "update"))
                clean = {name: _straight_through(clean[name], value) for name, value in mapped.items()}
        last = scoring[-1]
        return self.parts[last].log_likelihood(sent, clean, self._context(ctx, last, "update"))

    def mechanism(self, protocol: Protocol, batch_size: int, *, layers: int | None = None) -> Mechanism | None:
        """Return what a client with this chain promises, in units of what it sends in one round.

        None where a part that has a say in the update declares nothing, where noise of one local step goes through
        further ones, or where running statistics are sent, which no part treats.

        Args:
            protocol: What the client does and sends.
            batch_size: B of the client.
            layers: How many layers the model has, where known.
        """
        if protocol.send_buffers:
            return None
        found: Mechanism | None = Mechanism(layers=layers)
        # In the order in which they act last: noise after a clip is not a clip after noise.
        in_steps = sorted((p for p in self.parts if _last_step_hook(p) >= 0), key=_last_step_hook)
        on_sent = [part for part in self.parts if part.overrides("update")]
        if set(map(id, in_steps)) & set(map(id, on_sent)):
            return None  # one declaration cannot be in the units of both
        for part in in_steps:
            found = found and part.mechanism(found, batch_size=batch_size, reduction=protocol.reduction)
        if found is None or (found.std > 0 and protocol.local_steps > 1):
            return None
        if protocol.sends != "gradient":
            found = found.scaled(protocol.lr) if protocol.local_steps == 1 else Mechanism(layers=layers)
        for part in on_sent:
            found = found and part.mechanism(found, batch_size=batch_size, reduction=protocol.reduction)
        return found

    def model(self, model: nn.Module) -> nn.Module:
        """Apply every part's ``model`` hook."""
        for part in self.parts:
            model = part.model(model)
        return model

    def accept(self, ctx: DefenseContext) -> Tensor:
        """Return whether every part takes part, (T,) bool.

        Raises:
            InvalidOutput: A part returned anything else.
        """
        trials = ctx.inputs.shape[0]
        accepted = torch.ones(trials, dtype=torch.bool, device=ctx.inputs.device)
        for index, part in enumerate(self.parts):
            if not part.overrides("accept"):
                continue
            answer = part.accept(self._context(ctx, index, "accept"))
            if _kind(answer) != _kind(accepted):
                raise InvalidOutput(f"{part!r}.accept must return {_kind(accepted)}, got {_kind(answer)}")
            accepted = accepted & answer
        return accepted

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Apply every part's ``batch`` hook.

        Raises:
            InvalidOutput: A part returned anything but inputs (T, B, *shape) of the same type and labels (T, B) or
                (T, B, C).
        """
        for index, part in enumerate(self.parts):
            if not part.overrides("batch"):
                continue
            result = part.batch(inputs, labels, self._context(ctx, index, "batch"))
            if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(v, Tensor) for v in result)):
                raise InvalidOutput(f"{part!r}.batch must return two tensors (inputs, labels), got {_kind(result)}")
            self._check_batch(f"{part!r}.batch", inputs, *result, ctx.model.num_classes)
            inputs, labels = result
        return inputs, labels

    @staticmethod
    def _check_batch(who: str, before: Tensor, inputs: Tensor, labels: Tensor, classes: int) -> None:
        soft = labels.dim() == 3
        right_inputs = inputs.dtype == before.dtype and inputs.dim() == before.dim() and inputs.shape[1] > 0
        right_inputs = right_inputs and inputs.shape[0] == before.shape[0] and inputs.shape[2:] == before.shape[2:]
        right_labels = labels.shape[2:] == ((classes,) if soft else ()) and labels.shape[:2] == inputs.shape[:2]
        right_labels = right_labels and labels.dtype == (before.dtype if soft else torch.int64)
        if not (right_inputs and right_labels):
            shape = ", ".join(map(str, before.shape[2:]))
            raise InvalidOutput(
                f"{who}: expected {before.dtype} inputs ({before.shape[0]}, B, {shape}) and torch.int64 labels "
                f"({before.shape[0]}, B) or {before.dtype} ones ({before.shape[0]}, B, {classes}), got {inputs.dtype} "
                f"{tuple(inputs.shape)} and {labels.dtype} {tuple(labels.shape)}"
            )

    def tensors(self, hook: str, tensors: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Apply every part's ``broadcast``, ``per_example``, ``step`` or ``update`` hook.

        Raises:
            InvalidOutput: A part returned other names, shapes or dtypes than it was given, or changed its argument.
        """
        for index, part in enumerate(self.parts):
            if not part.overrides(hook):
                continue
            given = [*ctx.model.parameters.items(), *tensors.items()]
            versions = [value._version for _, value in given]
            shapes = {name: _kind(value) for name, value in tensors.items()}
            result = getattr(part, hook)(dict(tensors), self._context(ctx, index, hook))
            if not isinstance(result, dict):
                raise InvalidOutput(f"{part!r}.{hook} must return a dict of tensors, got {_kind(result)}")
            got = {name: _kind(value) for name, value in result.items()}
            wrong = sorted((n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n)), key=str)
            if wrong:
                raise InvalidOutput(
                    f"{part!r}.{hook} must return the names and shapes it was given; {wrong[0]!r}: "
                    f"expected {shapes.get(wrong[0], 'nothing')}, got {got.get(wrong[0], 'nothing')}"
                )
            changed = [n for (n, value), version in zip(given, versions, strict=True) if value._version != version]
            if changed:
                raise InvalidOutput(f"{part!r}.{hook} changed {changed[0]!r} in place; return new tensors instead")
            tensors = result
        return tensors

    def _context(self, ctx: DefenseContext, part: int, hook: str) -> DefenseContext:
        """Give a part its own streams and state, keyed by its name, so that parts and hooks never share a draw.

        The same defense draws the same noise alone and in a chain, and at every strength: comparisons are paired.
        """
        names = [getattr(other, "name", type(other).__name__) for other in self.parts[: part + 1]]
        key = (names[-1], names.count(names[-1]) - 1)
        return replace(ctx, random=ctx.random.at("defense", *key, hook), state=ctx.states.setdefault(key, {}))


def _idle(part: Defense) -> bool:
    """Whether its parameters are those with which it changes nothing."""
    return part.neutral is not None and dict(part.neutral).items() <= part.params().items()


def _straight_through(clean: Tensor, mapped: Tensor) -> Tensor:
    """Return ``mapped``, with the derivative of the identity where it has none or is constant everywhere (a sign)."""
    if not clean.requires_grad:
        return mapped
    if mapped.requires_grad:
        (slope,) = torch.autograd.grad(mapped.sum(), clean, retain_graph=True, allow_unused=True)
        if slope is not None and bool(slope.any()):
            return mapped
    return clean + (mapped - clean).detach()


def _last_step_hook(part: Defense) -> int:
    """Return which of the hooks around a local step is the part's last, -1 where it has none of them."""
    return max((_IN_STEPS.index(hook) for hook in _IN_STEPS if part.overrides(hook)), default=-1)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return type(value).__name__

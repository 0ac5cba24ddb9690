"""What a defense is: hooks into the client, and the context they see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from leakbench.entry import Entry
from leakbench.federation.gradients import Reduction
from leakbench.mechanism import Mechanism
from leakbench.models.functional import BatchNormMode, Model
from leakbench.randomness import TrialRandom


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

    @property
    def has_density(self) -> bool:
        """Whether `log_likelihood` is a log-density with these parameters."""
        return self.likelihood == "density"

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

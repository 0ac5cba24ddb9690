"""What an attack may know: the grants of the threat model, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from leakbench.defense import DefenseChain
from leakbench.errors import NotGranted
from leakbench.federation.client import Client, batch_order
from leakbench.federation.gradients import per_trial_gradients
from leakbench.federation.statistics import is_running_statistic
from leakbench.models.functional import Model
from leakbench.randomness import TrialRandom
from leakbench.tasks import InputSpec, Protocol

G = TypeVar("G")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The public and the granted numbers of a task; a withheld one is None. JSON-able.

    Args:
        granted: Names the threat model grants.
        protocol: What the client does; hyper-parameters that are withheld hold their defaults and are not readable.
        input_spec: What one input is.
        normalised: Whether inputs are normalised by the spec's mean and std.
        num_classes: C.
        clients: K.
        batch_size: B.
        inputs_per_client: N.
        class_prior: (C,) class frequencies of the data source.
        wall_seconds: Time the whole block may take.
        model_evaluations: Gradient evaluations per trial that the budget allows; None is unlimited.
        target: What the task asks for: ``labels`` or ``inputs``.
    """

    granted: frozenset[str]
    protocol: Protocol
    input_spec: InputSpec
    normalised: bool
    num_classes: int
    clients: int = 1
    batch_size: int | None = None
    inputs_per_client: int | None = None
    class_prior: tuple[float, ...] | None = None
    wall_seconds: float | None = None
    model_evaluations: int | None = None
    target: str = "inputs"


class Knowledge:
    """What the attacker knows before it has seen an update.

    Everything readable here is granted by the task's threat model; reading the rest raises `NotGranted`.

    Args:
        facts: Public and granted numbers.
        model: The model the server holds, M = 1 or T.
        auxiliary: Inputs (n, *input_shape) and labels (n,) that the attacker owns.
        defense: The client's defense.
        random: The attack's own streams.
        report: Receives progress.
    """

    def __init__(
        self,
        *,
        facts: Facts,
        random: TrialRandom,
        model: Model | None = None,
        auxiliary: tuple[Tensor, Tensor] | None = None,
        defense: DefenseChain | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._facts = facts
        self._random = random
        self._model = model
        self._auxiliary = auxiliary
        self._defense = defense
        self._report = report
        self.evaluations = 0

    # --- always known ---------------------------------------------------------------------------------------------

    @property
    def trials(self) -> int:
        """T: leading dimension of everything here."""
        return self._random.trials

    @property
    def num_classes(self) -> int:
        """C."""
        return self._facts.num_classes

    @property
    def input_spec(self) -> InputSpec:
        """What one input is."""
        return self._facts.input_spec

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest valid input, each broadcastable to (..., *input_shape)."""
        spec = self._facts.input_spec
        ones = (1,) * (len(spec.shape) - 1)
        if not self._facts.normalised:
            return torch.zeros(1, *ones, device=self._random.device), torch.ones(1, *ones, device=self._random.device)
        mean, std = (torch.tensor(v, device=self._random.device).view(-1, *ones) for v in (spec.mean, spec.std))
        return -mean / std, (1 - mean) / std

    @property
    def sends(self) -> str:
        """``gradient``, ``delta`` or ``weights``."""
        return self._facts.protocol.sends

    @property
    def clients(self) -> int:
        """K: clients behind one update."""
        return self._facts.clients

    @property
    def budget(self) -> int | None:
        """Gradient evaluations per trial that the suite allows; None is unlimited."""
        return self._facts.model_evaluations

    @property
    def target(self) -> str:
        """What the task asks for: ``labels`` or ``inputs``."""
        return self._facts.target

    @property
    def examples_interact(self) -> bool:
        """Whether an example's logits depend on the others of its batch: BatchNorm in train mode."""
        return self.model.has_batch_norm and self._facts.protocol.batch_norm == "train"

    # --- granted by the threat model ------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """B: examples of one local batch."""
        return self._grant("batch_size", self._facts.batch_size)

    @property
    def inputs_per_client(self) -> int:
        """N: examples behind one client's update."""
        return self._grant("batch_size", self._facts.inputs_per_client)

    @property
    def local_steps(self) -> int:
        """Local steps of a client."""
        return self._grant("local_steps", self._facts.protocol.local_steps)

    @property
    def lr(self) -> float:
        """Local learning rate."""
        return self._grant("lr", self._facts.protocol.lr)

    @property
    def class_prior(self) -> Tensor:
        """(C,) class frequencies of the data source."""
        prior = self._grant("label_prior", self._facts.class_prior)
        return torch.tensor(prior, dtype=torch.float64, device=self._random.device)

    @property
    def model(self) -> Model:
        """Architecture and weights of the model that the clients received, M = 1 or T."""
        return self._grant("weights", self._model)

    @property
    def bn_statistics(self) -> Mapping[str, Tensor]:
        """Running means and variances (M, channels) of the model's BatchNorm layers, by buffer name."""
        self._grant("bn_statistics", True)
        return {name: value for name, value in self.model.buffers.items() if is_running_statistic(name)}

    @property
    def auxiliary(self) -> tuple[Tensor, Tensor]:
        """Inputs (n, *input_shape) and labels (n,) that the attacker owns."""
        return self._grant("auxiliary", self._auxiliary)

    @property
    def defense(self) -> DefenseChain:
        """The client's defense, with its parameters, never its random draws."""
        return self._grant("defense", self._defense)

    # --- what the attacker can compute ----------------------------------------------------------------------------

    def gradients(
        self, inputs: Tensor, labels: Tensor, *, names: Sequence[str] | None = None, create_graph: bool = True
    ) -> dict[str, Tensor]:
        """Undefended one-step gradient of T batches, computed as the client computes it.

        Args:
            inputs: (T, B, *input_shape).
            labels: (T, B), or soft (T, B, C).
            names: Parameters to differentiate; all where None.
            create_graph: Whether the result is differentiable in inputs and labels.

        Returns:
            Gradients (T, *shape) by parameter name.
        """
        self.evaluations += 1
        protocol = self._facts.protocol
        return per_trial_gradients(
            self.model,
            inputs,
            labels,
            names=names,
            batch_norm=protocol.batch_norm,
            reduction=protocol.reduction,
            create_graph=create_graph,
        ).tensors

    def forward(self, inputs: Tensor, *, model: Model | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (T, n, C) and the last layer's inputs (T, n, d), BatchNorm in the clients' mode.

        Args:
            inputs: (T, n, *input_shape); where the weights are shared, any leading dimension will do.
            model: What to run; the model that the clients received where None.
        """
        with torch.no_grad():
            logits, features, _ = (model or self.model).run(inputs, batch_norm=self._facts.protocol.batch_norm)
        return logits, features

    def simulate(self, inputs: Tensor, labels: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """Run the task's own client on (T, N, ...) candidate examples; see `Client.update`.

        The defense takes part, with fresh randomness, where the threat model grants it.

        Raises:
            NotGranted: The model, the batch size, the learning rate or the number of local steps is withheld.
        """
        for name in ("lr", "local_steps") if self.sends != "gradient" else ():
            self._grant(name, True)
        self.evaluations += self._facts.protocol.local_steps
        client = Client(self._facts.protocol, self.batch_size, self._defense or DefenseChain())
        random = self._random.at("simulate", self.evaluations)
        return client.update(self.model, inputs, labels, random=random, create_graph=create_graph)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws (T, *shape), slice t from trial t's own stream."""
        return self._random.randn(*shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) draws (T, *shape), slice t from trial t's own stream."""
        return self._random.rand(*shape)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Uniform integers 0..high-1 (T, *shape), slice t from trial t's own stream."""
        return self._random.randint(high, *shape)

    def progress(self, done: int, total: int, loss: float | None = None) -> None:
        """Tell the harness how far the attack is; cheap enough for every iteration."""
        if self._report is not None:
            self._report({"done": done, "total": total, "loss": loss})

    def _grant(self, name: str, value: G | None) -> G:
        if name not in self._facts.granted or value is None:
            raise NotGranted(
                f"{name!r} is not granted by this task's threat model; add it to the attack's `needs`, so that the "
                f"task gives not_applicable rows, or do without. Granted: {', '.join(sorted(self._facts.granted))}"
            )
        return value


@dataclass(frozen=True)
class Seen:
    """What one block of trials shows the adversary.

    Args:
        updates: One update per round, tensors (T, *shape) by name.
        labels: (T, K, N) private labels in batch order, where granted.
        order: (T, K, local_steps, B) batch order, where granted and not that of the examples themselves.
        prepared: What `Attack.prepare` returned.
        statistics: (T, channels) BatchNorm statistics of the last round, where the grant goes beyond the server's own.
    """

    updates: Sequence[Mapping[str, Tensor]]
    labels: Tensor | None = None
    order: Tensor | None = None
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


class Observation(Knowledge):
    """`Knowledge` plus what the clients sent."""

    def __init__(self, seen: Seen, **knowledge: Any) -> None:
        super().__init__(**knowledge)
        self._seen = seen

    @property
    def update(self) -> Mapping[str, Tensor]:
        """The last round's update: tensors (T, *shape) by parameter name, restricted to what the attack `reads`."""
        return self._seen.updates[-1]

    @property
    def updates(self) -> Sequence[Mapping[str, Tensor]]:
        """The updates of all rounds, oldest first."""
        return self._seen.updates

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
        return self._grant("labels", self._seen.labels).flatten(1)

    @property
    def batch_order(self) -> Tensor:
        """(T, K, local_steps, B) indices into a client's N examples of every local step's batch."""
        self._grant("batch_order", True)
        if self._seen.order is not None:
            return self._seen.order
        self._grant("local_steps", True)
        order = batch_order(self._facts.protocol, self.batch_size).to(self._random.device)
        return order.expand(self.trials, self.clients, -1, -1)

    @property
    def gradient(self) -> dict[str, Tensor]:
        """The update in units of a gradient: itself, or the sum of the local steps' gradients under plain SGD.

        Buffers that were sent are left out.

        Raises:
            NotGranted: The update is a difference of weights and the learning rate is withheld; or weights were sent,
                or buffers, and the model is withheld.
        """
        buffers = self.model.buffers if self._facts.protocol.send_buffers else {}
        update = {name: value for name, value in self.update.items() if name not in buffers}
        if self.sends == "gradient":
            return update
        if self.sends == "delta":
            return {name: value / self.lr for name, value in update.items()}
        return {name: (self.model.parameters[name] - value) / self.lr for name, value in update.items()}

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
        """(T, C, d) `head_weight` per local step and example: the mean loss's gradient, averaged over local steps."""
        return self.head_weight / self._examples_per_unit

    @property
    def mean_head_bias(self) -> Tensor:
        """(T, C) `head_bias` per local step and example: softmax minus one-hot label, averaged over all examples."""
        return self.head_bias / self._examples_per_unit

    @property
    def _examples_per_unit(self) -> int:
        if self._facts.protocol.reduction == "mean":
            return self.local_steps
        parts = () if self._defense is None else self._defense.parts
        return self.local_steps * math.ceil(self.batch_size / math.prod(part.merges for part in parts))

    def _head(self, part: str) -> Tensor:
        name = f"{self.model.head}.{part}"
        gradient = self.gradient
        if name not in gradient:
            raise NotGranted(f"{name!r} was not sent or not read; `reads` must name head.{part} (or `*`)")
        return gradient[name]

"""What an attack may know: the grants of the threat model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from leakbench.chain import DefenseChain
from leakbench.errors import NotGranted
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.federation.gradients import per_trial_gradients
from leakbench.federation.inputs import input_bounds
from leakbench.federation.products import per_trial_products
from leakbench.federation.statistics import is_running_statistic
from leakbench.models.functional import Model
from leakbench.randomness import TrialRandom
from leakbench.tasks import AttributeSpec, InputSpec

G = TypeVar("G")


class Knowledge:
    """What the attacker knows before it has seen an update.

    Everything readable here is granted by the task's threat model; reading the rest raises `NotGranted`.

    Args:
        facts: Public and granted numbers.
        model: The model the server holds, M = 1 or T.
        auxiliary: Inputs (n, *input_shape) and labels (n,) that the attacker owns.
        auxiliary_attribute: (n,) whether each of these has the attribute that the task asks for.
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
        auxiliary_attribute: Tensor | None = None,
        defense: DefenseChain | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._facts = facts
        self._random = random
        self._model = model
        self._auxiliary = auxiliary
        self._auxiliary_attribute = auxiliary_attribute
        self._defense = defense
        self._report = report
        self._count = [0]  # shared with copies and blocks
        self._begun = 0  # where the count stood when a block was cut

    @property
    def evaluations(self) -> int:
        """Gradient evaluations so far, of a batch of any number of trials."""
        return self._count[0]

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
        return input_bounds(self._facts.input_spec, self._facts.normalised, self._random.device)

    @property
    def sends(self) -> str:
        """``gradient``, ``delta`` or ``weights``."""
        return self._facts.protocol.sends

    @property
    def rounds(self) -> int:
        """R: rounds in which the same clients send an update."""
        return self._facts.protocol.rounds

    @property
    def clients(self) -> int:
        """K: clients behind one update."""
        return self._facts.clients

    @property
    def reduction(self) -> str:
        """Of the loss over a batch: ``mean`` or ``sum``."""
        return self._facts.protocol.reduction

    @property
    def budget(self) -> int | None:
        """Gradient evaluations per trial that the suite allows; None is unlimited."""
        return self._facts.model_evaluations

    @property
    def target(self) -> str:
        """What the task asks for: ``labels``, ``inputs``, ``attribute`` or ``membership``."""
        return self._facts.target

    @property
    def attribute(self) -> AttributeSpec:
        """Which attribute the task asks for.

        Raises:
            NotGranted: It asks for none.
        """
        if self._facts.attribute is None:
            raise NotGranted(f"the task asks for {self.target}, not for an attribute")
        return self._facts.attribute

    @property
    def examples_interact(self) -> bool:
        """Whether an example's logits depend on the others of its batch: BatchNorm in train mode."""
        return self.model.has_batch_norm and self._facts.protocol.batch_norm == "train"

    # --- granted by the threat model ------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """B: examples of one local batch; the mean, rounded up, where clients differ."""
        return self._grant("batch_size", self._facts.batch_size)

    @property
    def inputs_per_client(self) -> int:
        """N: examples behind one client's update; the mean, rounded up, where clients differ: see `client_sizes`."""
        return self._grant("batch_size", self._facts.inputs_per_client)

    @property
    def client_sizes(self) -> Tensor:
        """(K,) int64 examples behind each client's update; a server gets them along with the updates."""
        sizes = self._facts.client_sizes or (self.inputs_per_client,) * self.clients
        return torch.tensor(self._grant("batch_size", sizes), device=self._random.device)

    @property
    def total_inputs(self) -> int:
        """Examples behind one update, of all clients together."""
        sizes = self._facts.client_sizes
        return self.inputs_per_client * self.clients if sizes is None else sum(sizes)

    @property
    def client_weights(self) -> Tensor:
        """(K,) float64 weights of the clients' updates in the aggregate; they sum to 1."""
        if self._facts.protocol.weighting == "equal":
            return torch.full((self.clients,), 1 / self.clients, dtype=torch.float64, device=self._random.device)
        sizes = self.client_sizes.double()
        return sizes / sizes.sum()

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
    def auxiliary_attribute(self) -> Tensor:
        """(n,) int64: 1 for the auxiliary examples that have the attribute that the task asks for, else 0."""
        _ = self.attribute
        return self._grant("auxiliary", self._auxiliary_attribute)

    @property
    def defense(self) -> DefenseChain:
        """The client's defense, with its parameters, never its random draws."""
        return self._grant("defense", self._defense)

    @property
    def withheld(self) -> frozenset[str]:
        """Parameters of which the update holds zeros because the client keeps them back; none where that is unknown."""
        if self._defense is None or self._model is None:
            return frozenset()
        return self._defense.withholds(self._model)

    # --- what the attacker can compute ----------------------------------------------------------------------------

    def gradients(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        names: Sequence[str] | None = None,
        create_graph: bool = True,
        model: Model | None = None,
    ) -> dict[str, Tensor]:
        """Undefended one-step gradient of T batches, computed as the client computes it.

        Args:
            inputs: (T, B, *input_shape); where the weights are shared, any leading dimension will do.
            labels: (T, B), or soft (T, B, C).
            names: Parameters to differentiate; all where None.
            create_graph: Whether the result is differentiable in inputs and labels (and in the weights of ``model``).
            model: Where to take it; the model that the clients received where None.

        Returns:
            Gradients (T, *shape) by parameter name.
        """
        self._count[0] += 1
        protocol = self._facts.protocol
        return per_trial_gradients(
            model or self.model,
            inputs,
            labels,
            names=names,
            batch_norm=protocol.batch_norm,
            reduction=protocol.reduction,
            create_graph=create_graph,
        ).tensors

    def gradient_products(
        self, inputs: Tensor, labels: Tensor, target: Mapping[str, Tensor], *, model: Model | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare the one-step gradients g of T batches with ``target`` G without building g where that is dearer.

        Args:
            inputs: (T, B, *input_shape); where the weights are shared, any leading dimension will do.
            labels: (T, B), or soft (T, B, C).
            target: Parameter name to (T, *shape).
            model: Where to take g; the model that the clients received where None.

        Returns:
            <g, G> and ||g||^2 of every tensor, (T, P) each in the order of ``target``; differentiable once.
        """
        self._count[0] += 1
        protocol = self._facts.protocol
        return per_trial_products(
            model or self.model,
            inputs,
            labels,
            target,
            batch_norm=protocol.batch_norm,
            reduction=protocol.reduction,
        )

    def forward(self, inputs: Tensor, *, model: Model | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (T, n, C) and the last layer's inputs (T, n, d), BatchNorm in the clients' mode.

        Args:
            inputs: (T, n, *input_shape); where the weights are shared, any leading dimension will do.
            model: What to run; the model that the clients received where None.
        """
        with torch.no_grad():
            logits, features, _ = (model or self.model).run(inputs, batch_norm=self._facts.protocol.batch_norm)
        return logits, features

    def simulate(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        create_graph: bool = False,
        order: Tensor | None = None,
        defended: bool = True,
        inside: bool = False,
        lr: float | None = None,
        local_steps: int | None = None,
        model: Model | None = None,
    ) -> dict[str, Tensor]:
        """Run the task's own client on (T, N, ...) candidate examples; see `Client.update`.

        Args:
            inputs: (T, N, *input_shape); undefended and with shared weights, any leading dimension will do.
            labels: (T, N), or soft (T, N, C).
            create_graph: Whether the update is differentiable in inputs and labels.
            order: (T, local_steps, B) indices into N of every local step's batch; the order of ``inputs`` where None.
            defended: Whether the defense takes part, with fresh randomness, where the threat model grants it.
            inside: Whether only what `DefenseChain.log_likelihood` leaves to the simulated client takes part.
            lr: A guess where the learning rate is withheld.
            local_steps: A guess where the number of local steps is withheld.
            model: Where the local steps start; the model that the clients received where None.

        Raises:
            NotGranted: The model, the batch size, or what is not guessed is withheld.
        """
        chain = (self._defense if defended else None) or DefenseChain()
        client, random = self._simulated(chain.inside if inside else chain, len(labels), lr, local_steps)
        return client.update(model or self.model, inputs, labels, random=random, order=order, create_graph=create_graph)

    def _simulated(
        self, chain: DefenseChain, rows: int, lr: float | None = None, local_steps: int | None = None
    ) -> tuple[Client, TrialRandom]:
        """Return the task's own client with a defense, and fresh streams for so many rows; count its evaluations."""
        if self.sends != "gradient":
            for name, guess in (("lr", lr), ("local_steps", local_steps)):
                if guess is None:
                    self._grant(name, True)
        guessed = {"lr": lr, "local_steps": local_steps}
        protocol = self._facts.protocol.model_copy(update={k: v for k, v in guessed.items() if v is not None})
        # What a defense makes of a step is not counted: it must not starve whoever simulates it.
        self._count[0] += protocol.local_steps
        random = self._random.at("simulate", self.evaluations - self._begun)
        if rows != self.trials:  # more rows than trials: each has noise of its own
            random = random.rows(-(-rows // self.trials)).part(0, rows)
        return Client(protocol, self.batch_size, chain, self.bounds), random

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws (T, *shape), slice t from trial t's own stream."""
        return self._random.randn(*shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) draws (T, *shape), slice t from trial t's own stream."""
        return self._random.rand(*shape)

    def randint(self, high: int, *shape: int) -> Tensor:
        """Uniform integers 0..high-1 (T, *shape), slice t from trial t's own stream."""
        return self._random.randint(high, *shape)

    def progress(self, done: int, total: int, loss: float | None = None, *, rate: float | None = None) -> None:
        """Tell the harness how far the attack is, ``rate`` in steps per second; cheap enough for every iteration."""
        if self._report is not None:
            self._report({"done": done, "total": total, "loss": loss, "rate": rate})

    def difference(self, update: Mapping[str, Tensor], *, model: Model | None = None) -> dict[str, Tensor]:
        """Return what an update changed, (T, *shape) by parameter name, in the gradient's direction and any unit.

        That is the gradient itself, or the weights before local training minus those after it.

        Args:
            update: What clients sent, or what `simulate` returned; buffers in it are left out.
            model: The model they received; the one of the task where None.

        Raises:
            NotGranted: Weights were sent, or buffers, and the model is withheld.
        """
        buffers = self.model.buffers if self._facts.protocol.send_buffers else {}
        sent = {name: value for name, value in update.items() if name not in buffers}
        if self.sends != "weights":
            return sent
        start, withheld = (model or self.model).parameters, self.withheld
        return {name: value if name in withheld else start[name] - value for name, value in sent.items()}

    def asking(self, target: str) -> Self:
        """Return the same knowledge for an attack that another one runs to recover ``target``."""
        other = copy(self)
        other._facts = replace(self._facts, target=target)
        return other

    def grants(self, name: str) -> bool:
        """Whether the threat model grants ``name``, a word of `leakbench.attack.NEEDS`."""
        return name in self._facts.granted

    def _grant(self, name: str, value: G | None) -> G:
        if name not in self._facts.granted or value is None:
            raise NotGranted(
                f"{name!r} is not granted by this task's threat model; add it to the attack's `needs`, so that the "
                f"task gives not_applicable rows, or do without. Granted: {', '.join(sorted(self._facts.granted))}"
            )
        return value

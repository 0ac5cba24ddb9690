"""What a task is: frozen, validated parts with a content hash. No torch here.

A task fixes everything about a measurement except the attack and the defense: the data, the model and how far it was
trained, the batch, what the client does and sends, what the adversary may know, and what is to be recovered.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    model_validator,
)

from leakbench.parts import Part, content_hash
from leakbench.stage import IN_TRAINING, SGDStage, Stage

Sampler = Literal["iid", "unique", "unbalanced", "single_class", "balanced", "dirichlet"]
BNStatistics = Literal["none", "running", "updated_running", "exact_batch"]
Target = Literal["labels", "inputs", "attribute", "membership"]

INFERENCE = frozenset({"attribute", "membership"})
"""Targets that are one bit per trial, decided by a fair coin."""

LANES = (
    "legacy_upper_bound",
    "passive_labels",
    "passive_images",
    "passive_update",
    "aggregate",
    "malicious_server",
    "inference",
)


class InputSpec(Part):
    """What one input is.

    An input is an opaque tensor between draw and score; only image metrics and image priors look at ``kind``.
    """

    kind: Literal["image"] = "image"
    """Kind of input."""
    shape: tuple[int, ...]
    """Shape of one input, (channels, height, width) for images."""
    mean: tuple[float, ...] = (0.0,)
    """Per-channel mean that is subtracted from values in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (1.0,)
    """Per-channel divisor; one value serves all channels."""


class BatchSpec(Part):
    """How the private batch of a client is drawn."""

    size: Annotated[int, Field(ge=1)] = 1
    """Examples per batch (B)."""
    sampler: Sampler = "iid"
    """``iid``: examples uniformly; ``unique``: B distinct classes; ``unbalanced``: LLG's 50% class a, 25% class b,
    the rest iid (Wainakh et al. 2022); ``single_class``; ``balanced``: as many of each of some ``classes``;
    ``dirichlet``: class proportions from Dirichlet(alpha)."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Concentration of the ``dirichlet`` sampler; only there."""
    classes: Annotated[int, Field(ge=1)] | None = None
    """Number of classes of the ``balanced`` sampler, which are drawn anew for every client; only there."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    """Batch sizes of a cohort whose clients differ: client k has ``sizes[k % len(sizes)]``; ``size`` is the largest."""

    younger: ClassVar[frozenset[str]] = frozenset({"classes", "sizes"})

    @model_validator(mode="before")
    @classmethod
    def _size_is_the_largest(cls, fields: Any) -> Any:
        sizes = fields.get("sizes") if isinstance(fields, dict) else None
        if isinstance(sizes, list | tuple) and sizes and all(type(size) is int for size in sizes):
            if fields.get("size", max(sizes)) != max(sizes):
                raise ValueError(f"size: leave it out, or give the largest of sizes, {max(sizes)}")
            one = len(set(sizes)) == 1  # one law, one hash, one draw of victims
            return {**fields, "size": max(sizes), "sizes": None if one else tuple(sizes)}
        return fields

    def of_client(self, client: int) -> BatchSpec:
        """Return what client ``client`` (from 0) draws: one size."""
        if self.sizes is None:
            return self
        return self.model_copy(update={"size": self.sizes[client % len(self.sizes)], "sizes": None})

    @model_validator(mode="after")
    def _parameters_belong_to_their_samplers(self) -> BatchSpec:
        if (self.sampler == "dirichlet") != (self.alpha is not None):
            raise ValueError("alpha is needed by the dirichlet sampler and by no other")
        if (self.sampler == "balanced") != (self.classes is not None):
            raise ValueError("classes is needed by the balanced sampler and by no other")
        smallest = min(self.sizes or (self.size,))
        if self.classes is not None and self.classes > smallest:
            raise ValueError(f"classes: expected at most the batch size, {smallest}, got {self.classes}")
        return self

    @property
    def label(self) -> str:
        """Short name, e.g. ``b8-unbalanced``."""
        size = "_".join(map(str, self.sizes or (self.size,)))
        return f"b{size}-{self.sampler}" + (f"{self.alpha or self.classes:g}" if self.alpha or self.classes else "")


def local_batches(batches: str, local_steps: int, batches_per_epoch: int) -> int:
    """Return the distinct batches of a client (S), from a `Protocol`'s fields or the columns of a row."""
    return {"fresh": local_steps, "same": 1, "epochs": batches_per_epoch}[batches]


class AttributeSpec(Part):
    """What is to be told of a client: whether examples with some attribute are in its batches."""

    name: str
    """A label map or attribute column of the dataset, or ``class``, its source's own label."""
    value: int = 1
    """The value of an example that has the attribute."""
    mix: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the examples of each batch that have it, rounded up, in a client that does; in one that does not, no
    example has (Melis et al. 2019, arXiv 1805.04049: pure batches at 1, mixed ones below)."""

    def of_batch(self, size: int) -> int:
        """Return how many examples of a batch of ``size`` have the attribute, in a client that does."""
        return math.ceil(round(self.mix * size, 9))  # .07 * 100 is 7.000000000000001

    @property
    def label(self) -> str:
        """Short name, e.g. ``class3`` or ``ge5-mix0.4``."""
        value = "" if self.value == 1 and self.name != "class" else str(self.value)
        return f"{self.name}{value}" + (f"-mix{self.mix:g}" if self.mix < 1 else "")


class Protocol(Part):
    """What a client does and sends."""

    sends: Literal["gradient", "delta", "weights"] = "gradient"
    """``gradient`` of one step; ``delta`` = weights before minus weights after (so delta = lr * summed gradients for
    plain SGD); ``weights`` after the local steps."""
    local_steps: Annotated[int, Field(ge=1)] = 1
    """Optimiser steps before sending; 1 for ``gradient``."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Local learning rate (unused by ``gradient``)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 weight decay."""
    reduction: Literal["mean", "sum"] = "mean"
    """Loss reduction over the batch."""
    batches: Literal["fresh", "same", "epochs"] = "fresh"
    """Batches of the local steps: a new one each step, one and the same, or passes over ``batches_per_epoch``."""
    batches_per_epoch: Annotated[int, Field(ge=1)] = 1
    """Distinct batches of one pass with ``batches: epochs``."""
    batch_norm: Literal["train", "eval"] = "eval"
    """Mode of BatchNorm layers on the client."""
    send_buffers: bool = False
    """Whether BatchNorm running statistics are part of the update."""
    rounds: Annotated[int, Field(ge=1)] = 1
    """Rounds of plant -> update that one attack sees (R). Each starts from the same model, but for what is planted."""
    clients: Annotated[int, Field(ge=1)] = 1
    """Clients behind one update (K)."""
    secure_aggregation: bool = False
    """Whether only the sum of the clients' updates is seen."""
    precision: Literal["float32", "float64"] = "float32"
    """Arithmetic of the client; TF32 is always off."""
    weighting: Literal["equal", "examples"] = "equal"
    """Weights of the clients in the aggregate: equal, or by their numbers of examples (McMahan et al. 2017)."""

    younger: ClassVar[frozenset[str]] = frozenset({"weighting"})

    @model_validator(mode="after")
    def _gradient_is_one_step(self) -> Protocol:
        if self.sends == "gradient" and self.local_steps != 1:
            raise ValueError("sends: gradient is the gradient of one step; use sends: delta for several local_steps")
        if self.batches == "epochs" and self.local_steps % self.batches_per_epoch:
            raise ValueError("with batches: epochs, local_steps must be a multiple of batches_per_epoch")
        return self

    @property
    def local_batches(self) -> int:
        """Distinct batches a client holds (S); it has S * B examples."""
        return local_batches(self.batches, self.local_steps, self.batches_per_epoch)

    @property
    def label(self) -> str:
        """Short name, e.g. ``gradient``, ``delta10`` or ``weights1-lr0.01``; a gradient has no learning rate."""
        default = type(self).model_fields["lr"].default
        rate = f"-lr{self.lr:g}" if self.lr != default else ""
        steps = "" if self.sends == "gradient" else f"{self.local_steps}{rate}"
        cohort = f"-k{self.clients}" if self.clients > 1 else ""
        rounds = f"-r{self.rounds}" if self.rounds > 1 else ""
        weighted = "-weighted" if self.weighting == "examples" else ""
        mode = "-bntrain" if self.batch_norm == "train" else ""
        return self.sends + steps + cohort + rounds + weighted + mode


class ThreatModel(Part):
    """Who the adversary is and what it knows. It is enforced by what is handed over, not by trust."""

    adversary: Literal["honest_but_curious", "malicious_server"] = "honest_but_curious"
    """Whether the server follows the protocol."""
    labels: bool = False
    """Knows the private labels, in batch order."""
    batch_size: bool = True
    """Knows B and the number of local batches."""
    lr: bool = True
    """Knows the local learning rate, momentum and weight decay."""
    local_steps: bool = True
    """Knows the number of local steps."""
    batch_order: bool = False
    """Knows which example was in which local batch."""
    bn_statistics: BNStatistics = "running"
    """Which BatchNorm statistics it knows."""
    auxiliary: Annotated[int, Field(ge=0)] = 0
    """Labelled examples of the auxiliary split that it owns."""
    label_prior: bool = True
    """Knows the class frequencies of the data source (not of the batch)."""
    weights: bool = True
    """Knows architecture and weights of the model."""
    defense: bool = True
    """Knows which defense runs, with its parameters (Kerckhoffs); never its random draws."""
    change_parameters: bool = False
    """May replace parameters of the model that is sent to clients."""
    per_client: bool = False
    """May send different models to different clients."""
    change_architecture: bool = False
    """May insert a named module of leakbench.models."""

    @model_validator(mode="after")
    def _only_a_malicious_server_changes_the_model(self) -> ThreatModel:
        changes = self.change_parameters or self.per_client or self.change_architecture
        if changes and self.adversary != "malicious_server":
            raise ValueError("change_parameters, per_client and change_architecture need adversary: malicious_server")
        return self

    def granted(self) -> frozenset[str]:
        """Return the names of what is granted, in the vocabulary of `leakbench.attack.Attack.needs`."""
        flags = ("labels", "batch_size", "lr", "local_steps", "batch_order", "label_prior", "weights", "defense")
        names = {flag for flag in flags if getattr(self, flag)}
        names |= {flag for flag in ("change_parameters", "per_client", "change_architecture") if getattr(self, flag)}
        if self.auxiliary:
            names.add("auxiliary")
        if self.bn_statistics != "none":
            names.add("bn_statistics")
        return frozenset(names)


class Architecture(Part):
    """A named constructor of a classifier."""

    name: str
    """Name in leakbench.models, or ``torchvision/NAME`` or ``timm/NAME``."""
    init: str = "default"
    """``default``: the architecture's own initialisation; ``uniform(A)``: all weights and biases from U(-A, A), the
    DLG/LLG convention with A = 0.5; ``kaiming``: convolutions He-normal by their outputs (He et al. 2015), the rest as
    ``default``."""
    params: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Constructor arguments, e.g. ``width``."""

    @model_validator(mode="after")
    def _init_is_known(self) -> Architecture:
        if self.init not in ("default", "kaiming") and not re.fullmatch(r"uniform\((\d+\.?\d*|\.\d+)\)", self.init):
            raise ValueError(f"init: expected default, kaiming or uniform(A), e.g. uniform(0.5); got {self.init!r}")
        return self

    @property
    def label(self) -> str:
        """Short name, e.g. ``lenet_zhu-uniform0.5``."""
        extra = "".join(f"-{k}{v}" for k, v in sorted(self.params.items()))
        init = "" if self.init == "default" else "-" + self.init.replace("(", "").replace(")", "")
        return self.name.replace("/", ".") + extra + init


class Task(Part):
    """Dataset x architecture x stage x batch x protocol x threat model x target."""

    dataset: str
    """Name in leakbench.data, or a ``.npz`` file with arrays ``x`` and ``y``."""
    normalise: bool = True
    """Whether inputs are normalised with the dataset's mean and std; otherwise they stay in [0, 1]."""
    architecture: Architecture
    """The classifier."""
    stage: Stage = "untrained"
    """How far the model was trained."""
    batch: BatchSpec = BatchSpec()
    """The private batch."""
    protocol: Protocol = Protocol()
    """What the client does and sends."""
    threat_model: ThreatModel = ThreatModel()
    """What the adversary knows and may do."""
    target: Target = "labels"
    """What is to be recovered: ``labels`` or ``inputs`` of the clients; ``attribute``: whether the first client has
    examples with it; ``membership``: whether a given example is one of the first client's. The last two are decided
    by a fair coin."""
    attribute: AttributeSpec | None = None
    """Which attribute, exactly where that is the target."""
    version: Annotated[int, Field(ge=1)] = 1
    """Raised when the definition of the task changes a number."""

    younger: ClassVar[frozenset[str]] = frozenset({"attribute"})

    @model_validator(mode="after")
    def _clients_without_aggregation_are_trials(self) -> Task:
        if self.protocol.clients > 1 and not self.protocol.secure_aggregation:
            raise ValueError("clients > 1 needs secure_aggregation: true; without it each client is a trial of its own")
        if len(self.batch.sizes or ()) > self.protocol.clients:
            raise ValueError(f"sizes: expected at most one per client, {self.protocol.clients}, got {self.batch.sizes}")
        if self.batch.sizes is not None and self.protocol.batches == "epochs":
            raise ValueError("sizes: clients that differ need batches: fresh or same, not epochs")
        return self

    @model_validator(mode="after")
    def _one_bit_is_asked_of_iid_batches(self) -> Task:
        if (self.target == "attribute") != (self.attribute is not None):
            raise ValueError("target: attribute needs attribute: {name: ...}, and no other target takes one")
        if self.target in INFERENCE and self.batch.sampler != "iid":
            # Another law of labels would by itself tell which batches can have the attribute or hold the candidate.
            raise ValueError(f"target: {self.target} needs sampler: iid, got {self.batch.sampler}")
        return self

    @property
    def hash(self) -> str:
        """Content hash (sha256, hex) of the definition."""
        return content_hash(self.content())

    @property
    def id(self) -> str:
        """Readable name, unique together with the hash."""
        parts = [
            self.dataset if "/" not in self.dataset else self.dataset.rsplit("/", 1)[1],
            self.architecture.label,
            self.stage if (sgd := SGDStage.parse(self.stage)) is None else sgd.label,
            self.batch.label,
            self.protocol.label,
            self.target,
            *([] if self.attribute is None else [self.attribute.label]),
        ]
        return "-".join(parts)

    @property
    def client_sizes(self) -> tuple[int, ...]:
        """N of every client, (K,)."""
        clients, batches = self.protocol.clients, self.protocol.local_batches
        return tuple(self.batch.of_client(k).size * batches for k in range(clients))

    @property
    def total_inputs(self) -> int:
        """Examples behind one update, all clients together."""
        return sum(self.client_sizes)

    @property
    def lane(self) -> str | None:
        """The board this task belongs to (DESIGN.md section 1), or None for a combination without a rank."""
        protocol, threat = self.protocol, self.threat_model
        if self.target != "inputs" and threat.labels:
            return None  # they are the answer, or tell it
        if threat.adversary == "malicious_server":
            return "malicious_server"
        if self.target in INFERENCE:
            return "inference"
        if protocol.clients > 1:
            return "aggregate"
        if protocol.sends != "gradient":
            if protocol.local_steps > 1 and not threat.lr:
                return "passive_update"
            if self.stage != IN_TRAINING:  # there, whatever a federation sends counts
                return None
        if self.target == "labels":
            return "passive_labels"
        if threat.labels:
            easy = self.batch.size == 1 and protocol.batch_norm == "eval"
            return "legacy_upper_bound" if easy else None
        return "passive_images"

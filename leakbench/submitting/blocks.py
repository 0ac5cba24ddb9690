"""Tasks small enough to try any entry on in a moment: digits or what stands for them, a narrow net, four trials.

The truth is in the same process as the entry. That is right for a contract, which asks whether an entry behaves, and
wrong for a score; scores come from `leakbench.runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.attack import FACTS, Attack, Recovery, RecoveryShape
from leakbench.chain import DefenseChain
from leakbench.defense import Defense, DefenseContext
from leakbench.errors import NotApplicable, NotGranted
from leakbench.facts import Facts
from leakbench.federation.aggregation import StreamedSum
from leakbench.federation.client import Client
from leakbench.federation.planting import Planted, check_planted
from leakbench.knowledge import Knowledge
from leakbench.models.functional import Model, build_model
from leakbench.models.imprint import inserted_parameters, insertion, with_inserted
from leakbench.observation import Cohort, Observation, Seen
from leakbench.randomness import TrialRandom
from leakbench.runner.grant import read_names
from leakbench.tasks import Architecture, AttributeSpec, InputSpec, Protocol, ThreatModel

TRIALS = 4
AUXILIARY = 60
BUDGET = 6
"""Gradient evaluations per trial that an attack is granted."""
MALICIOUS = ThreatModel(
    adversary="malicious_server",
    change_parameters=True,
    per_client=True,
    change_architecture=True,
    auxiliary=AUXILIARY,
)
SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
MLP = Architecture(name="mlp", params={"width": 12, "depth": 1})
VIT = Architecture(
    name="timm/vit_tiny_patch16_224",
    params={"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2},
)
ODD = AttributeSpec(name="parity", mix=0.5)
PUBLIC_FACTS = FACTS

Examples = tuple[Tensor, Tensor]

_given: list[Examples] = []


def provide(images: Tensor, labels: Tensor) -> None:
    """Use these examples: a child may not read datasets.

    Args:
        images: uint8 digits (n, 1, 8, 8) in 0..255.
        labels: Their classes (n,).
    """
    _given[:] = [(images.double() / 255, labels.long())]
    digits.cache_clear()


@cache
def digits() -> Examples:
    """Return the examples, inputs (n, 1, 8, 8) normalised by `SPEC` and classes (n,)."""
    if not _given:
        from sklearn.datasets import load_digits  # costly, and not readable in a child

        data = load_digits()
        _given.append((torch.tensor(data.images, dtype=torch.float64)[:, None] / 16, torch.tensor(data.target)))
    images, labels = _given[0]
    return (images - SPEC.mean[0]) / SPEC.std[0], labels


@dataclass(frozen=True)
class Block:
    """One block of trials: everything an entry is handed, and how to take trials or grants away.

    Args:
        protocol: What clients do and send.
        batch: B.
        own_models: Whether each trial has its own model.
        trials: Numbers of the trials.
        granted: What the threat model grants.
        architecture: The net.
        attribute: Which attribute is asked for where that is the target.
        transform: What a defense makes of the architecture.
        streams: Which random streams the clients draw from.
    """

    protocol: Protocol
    batch: int
    own_models: bool = False
    trials: tuple[int, ...] = tuple(range(TRIALS))
    granted: frozenset[str] = MALICIOUS.granted()
    architecture: Architecture = MLP
    attribute: AttributeSpec = ODD
    transform: Callable[[nn.Module], nn.Module] | None = None
    streams: int = 1

    @property
    def inputs_per_client(self) -> int:
        """N of one client."""
        return self.batch * self.protocol.local_batches

    @property
    def shape(self) -> RecoveryShape:
        """What a valid recovery looks like."""
        clients = self.protocol.clients
        return RecoveryShape(len(self.trials), clients, clients * self.inputs_per_client, 10, SPEC.shape)

    @property
    def model(self) -> Model:
        """The net, with one draw or one per trial."""
        draws = self.trials if self.own_models else (0,)
        seeds = [70 + t for t in draws]
        net = build_model(self.architecture, SPEC.shape, 10, seeds=seeds, transform=self.transform)
        return net.to(dtype=torch.float64)

    def with_inserted(self, attack: Attack) -> Model:
        """Return the model with the module that the attack has inserted, all zeros, where it may."""
        if attack.inserts is None:
            return self.model
        if "change_architecture" not in self.granted:
            raise NotApplicable("change_architecture is not granted")
        inserted = insertion(attack.inserts, {**attack.params(), "clients": self.protocol.clients})
        own = inserted_parameters(inserted, SPEC.shape, self.model.draws)
        state = self.model.tensors() | {f"parameter/{name}": value.double() for name, value in own.items()}
        transform = partial(with_inserted, inserted=inserted, input_shape=SPEC.shape)
        return build_model(self.architecture, SPEC.shape, 10, state=state, transform=transform)

    def planted(
        self,
        attack: Attack,
        model: Model,
        prepared: Mapping[str, Tensor],
        history: Sequence[Mapping[str, Tensor]],
        knowledge: Mapping[str, Any],
    ) -> Planted:
        """Have the attack plant, and refuse what the harness refuses."""
        if type(attack).plant is Attack.plant:
            return Planted(model, {}, self.protocol.clients)
        if "change_parameters" not in self.granted:
            raise NotApplicable("change_parameters is not granted")
        tensors = attack.plant(model, Cohort(prepared, **knowledge), history)
        several = self.protocol.clients if self.protocol.clients > 1 else len(self.trials)
        check_planted(tensors, model.parameters, {1, several})
        if "per_client" not in self.granted and any(len(value) > 1 for value in tensors.values()):
            raise NotApplicable("per_client is not granted")
        return Planted(model, tensors, self.protocol.clients)

    def has(self) -> Tensor:
        """Return which examples have the attribute, (n,)."""
        return (digits()[1] % 2 == self.attribute.value).long()

    @property
    def victims(self) -> Examples:
        """Inputs (T, K, N, *shape) and classes (T, K, N) of the clients."""
        images, labels = digits()
        inputs = self.inputs_per_client
        picks = torch.stack(
            [torch.randint(0, 1000, (self.protocol.clients, inputs), generator=_stream(t)) for t in self.trials]
        )
        return images[picks], labels[picks]

    def random(self, purpose: int, count: int | None = None) -> TrialRandom:
        """Return the streams of a purpose, one per trial."""
        trials = self.trials if count is None else range(count)
        seeds = [torch.randint(0, 256, (32,), generator=_stream(hash((purpose, t)))) for t in trials]
        return TrialRandom(torch.stack(seeds).to(torch.uint8))

    def update(
        self, *, defense: Defense | None = None, names: Sequence[str] | None = None, planted: Planted | None = None
    ) -> dict[str, Tensor]:
        """Return what is sent, (T, *shape) by name."""
        images, labels = self.victims
        planted = planted or Planted(self.model, {}, self.protocol.clients)
        client = Client(self.protocol, self.batch, DefenseChain([defense] if defense else []))
        total = StreamedSum((1,) * self.protocol.clients)
        for k in range(self.protocol.clients):
            random = self.random(self.streams)
            model = planted.model_of(k)
            wanted = None if names is None else frozenset(names)
            total.add(client.update(model, images[:, k], labels[:, k], random=random, client=k, names=wanted))
        return total.mean()

    def knowledge(
        self, purpose: int, count: int | None = None, target: str = "labels", model: Model | None = None
    ) -> dict[str, Any]:
        """Return the arguments of a `Knowledge`."""
        granted = self.granted
        images, labels = digits()
        facts = Facts(
            granted=granted,
            protocol=self.protocol,
            input_spec=SPEC,
            normalised=True,
            num_classes=10,
            clients=self.protocol.clients,
            batch_size=self.batch if "batch_size" in granted else None,
            inputs_per_client=self.inputs_per_client if "batch_size" in granted else None,
            class_prior=(0.1,) * 10 if "label_prior" in granted else None,
            model_evaluations=BUDGET,
            target=target,
            attribute=self.attribute if target == "attribute" else None,
        )
        return {
            "facts": facts,
            "random": self.random(purpose, count),
            "model": (model or self.model) if "weights" in granted else None,
            "auxiliary": (images[-AUXILIARY:], labels[-AUXILIARY:]) if "auxiliary" in granted else None,
            "auxiliary_attribute": self.has()[-AUXILIARY:] if "auxiliary" in granted else None,
            "defense": DefenseChain() if "defense" in granted else None,
        }

    def attack(self, attack: Attack, *, watch: Callable[[dict[str, Tensor]], object] = len) -> Recovery:
        """Prepare, plant and run ``attack`` as the harness does; return the checked recovery.

        Args:
            attack: The attack.
            watch: Is handed the update that the attack will see, and may change it.

        Raises:
            NotApplicable: It declines the task before it sees an update.
            InvalidOutput: What it returns is not valid.
        """
        asked = ("inputs", "attribute", "membership", "labels")
        target = next(target for target in asked if target in type(attack).recovers)
        model = self.with_inserted(attack)
        try:
            preparing = self.knowledge(2, None if self.own_models else 1, target, model)
            prepared = attack.prepare(Knowledge(**preparing))
        except NotGranted as error:  # here, before an update was seen, it declines the task
            raise NotApplicable(str(error)) from None
        knowledge = self.knowledge(3, None, target, model)
        planted = self.planted(attack, model, prepared, [], knowledge)
        update = self.update(planted=planted)
        names = read_names(attack.reads, model, self.protocol, target)  # type: ignore[arg-type]
        seen = {name: value for name, value in update.items() if name in names}
        watch(seen)
        images, classes = self.victims
        labels = classes if "labels" in self.granted else None
        candidates = (images[:, 0, 0], classes[:, 0, 0]) if target == "membership" else None
        shown = Seen([seen], labels=labels, prepared=prepared, planted=[planted], candidates=candidates)
        return self.shape.check(attack.run(Observation(shown, **knowledge)), frozenset({target}))

    def context(self, purpose: int) -> DefenseContext:
        """Return what a defense is told at the first client's first step."""
        images, labels = self.victims
        return DefenseContext(
            model=self.model,
            inputs=images[:, 0],
            labels=labels[:, 0],
            loss=None,
            round=0,
            client=0,
            local_step=0,
            lr=0.1,
            random=self.random(purpose),
        )

    def only(self, *trials: int) -> Block:
        """Return the block of these trials alone."""
        return replace(self, trials=trials)

    def under(self, defense: Defense) -> Block:
        """Return the block with the architecture that the defense makes of it."""
        return replace(self, transform=defense.model) if defense.overrides("model") else self

    def granting(self, names: frozenset[str]) -> Block:
        """Return the block where nothing else is granted."""
        return replace(self, granted=frozenset(names))


def _stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed & (2**62 - 1))


BLOCKS = {
    "gradient": Block(Protocol(precision="float64"), batch=3),
    "single": Block(Protocol(precision="float64"), batch=1, own_models=True),
    "delta": Block(Protocol(sends="delta", local_steps=2, precision="float64"), batch=2, own_models=True),
    "weights": Block(Protocol(sends="weights", local_steps=2, batches="same", precision="float64"), batch=2),
    "clients": Block(Protocol(clients=2, secure_aggregation=True, precision="float64"), batch=2),
    "batch_norm": Block(
        Protocol(clients=2, secure_aggregation=True, batch_norm="train", precision="float64"),
        batch=3,
        architecture=Architecture(name="mlp", params={"width": 12, "depth": 1, "batch_norm": True}),
    ),
    "vit": Block(Protocol(precision="float64"), batch=1, architecture=VIT),
}
"""One block per way of sending, BatchNorm on an aggregate, and a transformer."""

"""A task small enough to run every entry on: digits, a narrow net, four trials."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import leakbench_baselines
import torch
from sklearn.datasets import load_digits
from torch import nn

from leakbench import Attack, Cohort, Defense, Knowledge, NotApplicable, NotGranted, Observation
from leakbench.attack import FACTS, RecoveryShape
from leakbench.defense import DefenseChain
from leakbench.facts import Facts
from leakbench.federation.aggregation import StreamedSum
from leakbench.federation.client import Client
from leakbench.federation.planting import Planted, check_planted
from leakbench.models.functional import build_model
from leakbench.models.imprint import inserted_parameters, insertion, with_inserted
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.runner.grant import read_names
from leakbench.tasks import Architecture, AttributeSpec, InputSpec, Protocol, ThreatModel

TRIALS = 4
AUXILIARY = 60
MALICIOUS = ThreatModel(
    adversary="malicious_server",
    change_parameters=True,
    per_client=True,
    change_architecture=True,
    auxiliary=AUXILIARY,
)
BUDGET = 6
SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
MLP = Architecture(name="mlp", params={"width": 12, "depth": 1})
VIT = Architecture(
    name="timm/vit_tiny_patch16_224",
    params={"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2},
)
ODD = AttributeSpec(name="parity", mix=0.5)
PUBLIC_FACTS = FACTS


@cache
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float64)[:, None] / 16
    return (images - 0.3) / 0.4, torch.tensor(data.target)


def entries(kind):
    """Return (stem, class) of every baseline file."""
    package = importlib.import_module(f"{leakbench_baselines.__name__}.{kind}")
    base = {"attacks": Attack, "defenses": Defense}[kind]
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        found += [(info.name, c) for c in own if issubclass(c, base)]
    return found


@dataclass(frozen=True)
class Tiny:
    """One block of trials: everything an attack is handed, and how to take trials or grants away."""

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
    def inputs_per_client(self):
        return self.batch * self.protocol.local_batches

    @property
    def shape(self):
        clients = self.protocol.clients
        return RecoveryShape(len(self.trials), clients, clients * self.inputs_per_client, 10, SPEC.shape)

    @property
    def model(self):
        draws = self.trials if self.own_models else (0,)
        seeds = [70 + t for t in draws]
        net = build_model(self.architecture, SPEC.shape, 10, seeds=seeds, transform=self.transform)
        return net.to(dtype=torch.float64)

    def with_inserted(self, attack):
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

    def planted(self, attack, model, prepared, history, knowledge):
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

    def has(self):
        """Return which digits have the attribute."""
        return (digits()[1] % 2 == self.attribute.value).long()

    @property
    def victims(self):
        images, labels = digits()
        inputs = self.inputs_per_client
        picks = torch.stack(
            [torch.randint(0, 1000, (self.protocol.clients, inputs), generator=_stream(t)) for t in self.trials]
        )
        return images[picks], labels[picks]

    def random(self, purpose, count=None):
        trials = self.trials if count is None else range(count)
        seeds = [torch.randint(0, 256, (32,), generator=_stream(hash((purpose, t)))) for t in trials]
        return TrialRandom(torch.stack(seeds).to(torch.uint8))

    def update(self, *, defense=None, names=None, planted=None):
        images, labels = self.victims
        planted = planted or Planted(self.model, {}, self.protocol.clients)
        client = Client(self.protocol, self.batch, DefenseChain([defense] if defense else []))
        total = StreamedSum((1,) * self.protocol.clients)
        for k in range(self.protocol.clients):
            random = self.random(self.streams)
            model = planted.model_of(k)
            total.add(client.update(model, images[:, k], labels[:, k], random=random, client=k, names=names))
        return total.mean()

    def knowledge(self, purpose, count=None, target="labels", model=None):
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

    def attack(self, attack, *, watch=lambda update: None):
        """Prepare, plant and run ``attack`` as the harness does; return the checked recovery."""
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
        names = read_names(attack.reads, model, self.protocol, target)
        seen = {name: value for name, value in update.items() if name in names}
        watch(seen)
        labels = self.victims[1] if "labels" in self.granted else None
        images, classes = self.victims
        candidates = (images[:, 0, 0], classes[:, 0, 0]) if target == "membership" else None
        shown = Seen([seen], labels=labels, prepared=prepared, planted=[planted], candidates=candidates)
        observation = Observation(shown, **knowledge)
        return self.shape.check(attack.run(observation), frozenset({target}))

    def only(self, *trials):
        return replace(self, trials=trials)

    def under(self, defense):
        """Return the block with the architecture that the defense makes of it."""
        return replace(self, transform=defense.model) if defense.overrides("model") else self

    def granting(self, names):
        return replace(self, granted=frozenset(names))


def _stream(seed):
    return torch.Generator().manual_seed(seed & (2**62 - 1))


PROTOCOLS = {
    "gradient": Tiny(Protocol(precision="float64"), batch=3),
    "single": Tiny(Protocol(precision="float64"), batch=1, own_models=True),
    "delta": Tiny(Protocol(sends="delta", local_steps=2, precision="float64"), batch=2, own_models=True),
    "weights": Tiny(Protocol(sends="weights", local_steps=2, batches="same", precision="float64"), batch=2),
    "clients": Tiny(Protocol(clients=2, secure_aggregation=True, precision="float64"), batch=2),
    "batch_norm": Tiny(
        Protocol(clients=2, secure_aggregation=True, batch_norm="train", precision="float64"),
        batch=3,
        architecture=Architecture(name="mlp", params={"width": 12, "depth": 1, "batch_norm": True}),
    ),
    "vit": Tiny(Protocol(precision="float64"), batch=1, architecture=VIT),
}
"""One block per way of sending, BatchNorm on an aggregate, and a transformer."""

"""A task small enough to run every entry on: digits, a narrow net, four trials."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass, replace
from functools import cache

import leakbench_baselines
import torch
from sklearn.datasets import load_digits

from leakbench import Attack, Defense, Knowledge, NotApplicable, NotGranted, Observation
from leakbench.attack import FACTS, RecoveryShape
from leakbench.defense import DefenseChain
from leakbench.federation.aggregation import StreamedSum
from leakbench.federation.client import Client
from leakbench.knowledge import Facts
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.runner.grant import read_names
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

TRIALS = 4
AUXILIARY = 60
BUDGET = 6
SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
MLP = Architecture(name="mlp", params={"width": 12, "depth": 1})
VIT = Architecture(
    name="timm/vit_tiny_patch16_224",
    params={"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2},
)
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
    granted: frozenset[str] = ThreatModel(auxiliary=AUXILIARY).granted()
    architecture: Architecture = MLP

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
        return build_model(self.architecture, SPEC.shape, 10, seeds=[70 + t for t in draws]).to(dtype=torch.float64)

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

    def update(self, *, defense=None, names=None):
        images, labels = self.victims
        client = Client(self.protocol, self.batch, DefenseChain([defense] if defense else []))
        total = StreamedSum((1,) * self.protocol.clients)
        for k in range(self.protocol.clients):
            random = self.random(1)
            total.add(client.update(self.model, images[:, k], labels[:, k], random=random, client=k, names=names))
        return total.mean()

    def knowledge(self, purpose, count=None, target="labels"):
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
        )
        return {
            "facts": facts,
            "random": self.random(purpose, count),
            "model": self.model if "weights" in granted else None,
            "auxiliary": (images[-AUXILIARY:], labels[-AUXILIARY:]) if "auxiliary" in granted else None,
            "defense": DefenseChain() if "defense" in granted else None,
        }

    def attack(self, attack, *, update=None):
        """Prepare and run ``attack`` on the tensors it reads, as the harness does; returns the checked recovery."""
        target = "inputs" if "inputs" in type(attack).recovers else "labels"
        try:
            prepared = attack.prepare(Knowledge(**self.knowledge(2, None if self.own_models else 1, target)))
        except NotGranted as error:  # here, before an update was seen, it declines the task
            raise NotApplicable(str(error)) from None
        names = read_names(attack.reads, self.model, self.protocol, target)
        seen = {name: value for name, value in (update or self.update()).items() if name in names}
        labels = self.victims[1] if "labels" in self.granted else None
        observation = Observation(Seen([seen], labels=labels, prepared=prepared), **self.knowledge(3, None, target))
        return self.shape.check(attack.run(observation), frozenset({target}))

    def only(self, *trials):
        return replace(self, trials=trials)

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
    "vit": Tiny(Protocol(precision="float64"), batch=1, architecture=VIT),
}
"""One block per way of sending, and a transformer; every attack that is granted what it needs has to work on each."""

"""What a harness would hand to a label attack: blocks of real digits on nets of one's choice, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, Observation
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import Model, build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8))
CLASSES = 10


@dataclass(frozen=True)
class Block:
    """T trials of one task: what the attacker may know, and the truth.

    Args:
        model: M = T nets, or 1.
        inputs: (T, N, 1, 8, 8).
        labels: (T, N).
        seeds: (T, 32) of the attacker's streams.
        knowledge: Arguments of `Knowledge`.
    """

    protocol: Protocol
    batch: int
    model: Model
    inputs: Tensor
    labels: Tensor
    seeds: Tensor
    knowledge: dict[str, Any] = field(repr=False)

    @property
    def counts(self) -> Tensor:
        """True label counts (T, C)."""
        return F.one_hot(self.labels, CLASSES).sum(1)

    def update(self) -> dict[str, Tensor]:
        """What the undefended clients send."""
        return Client(self.protocol, self.batch).update(
            self.model, self.inputs, self.labels, random=self.knowledge["random"]
        )

    def run(self, attack: Attack, update: dict[str, Tensor] | None = None) -> Tensor:
        """Counts (T, C) that the attack claims, for ``update`` or for what the clients send."""
        # As in the harness, what is prepared belongs to models, of which there may be fewer than trials.
        prepared = attack.prepare(
            Knowledge(**{**self.knowledge, "random": TrialRandom(self.seeds[: self.model.draws])})
        )
        observation = Observation(Seen([update or self.update()], prepared=prepared), **self.knowledge)
        counts = attack.run(observation).label_counts
        assert counts.shape == (len(self.labels), 1, CLASSES)
        assert counts.dtype == torch.int64
        return counts[:, 0]

    def recall(self, attack: Attack) -> float:
        """Mean instance recall."""
        counts = self.run(attack)
        return float((torch.minimum(counts, self.counts).sum(1) / self.labels.shape[1]).mean())

    def plain_head_gradient(self, trial: int) -> tuple[Tensor, Tensor]:
        """Weight (C, d) and bias (C,) gradient of one trial's first batch, by one backward pass."""
        state = {k: v[trial % len(v)].clone() for k, v in (self.model.parameters | self.model.buffers).items()}
        head = [state[f"{self.model.head}.{part}"].requires_grad_() for part in ("weight", "bias")]
        logits = functional_call(self.model.module, state, (self.inputs[trial, : self.batch],))
        return torch.autograd.grad(F.cross_entropy(logits, self.labels[trial, : self.batch]), head)


def digits_block(
    batch: int,
    *,
    architecture: str = "lenet_zhu",
    protocol: Protocol | None = None,
    trials: int = 4,
    models: int | None = None,
    auxiliary: int = 80,
    sampler: str = "unbalanced",
    seed: int = 0,
    **params: Any,
) -> Block:
    """Draw a block.

    Args:
        batch: B.
        architecture: Name of the net; ``params`` are its parameters.
        protocol: What the clients do; one gradient where None.
        trials: T.
        models: M, T where None.
        auxiliary: Examples the attacker owns.
        sampler: ``unbalanced`` (half of one class, a quarter of another), ``iid`` or ``unique``.
        seed: Of weights and picks.
    """
    protocol = protocol or Protocol()
    data = load_digits()
    images, targets = torch.tensor(data.images)[:, None] / 16, torch.tensor(data.target)
    stream = torch.Generator().manual_seed(seed)
    count = batch * protocol.local_batches
    if sampler == "unique":
        wanted = torch.stack([torch.randperm(CLASSES, generator=stream)[:count] for _ in range(trials)])
    else:
        wanted = torch.randint(CLASSES, (trials, count), generator=stream)
    if sampler == "unbalanced":
        place = torch.arange(count) % batch
        first, second = wanted[:, :1], (wanted[:, :1] + 1 + torch.randint(CLASSES - 1, (trials, 1), generator=stream))
        wanted = torch.where(place < batch // 2, first, wanted)
        wanted = torch.where((place >= batch // 2) & (place < batch // 2 + batch // 4), second % CLASSES, wanted)
    members = [(targets[:1500] == c).nonzero()[:, 0] for c in range(CLASSES)]
    picks = torch.tensor(
        [[members[c][torch.randint(len(members[c]), (), generator=stream)] for c in row] for row in wanted.tolist()]
    )
    draws = range(1000 * seed, 1000 * seed + (models or trials))
    model = build_model(Architecture(name=architecture, params=params), SPEC.shape, CLASSES, seeds=draws)
    model = model.to(dtype=torch.float64)
    facts = Facts(
        granted=ThreatModel(auxiliary=auxiliary).granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=False,
        num_classes=CLASSES,
        batch_size=batch,
        inputs_per_client=count,
        class_prior=(0.1,) * CLASSES,
    )
    seeds = torch.arange(4 * trials).view(torch.uint8).reshape(trials, 32)  # four int64 each
    knowledge = {
        "facts": facts,
        "random": TrialRandom(seeds),
        "model": model,
        "auxiliary": (images[-auxiliary:], targets[-auxiliary:]),
    }
    return Block(protocol, batch, model, images[picks], targets[picks], seeds, knowledge)

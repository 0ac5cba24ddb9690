"""What a harness does with an attack that plants: prepare, plant and aggregate round after round, then run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from leakbench import Knowledge, Observation
from leakbench.facts import Facts
from leakbench.federation.aggregation import StreamedSum, aggregation_weights
from leakbench.federation.client import Client
from leakbench.federation.planting import Planted
from leakbench.models.functional import Model, build_model
from leakbench.observation import Cohort, Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPOILS = {
    "zeros": torch.zeros_like,
    "constant": torch.ones_like,
    "tiny": lambda v: v * 1e-300,
    "huge": lambda v: v * 1e200,
    "noise": lambda v: torch.randn(v.shape, generator=torch.Generator().manual_seed(3), dtype=v.dtype),
}
"""What may become of a tensor of an update, (T, *shape) float64."""


@dataclass(frozen=True)
class Cast:
    """One block: what is private, and what the attack sees of it.

    Args:
        observation: What the attack sees.
        model: The honest model.
        inputs: One (T, N_k, *input_shape) per client.
        labels: One (T, N_k) per client.
        plants: What clients got, per round.
    """

    observation: Observation
    model: Model
    inputs: list[Tensor]
    labels: list[Tensor]
    plants: list[Planted]


def digits():
    """Return scikit-learn's digits, (1797, 1, 8, 8) in [0, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.images)[:, None] / 16, torch.tensor(data.target)


def play(
    attack,
    *,
    sizes=(4, 4),
    net=None,
    trials=3,
    own_models=False,
    target="inputs",
    dataset=None,
    picks=None,
    dtype=torch.float64,
    budget=None,
    withheld=(),
    model=None,
    **protocol,
):
    """Run every stage before `Attack.run` and return the `Cast`.

    ``picks`` are indices (T, sum of sizes) of the private examples; random ones of the first 1,500 where None. The last
    examples of ``dataset`` are auxiliary.
    """
    images, targets = dataset or digits()
    images = images.to(dtype)
    protocol = Protocol(clients=len(sizes), precision=str(dtype).removeprefix("torch."), **protocol)
    if picks is None:
        picks = torch.randint(0, 1500, (trials, sum(sizes)), generator=torch.Generator().manual_seed(5))
    trials = len(picks)
    inputs = list(images[picks].split(sizes, 1))
    labels = list(targets[picks].split(sizes, 1))
    shape = tuple(images.shape[1:])
    net = net or Architecture(name="mlp", params={"width": 40, "depth": 2})
    if model is None:
        model = build_model(net, shape, 10, seeds=range(trials if own_models else 1)).to(dtype=dtype)
    threat = ThreatModel(
        adversary="malicious_server",
        auxiliary=300,
        change_parameters=True,
        per_client=True,
        **{"labels": False, **dict.fromkeys(withheld, False)},
    )
    facts = Facts(
        granted=threat.granted(),
        protocol=protocol,
        input_spec=InputSpec(shape=shape),
        normalised=False,
        num_classes=10,
        clients=len(sizes),
        batch_size=-(-sum(sizes) // len(sizes) // protocol.local_batches),
        inputs_per_client=-(-sum(sizes) // len(sizes)),
        client_sizes=sizes,
        class_prior=(0.1,) * 10,
        model_evaluations=budget,
        target=target,
    )

    def known(count, purpose):
        seeds = torch.arange(32 * purpose, 32 * (purpose + count)).reshape(count, 32)
        return {
            "facts": facts,
            "random": TrialRandom(seeds.to(torch.uint8)),
            "model": model,
            "auxiliary": (images[-300:], targets[-300:]),
        }

    prepared = attack.prepare(Knowledge(**known(model.draws, 1)))
    weights = aggregation_weights(protocol, sizes)
    updates, plants = [], []
    for index in range(protocol.rounds):
        planted = Planted(model, attack.plant(model, Cohort(prepared, **known(model.draws, 2)), updates), len(sizes))
        total = StreamedSum(weights)
        for k, size in enumerate(sizes):
            client = Client(protocol, size // protocol.local_batches)
            random = TrialRandom(torch.full((trials, 32), index).to(torch.uint8))
            total.add(client.update(planted.model_of(k), inputs[k], labels[k], random=random, client=k))
        updates.append(total.mean())
        plants.append(planted)
    observation = Observation(Seen(updates, prepared=prepared, planted=plants), **known(trials, 3))
    return Cast(observation, model, inputs, labels, plants)


def showing(cast, update):
    """Return what an attack sees of a `Cast` of one round where another update was sent."""
    seen = cast.observation
    known = {name: getattr(seen, f"_{name}") for name in ("facts", "random", "model", "auxiliary")}
    return Observation(Seen([update], prepared=seen.prepared), **known)


def psnr(recovered, true):
    """Return the best PSNR (T,) of any recovered (T, n, *) against any true input (T, N, *)."""
    error = (recovered[:, :, None].clamp(0, 1).double() - true[:, None].double()).square().flatten(3).mean(3)
    return (-10 * error.clamp(min=1e-12).log10()).flatten(1).amax(1)

"""What chains of defenses declare against what their clients do."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.consistency_check import ConsistencyCheck
from leakbench_baselines.defenses.dp_sgd import DPSGD
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.topk import TopK

from leakbench import Defense, LeakbenchError, Mechanism
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.mechanism import averaged
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, Protocol

PARTS = {
    "clip": ClipL2(bound=0.05),
    "noise": GaussianNoise(std=0.01),
    "dp": DPSGD(clip=0.5, noise_multiplier=0.4),
    "dp_alone": DPSGD(clip=0.3, noise_multiplier=0),
}
CHAINS = [(), *itertools.chain.from_iterable(itertools.permutations(PARTS, n) for n in (1, 2, 3))]
PROTOCOLS = {
    "gradient": Protocol(precision="float64"),
    "sum": Protocol(precision="float64", reduction="sum"),
    "delta": Protocol(sends="delta", lr=0.3, weight_decay=0.1, momentum=0.5, precision="float64"),
    "weights": Protocol(sends="weights", lr=0.3, precision="float64"),
    "steps": Protocol(sends="delta", local_steps=3, lr=0.3, precision="float64"),
}
MODEL = build_model(Architecture(name="mlp", params={"width": 6}), (1, 3, 3), 4, seeds=[3]).to(dtype=torch.float64)
SIZE = sum(value.numel() for value in MODEL.parameters.values())
BATCH = 3


def streams(trials, seed):
    return TrialRandom(torch.full((trials, 32), seed, dtype=torch.uint8))


def sent(chain, protocol, inputs, labels, seed=0):
    client = Client(protocol, BATCH, DefenseChain([PARTS[name] for name in chain]))
    update = client.update(MODEL, inputs, labels, random=streams(len(labels), seed))
    return torch.cat([value.flatten(1) for value in update.values()], 1)


@settings(deadline=None, max_examples=60)
@given(
    chain=st.sampled_from(CHAINS),
    protocol=st.sampled_from(sorted(PROTOCOLS)),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 2**31),
)
def test_no_batch_moves_the_update_further_than_declared(chain, protocol, scale, seed):
    protocol = PROTOCOLS[protocol]
    mechanism = DefenseChain([PARTS[name] for name in chain]).mechanism(protocol, BATCH)
    if mechanism is None:
        return
    stream, count = torch.Generator().manual_seed(seed), BATCH * protocol.local_batches
    inputs = scale * torch.randn(20, count, 1, 3, 3, generator=stream, dtype=torch.float64)
    labels = torch.randint(0, 4, (20, count), generator=stream)
    one = inputs[:1].expand(20, -1, -1, -1, -1).clone(), labels[:1].expand(20, -1).clone()
    one[0][:, -1], one[1][:, -1] = inputs[:, -1], labels[:, -1]
    # One and the same noise in all of them, so that distances are free of it.
    assert torch.pdist(sent(chain, protocol, *one)).max() <= mechanism.example * (1 + 1e-9)
    assert torch.pdist(sent(chain, protocol, inputs, labels)).max() <= mechanism.update * (1 + 1e-9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_the_noise_has_the_declared_deviation(chain, protocol):
    protocol = PROTOCOLS[protocol]
    mechanism = DefenseChain([PARTS[name] for name in chain]).mechanism(protocol, BATCH)
    if mechanism is None:
        return
    stream, count = torch.Generator().manual_seed(0), BATCH * protocol.local_batches
    inputs = torch.randn(1, count, 1, 3, 3, generator=stream, dtype=torch.float64).expand(2, -1, -1, -1, -1)
    labels = torch.randint(0, 4, (1, count), generator=stream).expand(2, -1)
    draws = torch.cat([sent(chain, protocol, inputs, labels, seed)[:1] for seed in range(100)])
    if mechanism.std == 0:
        assert torch.equal(draws, draws[:1].expand_as(draws))
    else:
        assert draws.std(0).square().mean().sqrt() == pytest.approx(mechanism.std, rel=5 / math.sqrt(200 * SIZE))


def test_the_bounds_of_dp_sgd_are_reached():
    # Two classes and no hidden layer: an example's gradient with the one label is minus a multiple of the other's.
    model = build_model(Architecture(name="mlp", params={"depth": 0}), (1, 3, 3), 2, seeds=[0]).to(dtype=torch.float64)
    inputs = torch.rand(1, BATCH, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chain, updates = DefenseChain([DPSGD(clip=0.01, noise_multiplier=0)]), []
    for labels in ([0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]):
        found = Client(Protocol(), BATCH, chain).update(model, inputs, torch.tensor([labels]), random=streams(1, 0))
        updates.append(torch.cat([value.flatten() for value in found.values()]))
    mechanism = chain.mechanism(Protocol(), BATCH)
    assert (updates[0] - updates[1]).norm() == pytest.approx(mechanism.example, rel=1e-9)
    inputs = inputs[:, :1].expand_as(inputs)
    updates = [
        Client(Protocol(), BATCH, chain).update(model, inputs, torch.full((1, BATCH), k), random=streams(1, 0))
        for k in (0, 1)
    ]
    far = torch.cat([(updates[0][name] - updates[1][name]).flatten() for name in updates[0]]).norm()
    assert far == pytest.approx(mechanism.update, rel=1e-9)


def declared(*parts, protocol="gradient"):
    return DefenseChain(parts).mechanism(PROTOCOLS[protocol], BATCH)


def test_the_values_of_known_chains():
    inf = math.inf
    assert declared() == Mechanism(std=0, example=inf, update=inf)
    assert declared(GaussianNoise(std=3), GaussianNoise(std=4)) == Mechanism(std=5, example=inf, update=inf)
    assert declared(ClipL2(bound=2), GaussianNoise(std=3)) == Mechanism(std=3, example=4, update=4)
    assert declared(DPSGD(clip=6, noise_multiplier=2)) == Mechanism(std=4, example=4, update=12)
    assert declared(DPSGD(clip=6, noise_multiplier=2), protocol="sum") == Mechanism(std=12, example=12, update=36)
    assert declared(DPSGD(clip=9, noise_multiplier=0), ClipL2(bound=5)) == Mechanism(example=6, update=10)
    # Hooks, not the order of writing, decide: what clips the update comes after the noise of a step.
    assert declared(ClipL2(), DPSGD()) is None
    third = declared(DPSGD(clip=6, noise_multiplier=2), protocol="delta")
    assert (third.std, third.example, third.update) == pytest.approx((1.2, 1.2, 3.6))
    assert declared(ClipL2(bound=2), GaussianNoise(std=3), protocol="steps") == Mechanism(std=3, example=4, update=4)


@pytest.mark.parametrize(
    ("parts", "protocol"),
    [
        ((GaussianNoise(std=0.1), ClipL2()), "gradient"),
        ((GaussianNoise(std=0.1, relative=True),), "gradient"),
        ((ClipL2(per_layer=True),), "gradient"),
        ((TopK(), GaussianNoise(std=0.1)), "gradient"),
        ((ConsistencyCheck(), GaussianNoise(std=0.1)), "gradient"),
        ((DPSGD(),), "steps"),
    ],
)
def test_what_cannot_be_promised_is_not(parts, protocol):
    assert declared(*parts, protocol=protocol) is None


def test_a_clip_in_a_step_after_noise_per_example_is_seen_as_such():
    class NoiseEach(Defense):
        def per_example(self, grads, ctx):
            return grads

        def mechanism(self, before, *, batch_size, reduction):
            return before.noised(1.0)

    class ClipStep(Defense):
        def step(self, grads, ctx):
            return grads

        def mechanism(self, before, *, batch_size, reduction):
            return before.clipped(1.0)

    assert declared(ClipStep(), NoiseEach()) is None
    assert declared(ClipStep()) == Mechanism(example=2, update=2)


def test_running_statistics_are_promised_nothing():
    assert DefenseChain([DPSGD()]).mechanism(Protocol(send_buffers=True), BATCH) is None


def test_a_mean_of_clients_has_less_noise_and_less_of_each_example():
    one = Mechanism(std=2, example=3, update=6)
    assert averaged([one], [7]) == one
    mean = averaged([one] * 4, [1] * 4)
    assert (mean.std, mean.example, mean.update) == (1, 0.75, 6)
    odd = averaged([Mechanism(std=1, example=2, update=4), Mechanism(std=3, example=1, update=2)], [3, 1])
    assert odd == Mechanism(std=math.hypot(0.75, 0.75), example=1.5, update=3.5)


def test_mu_is_the_change_in_units_of_the_noise():
    mechanism = Mechanism(std=2, example=3, update=6)
    assert (mechanism.mu_example, mechanism.mu_update) == (1.5, 3)
    assert Mechanism(example=1, update=1).mu_example == math.inf
    with pytest.raises(LeakbenchError, match="example <= update"):
        Mechanism(std=1, example=3, update=2)

"""Label floors and defenses of the baselines against independent references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.attacks.bias_count import BiasCount, round_to_total
from leakbench_baselines.attacks.prior_labels import PriorLabels
from leakbench_baselines.attacks.random_labels import RandomLabels
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.null_update import NullUpdate
from leakbench_baselines.defenses.topk import TopK
from torch.distributions import Normal

from leakbench import DefenseContext, Knowledge, Observation, UserError
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8))
SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (3, 6)}


def streams(trials, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return TrialRandom(torch.randint(0, 256, (trials, 32), generator=stream).to(torch.uint8))


def context(trials):
    empty = torch.empty(0)
    fields = {"round": 0, "client": 0, "local_step": 0, "lr": 0.1, "loss": None}
    return DefenseContext(model=None, inputs=empty, labels=empty, random=streams(trials), **fields)


def updates(trials, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return {n: torch.randn(trials, *s, generator=stream, dtype=torch.float64) for n, s in SHAPES.items()}


def observe(inputs, *, trials, prior=(0.1,) * 10, clients=1):
    facts = Facts(
        granted=ThreatModel().granted(),
        protocol=Protocol(clients=clients),
        input_spec=SPEC,
        normalised=False,
        num_classes=len(prior),
        clients=clients,
        batch_size=inputs,
        inputs_per_client=inputs,
        class_prior=prior,
    )
    return Observation(Seen([{}]), facts=facts, random=streams(trials))


# --- label attacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [(0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.05, 0.05, 0.9), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("inputs", [1, 3, 6])
def test_prior_labels_are_the_best_constant_guess(prior, inputs):
    def recall(guess):
        total = 0.0
        for batch in itertools.product(range(3), repeat=inputs):
            chance = math.prod(prior[label] for label in batch)
            total += chance * sum(min(batch.count(c), guess[c]) for c in range(3)) / inputs
        return total

    counts = PriorLabels().run(observe(inputs, trials=2, prior=prior, clients=2)).label_counts
    assert counts.shape == (2, 2, 3)
    assert (counts.sum(-1) == inputs).all()
    guesses = [g for g in itertools.product(range(inputs + 1), repeat=3) if sum(g) == inputs]
    assert recall(counts[0, 0].tolist()) == pytest.approx(max(map(recall, guesses)))


def test_random_labels_are_uniform_and_sum_to_the_batch():
    counts = RandomLabels().run(observe(50, trials=200)).label_counts
    assert counts.shape == (200, 1, 10)
    assert (counts.sum(-1) == 50).all()
    share = counts.double().mean((0, 1)) / 50
    assert (share - 0.1).abs().max() < 5 * math.sqrt(0.09 / 10_000)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-2, 5), min_size=4, max_size=4), min_size=1, max_size=4), total=st.integers(1, 300)
)
def test_rounding_keeps_the_total_and_moves_no_count_by_one(rows, total):
    counts = round_to_total(torch.tensor(rows, dtype=torch.float64), total)
    for row, count in zip(rows, counts.tolist(), strict=True):
        positive = [max(x, 0.0) for x in row]
        mass = sum(positive)
        share = [x / mass * total for x in positive] if mass > 0 else [total / 4] * 4
        assert sum(count) == total
        assert all(abs(c - s) < 1 + 1e-9 for c, s in zip(count, share, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clients", [1, 2])
def test_bias_count_is_exact_where_confidences_do_not_depend_on_the_input(reduction, clients):
    trials, batch = 5, 16
    protocol = Protocol(reduction=reduction, clients=clients)
    model = build_model(Architecture(name="mlp", params={"width": 8}), SPEC.shape, 10, seeds=range(trials))
    model = model.with_state(parameters={f"{model.head}.weight": torch.zeros(trials, 10, 8)})
    labels = streams(trials).randint(10, clients, batch)
    inputs = streams(trials).rand(clients, batch, *SPEC.shape)
    each = [
        Client(protocol, batch).update(model, inputs[:, k], labels[:, k], random=streams(trials))
        for k in range(clients)
    ]
    update = {name: sum(one[name] for one in each) / clients for name in each[0]}
    facts = Facts(
        granted=ThreatModel().granted(),
        protocol=protocol,
        input_spec=SPEC,
        normalised=False,
        num_classes=10,
        clients=clients,
        batch_size=batch,
        inputs_per_client=batch,
    )
    knowledge = {"facts": facts, "random": streams(trials, 7), "model": model}
    prepared = BiasCount().prepare(Knowledge(**knowledge))
    counts = BiasCount().run(Observation(Seen([update], prepared=prepared), **knowledge)).label_counts[:, 0]
    for t in range(trials):
        assert counts[t].tolist() == torch.bincount(labels[t].flatten(), minlength=10).tolist()


# --- top-k ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.7, 0.9, 0.95, 0.999])
def test_topk_keeps_exactly_the_greatest_and_leaves_them_unchanged(scope, p):
    update = updates(3)
    sent = TopK(p=p, scope=scope).update(update, context(3))
    groups = [[name] for name in update] if scope == "layer" else [list(update)]
    for group, t in itertools.product(groups, range(3)):
        clean = [x for name in group for x in update[name][t].flatten().tolist()]
        got = [x for name in group for x in sent[name][t].flatten().tolist()]
        tenth_percents = 1000 - round(p * 1000)
        kept = -(-tenth_percents * len(clean) // 1000)
        order = sorted(range(len(clean)), key=lambda i: -abs(clean[i]))
        expected = [0.0] * len(clean)
        for i in order[:kept]:
            expected[i] = clean[i]
        assert got == expected


def test_topk_breaks_ties_by_position():
    update = {"w": torch.tensor([[1.0, -2.0, 2.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0, 3.0]])}
    sent = TopK(p=0.4).update(update, context(2))["w"]
    assert sent.tolist() == [[1.0, -2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]]


def test_topk_keeps_more_of_the_direction_than_chance():
    heavy = torch.distributions.StudentT(torch.tensor(3.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        update = {"w": heavy.sample((4, 20_000))}
    sent = TopK(p=0.9).update(update, context(4))["w"]
    cosine = torch.cosine_similarity(sent, update["w"])
    assert ((cosine > 0.75) & (cosine < 0.9)).all()  # 0.83 expected, 0.32 = sqrt(0.1) for a random tenth


@pytest.mark.parametrize("wrong", [{"p": 1.0}, {"p": -0.1}, {"scope": "row"}])
def test_topk_refuses_what_is_no_fraction_or_scope(wrong):
    with pytest.raises(UserError, match="topk"):
        TopK(**wrong)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_gaussian_noise_has_the_declared_deviation(relative):
    update = {"w": 7 * torch.randn(2, 200, 100, generator=torch.Generator().manual_seed(1))}
    noise = GaussianNoise(std=0.3, relative=relative).update(update, context(2))["w"] - update["w"]
    expected = 0.3 * (update["w"].flatten(1).square().mean(1).sqrt() if relative else torch.ones(2))
    torch.testing.assert_close(noise.flatten(1).std(1), expected, rtol=0.03, atol=0)
    assert (noise.flatten(1).mean(1).abs() < 5 * expected / math.sqrt(20_000)).all()


def test_noise_of_two_strengths_has_one_direction():
    update = updates(3)
    weak, strong = (GaussianNoise(std=std).update(update, context(3)) for std in (0.1, 1.0))
    for name, clean in update.items():
        torch.testing.assert_close(10 * (weak[name] - clean), strong[name] - clean)


def test_noise_differs_between_tensors_and_trials():
    zeros = {"a": torch.zeros(2, 50), "b": torch.zeros(2, 50)}
    noise = torch.cat(list(GaussianNoise(std=1.0).update(zeros, context(2)).values()))
    correlation = torch.corrcoef(noise) - torch.eye(4)
    assert correlation.abs().max() < 0.6


def test_no_noise_is_the_identity_and_has_no_density():
    update = updates(2)
    same = GaussianNoise(std=0.0).update(update, context(2))
    assert all(torch.equal(same[name], value) for name, value in update.items())
    with pytest.raises(UserError):
        GaussianNoise(std=0.0).log_likelihood(update, update, context(2))
    with pytest.raises(UserError):
        GaussianNoise(std=-1.0)


@pytest.mark.parametrize("relative", [False, True])
def test_gaussian_likelihood_is_the_normal_density(relative):
    clean, sent = updates(3), updates(3, seed=1)
    density = GaussianNoise(std=0.5, relative=relative).log_likelihood(sent, clean, context(3))
    for t in range(3):
        expected = 0.0
        for name, value in clean.items():
            scale = 0.5 * (value[t].square().mean().sqrt() if relative else torch.tensor(1.0, dtype=torch.float64))
            expected += Normal(value[t], scale.expand_as(value[t])).log_prob(sent[name][t]).sum()
        torch.testing.assert_close(density[t], expected)


def test_null_update_keeps_the_size_of_every_tensor_and_nothing_else():
    update = {"w": torch.randn(3, 2000, generator=torch.Generator().manual_seed(2)), "b": torch.zeros(3, 4)}
    sent = NullUpdate().update(update, context(3))
    torch.testing.assert_close(sent["w"].square().mean(1), update["w"].square().mean(1))
    assert torch.cosine_similarity(sent["w"], update["w"]).abs().max() < 0.12
    assert sent["b"].eq(0).all()

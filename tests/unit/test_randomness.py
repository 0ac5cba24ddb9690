from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leakbench.randomness import TrialRandom


def seeds(*numbers):
    rows = [list(number.to_bytes(32, "big")) for number in numbers]
    return torch.tensor(rows, dtype=torch.uint8)


def draw(random, kind, shape):
    return random.randint(1000, *shape) if kind == "randint" else getattr(random, kind)(*shape)


KINDS = st.sampled_from(["randn", "rand", "randint"])
SHAPES = st.lists(st.integers(0, 20), max_size=3).map(tuple)
NUMBERS = st.lists(st.integers(0, 2**256 - 1), min_size=1, max_size=5)
PATHS = st.lists(st.one_of(st.integers(), st.text(max_size=3), st.booleans()), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.data(), KINDS, SHAPES, PATHS)
def test_a_slice_depends_on_its_own_trials_seed_alone(numbers, data, kind, shape, path):
    whole = draw(TrialRandom(seeds(*numbers)).at(*path), kind, shape)
    assert whole.shape == (len(numbers), *shape)
    order = data.draw(st.permutations(range(len(numbers))))
    others = data.draw(NUMBERS)
    shuffled = draw(TrialRandom(seeds(*others, *(numbers[t] for t in order))).at(*path), kind, shape)
    assert torch.equal(shuffled[len(others) :], whole[list(order)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**256 - 1), st.lists(PATHS, min_size=2, max_size=4, unique_by=repr))
def test_streams_of_different_names_differ(number, paths):
    drawn = [tuple(TrialRandom(seeds(number)).at(*path).rand(4).flatten().tolist()) for path in paths]
    assert len(set(drawn)) == len(paths)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**256 - 1), min_size=2, max_size=4, unique=True))
def test_streams_of_different_seeds_differ(numbers):
    rows = TrialRandom(seeds(*numbers)).at("x").rand(4)
    assert len({tuple(row) for row in rows.tolist()}) == len(numbers)


def test_a_path_is_not_the_concatenation_of_its_names():
    random = TrialRandom(seeds(1))
    paths = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (1, 2), (12,), ("1", 2), ()]
    drawn = {tuple(random.at(*path).rand(4).flatten().tolist()) for path in paths}
    assert len(drawn) == len(paths)


def test_a_stream_goes_on_and_a_new_one_starts_over():
    random = TrialRandom(seeds(1, 2))
    first, second = random.randn(3), random.randn(3)
    assert not torch.equal(first, second)
    assert torch.equal(TrialRandom(seeds(1, 2)).randn(3), first)
    assert torch.equal(random.at("x").randn(3), random.at("x").randn(3))


def test_draws_do_not_touch_the_global_generator():
    state = torch.random.get_rng_state()
    TrialRandom(seeds(1)).at("x").randn(100)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_draws_do_not_depend_on_the_device_or_the_threads():
    cpu = TrialRandom(seeds(1, 2)).randn(50)
    assert TrialRandom(seeds(1, 2), device="meta").at("x").randn(5).device.type == "meta"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(TrialRandom(seeds(1, 2)).randn(50), cpu)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_draws_on_a_gpu_are_those_of_the_cpu():
    gpu = TrialRandom(seeds(1, 2), device="cuda").at("x")
    assert gpu.device.type == "cuda"
    assert torch.equal(gpu.randn(50).cpu(), TrialRandom(seeds(1, 2)).at("x").randn(50))


def test_draws_have_the_distributions_they_are_named_for():
    random = TrialRandom(seeds(5))
    assert stats.kstest(random.randn(4000).flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(random.rand(4000).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.chisquare(torch.bincount(random.randint(7, 4000).flatten(), minlength=7)).pvalue > 1e-3
    assert random.randn(2).dtype == random.rand(2).dtype == torch.float32
    assert random.randint(3, 2).dtype == torch.int64

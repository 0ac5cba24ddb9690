"""The law of each sampler, the independence of trials, and label counts against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakbench.data import Dataset, DatasetSpec, draw_label_counts, draw_victims, load_dataset
from leakbench.errors import UserError
from leakbench.keys import PUBLIC_KEY
from leakbench.tasks import BatchSpec, InputSpec

KEY = b"a key of the tests"


def made_up(counts):
    """A dataset whose private split has ``counts[c]`` examples of class c, in mixed order, and a test split beside."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int64)
    n = len(labels)
    images = np.arange(n + 3).astype("<u2").view(np.uint8).reshape(n + 3, 1, 1, 2)
    spec = DatasetSpec(name="made_up", classes=len(counts), input=InputSpec(shape=(1, 1, 2)))
    splits = {"private": np.arange(n), "test": np.arange(n, n + 3)}
    return Dataset(spec, images, np.concatenate([labels, np.zeros(3, np.int64)]), splits)


def spec(sampler, size, alpha):
    return BatchSpec(size=size, sampler=sampler, alpha=alpha, classes=min(size, 3) if sampler == "balanced" else None)


def draw(dataset, sampler="iid", size=4, clients=1, local_batches=1, trials=range(3), key=KEY, alpha=None):
    batch = spec(sampler, size, alpha)
    return draw_victims(dataset, batch, clients=clients, local_batches=local_batches, trials=trials, key=key)


def counts_of(labels, classes):
    return np.stack([np.bincount(row, minlength=classes) for row in labels.reshape(len(labels), -1)])


def chance(sampler="iid", size=8, prior=(0.1,) * 10, draws=10_000, alpha=None, **kwargs):
    batch = spec(sampler, size, alpha)
    return draw_label_counts(batch, np.asarray(prior), draws=draws, key=PUBLIC_KEY, **kwargs)


specs = st.sampled_from(
    [*((name, None) for name in ("iid", "unique", "unbalanced", "single_class", "balanced")), ("dirichlet", 0.05)]
)


@settings(max_examples=60, deadline=None)
@given(
    # Four examples a class: even `unique` batches of two clients never run out.
    counts=st.lists(st.integers(4, 12), min_size=4, max_size=8),
    sampler=specs,
    size=st.integers(1, 4),
    clients=st.integers(1, 2),
    local_batches=st.integers(1, 2),
)
def test_every_sampler_draws_distinct_examples_of_the_split(counts, sampler, size, clients, local_batches):
    data = made_up(counts)
    shape = (3, clients, local_batches * size)
    if clients * shape[2] > sum(counts):
        return
    victims = draw(data, sampler[0], size, clients, local_batches, alpha=sampler[1])
    assert victims.indices.shape == victims.labels.shape == shape
    assert victims.inputs.shape == (*shape, 1, 1, 2)
    assert np.isin(victims.indices, data.splits["private"]).all()
    assert all(len(set(trial.ravel())) == trial.size for trial in victims.indices)
    assert np.array_equal(victims.labels, data.labels[victims.indices])
    assert np.array_equal(victims.inputs.view("<u2").reshape(shape), victims.indices)


@settings(max_examples=25, deadline=None)
@given(trials=st.lists(st.integers(0, 10_000), min_size=1, max_size=6), sampler=specs)
def test_a_trial_does_not_depend_on_which_others_are_drawn(trials, sampler):
    data = made_up([9, 8, 7, 6, 5])
    together = draw(data, sampler[0], clients=2, trials=trials, alpha=sampler[1])
    for t, trial in enumerate(trials):
        alone = draw(data, sampler[0], clients=2, trials=np.array([trial]), alpha=sampler[1])
        assert np.array_equal(together.indices[t], alone.indices[0])


def test_key_spec_and_cut_each_change_the_draw():
    data = load_dataset("digits")
    base = draw(data, size=8).indices
    assert np.array_equal(base, draw(data, size=8).indices)
    assert not np.array_equal(base, draw(data, size=8, key=b"another key").indices)
    assert not np.array_equal(base[:, :, :4], draw(data, size=4).indices)
    assert not np.array_equal(base, draw(data, size=4, local_batches=2).indices)
    assert not np.array_equal(base[0], base[1])


def test_digits_victims_never_change():
    # A change here changes every victim of every row there is.
    assert draw(load_dataset("digits"), "unbalanced", trials=[0, 1]).indices.tolist() == [
        [[600, 1012, 883, 120]],
        [[541, 71, 280, 1048]],
    ]


def test_iid_includes_every_example_equally_often():
    counts = [30, 5, 2, 13]
    drawn = draw(made_up(counts), size=10, trials=range(1500)).indices
    seen = np.bincount(drawn.ravel(), minlength=50)
    # Inclusion probability 10/50; six standard deviations over 50 examples.
    assert np.abs(seen - 300).max() < 6 * np.sqrt(1500 * 0.2 * 0.8)


def test_unique_has_different_classes_in_every_batch():
    labels = draw(made_up([4] * 10), "unique", size=7, clients=2, local_batches=2, trials=range(20)).labels
    assert all(len(set(row)) == 7 for row in labels.reshape(-1, 7))


def test_unique_steers_around_classes_that_ran_out():
    labels = draw(made_up([1] * 6 + [4] * 3), "unique", size=3, local_batches=4, trials=range(40)).labels
    assert all(len(set(row)) == 3 for row in labels.reshape(-1, 3))


def test_unbalanced_is_half_one_class_and_a_quarter_another_across_a_client():
    labels = draw(made_up([400] * 10), "unbalanced", size=9, clients=3, local_batches=5, trials=range(20)).labels
    pairs = set()
    for client in labels.reshape(60, 5, 9):
        first, second = client[0, 0], client[0, 4]
        assert first != second
        assert (client[:, :4] == first).all()
        assert (client[:, 4:6] == second).all()
        pairs.add((first, second))
    rest = labels.reshape(60, 5, 9)[:, :, 6:]
    assert len(pairs) > 30
    assert np.abs(np.bincount(rest.ravel(), minlength=10) / rest.size - 0.1).max() < 0.06


def test_single_class_is_one_class_for_all_batches_of_a_client():
    labels = draw(made_up([40] * 10), "single_class", clients=3, local_batches=3, trials=range(40)).labels
    assert all(len(set(client)) == 1 for client in labels.reshape(120, -1))
    assert set(labels.ravel()) == set(range(10))


def test_a_class_that_runs_out_gives_way_to_what_is_left():
    labels = draw(made_up([3, 3, 3]), "single_class", size=5, trials=range(30)).labels
    assert all(sorted(counts_of(labels, 3)[t])[-1] == 3 for t in range(30))
    everything = draw(made_up([3, 3, 3]), size=9, trials=range(5)).indices
    assert (np.sort(everything.ravel().reshape(5, 9)) == np.arange(9)).all()


@pytest.mark.parametrize(("alpha", "size"), [(0.5, 8), (3.0, 8), (1e-4, 6)])
def test_dirichlet_has_the_moments_of_a_dirichlet_multinomial(alpha, size):
    counts = chance("dirichlet", size, draws=40_000, alpha=alpha)
    total = 10 * alpha
    variance = size * 0.1 * 0.9 * (size + total) / (1 + total)
    assert counts.mean() == pytest.approx(size / 10)
    assert counts.var(axis=0).mean() == pytest.approx(variance, rel=0.03)
    assert np.abs(counts.mean(axis=0) - size / 10).max() < 6 * np.sqrt(variance / 40_000)


@pytest.mark.parametrize(
    ("sampler", "alpha"),
    [*((name, None) for name in ("iid", "unique", "unbalanced", "single_class", "balanced")), ("dirichlet", 0.3)],
)
def test_counts_follow_the_law_of_the_victims(sampler, alpha):
    data = made_up([500, 300, 100, 80, 20])
    drawn = counts_of(draw(data, sampler, local_batches=2, trials=range(1500), alpha=alpha).labels, 5)
    fast = chance(sampler, 4, data.class_prior(), local_batches=2, alpha=alpha)
    # First and second moments; the finite pool moves them by less than the tolerance.
    scale = np.sqrt(fast.var(axis=0) / 1500) + 0.01
    assert (np.abs(drawn.mean(axis=0) - fast.mean(axis=0)) < 5 * scale).all()
    assert np.allclose((drawn**2).mean(), (fast**2).mean(), rtol=0.05)


def test_iid_counts_are_multinomial():
    prior = np.array([0.5, 0.3, 0.2, 0.0])
    counts = chance(size=128, prior=prior, draws=20_000)
    assert (counts.sum(axis=1) == 128).all()
    assert np.allclose(counts.mean(axis=0), 128 * prior, atol=6 * np.sqrt(128 / 4 / 20_000))
    expected = 128 * (np.diag(prior) - np.outer(prior, prior))
    assert np.allclose(np.cov(counts.T), expected, atol=1.5)


def test_chance_of_iid_128_is_the_designs():
    # DESIGN.md section 5: .894 for the best constant guess, .851 for a prior-drawn one, iid, C=10, B=128.
    counts = chance(size=128)
    constant = np.minimum(counts, [13] * 8 + [12] * 2).sum(axis=1).mean() / 128
    drawn = np.minimum(counts[:5_000], counts[5_000:]).sum(axis=1).mean() / 128
    assert constant == pytest.approx(0.894, abs=0.002)
    assert drawn == pytest.approx(0.851, abs=0.003)


@settings(max_examples=30, deadline=None)
@given(sampler=specs, size=st.integers(1, 5), clients=st.integers(1, 3), local_batches=st.integers(1, 3))
def test_counts_sum_to_all_examples_of_all_clients(sampler, size, clients, local_batches):
    counts = chance(
        sampler[0], size, (0.4, 0.3, 0.1, 0.1, 0.1), 50, sampler[1], clients=clients, local_batches=local_batches
    )
    assert counts.shape == (50, 5)
    assert (counts.sum(axis=1) == clients * local_batches * size).all()
    if sampler[0] == "unique":
        assert counts.max() <= clients * local_batches


def test_classes_without_examples_are_never_counted():
    for sampler, alpha in (("unique", None), ("unbalanced", None), ("single_class", None), ("dirichlet", 1.0)):
        assert (chance(sampler, 4, (0.2, 0.0, 0.3, 0.25, 0.25), 500, alpha)[:, 1] == 0).all()


def test_batch_larger_than_its_split_is_one_line():
    message = r"^batch larger than its split: expected at most 8 examples in 'private' of made_up, got .* = 9; lower"
    with pytest.raises(UserError, match=message):
        draw(made_up([4, 4]), size=3, local_batches=3)


def test_more_unique_labels_than_classes_is_one_line():
    with pytest.raises(UserError, match="expected at least 5 classes in 'private' of made_up, got 4"):
        draw(made_up([4, 4, 4, 4, 0]), "unique", size=5)
    with pytest.raises(UserError, match="expected at least 11 classes in the class prior, got 10"):
        chance("unique", 11)
    with pytest.raises(UserError, match="expected 3 classes with unused examples for batch 2 of 2"):
        draw(made_up([1, 1, 1, 3]), "unique", size=3, local_batches=2)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 24), data=st.data())
def test_balanced_spreads_a_batch_evenly_over_its_classes(size, data):
    classes = data.draw(st.integers(1, min(size, 10)))
    spec = BatchSpec(size=size, sampler="balanced", classes=classes)
    counts = draw_label_counts(spec, np.full(10, 0.1), clients=1, local_batches=2, draws=50, key=b"k" * 32)
    assert ((counts > 0).sum(1) == classes).all()
    even = sorted(2 * len(range(i, size, classes)) for i in range(classes))
    assert (np.sort(counts, axis=1)[:, -classes:] == even).all()
    assert (counts.sum(1) == 2 * size).all()

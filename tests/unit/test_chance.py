from __future__ import annotations

import itertools

import numpy as np
import pytest

from leakbench.metrics import METRICS
from leakbench.metrics.chance import CHANCE_DRAWS, greedy_counts, label_chance


def iid(classes, size, draws=CHANCE_DRAWS, seed=0):
    return np.random.default_rng(seed).multinomial(size, np.full(classes, 1 / classes), size=draws)


def overlap(counts, guess):
    return np.minimum(counts, guess).sum(axis=1).mean() / counts[0].sum()


def test_chance_of_large_iid_batches_is_that_of_the_best_constant():
    counts, prior = iid(10, 128), np.full(10, 0.1)
    drawn = overlap(counts, iid(10, 128, seed=1))
    assert drawn == pytest.approx(0.851, abs=0.001)
    assert label_chance(counts, prior, 128)["instance_recall"] == pytest.approx(0.894, abs=0.001)


def test_greedy_constant_is_the_best_of_all_constants():
    counts = np.random.default_rng(0).multinomial(5, [0.6, 0.25, 0.15], size=400)
    every = [np.array(c) for c in itertools.product(range(6), repeat=3) if sum(c) == 5]
    best = max(overlap(counts, guess) for guess in every)
    assert greedy_counts(counts, 5).sum() == 5
    assert overlap(counts, greedy_counts(counts, 5)) == pytest.approx(best)


def test_no_guess_without_the_update_beats_chance_in_any_common_metric():
    counts = iid(4, 3, draws=500)
    chance = label_chance(counts, np.full(4, 0.25), 3)
    errors = [np.abs(counts - g).sum(axis=1).mean() / 3 for g in itertools.product(range(4), repeat=4)]
    hits = [(counts == np.array(g)).mean() for g in itertools.product(range(4), repeat=4)]
    assert chance["l1_count_error"] <= min(errors) + 1e-12
    assert chance["count_accuracy"] >= max(hits) - 1e-12


def test_single_class_batches_from_a_skewed_prior_are_guessed_by_the_majority():
    prior = np.array([0.7, 0.2, 0.1])
    counts = 8 * np.eye(3, dtype=np.int64)[np.random.default_rng(0).choice(3, size=CHANCE_DRAWS, p=prior)]
    chance = label_chance(counts, prior, 8)
    assert chance["instance_recall"] == pytest.approx(0.7, abs=0.015)
    assert chance["count_exact_match"] == pytest.approx(0.7, abs=0.015)
    assert chance["presence_recall"] == 1


def test_chance_covers_every_label_metric_and_is_reproducible():
    counts, prior = iid(5, 4, draws=300), np.full(5, 0.2)
    chance = label_chance(counts, prior, 4)
    assert set(chance) == {name for name, spec in METRICS.items() if spec.target == "labels"}
    assert chance == label_chance(counts, prior, 4)

"""Subspace distance: calibrated under its null (T6), sees what was planted, and is scipy's angles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fitted_subjects import subject
from scipy.linalg import subspace_angles
from scipy.stats import kstest
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score

from leakbench.errors import NotApplicable
from leakbench.measures.features import coordinates, kernel, sketch
from leakbench.measures.fitted import distinct
from leakbench.measures.subspace import distance, effect_size, held_out_auc, subspace_distance


def test_random_groups_give_uniform_p_values_and_no_z():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((80, 40)) * np.exp(-np.arange(40) / 10) + 1
    for centre in (False, True):
        truths = (rng.permutation(np.arange(80) % 2) for _ in range(60))
        found = [
            distance(features, truth, k=10, permutations=79, names=(i,), centre=centre)
            for i, truth in enumerate(truths)
        ]
        assert kstest([own.p for own in found], "uniform").pvalue > 0.01
        z = np.array([own.z for own in found])
        assert abs(z.mean()) < 3 / np.sqrt(len(z))
        assert (np.abs(z) < 3).mean() > 0.97


def test_trials_that_share_an_image_are_left_out():
    own = subject(batch=2)
    public = own.auxiliary
    before = distinct(own, public.trials)
    public.images[3, 1] = public.images[0, 0]
    own.images[5, 0] = public.images[1, 1]
    after = distinct(own, public.trials)
    assert set(before) - set(after) <= {3, public.trials + 5}
    assert 0 in after
    assert 3 not in after
    assert public.trials + 5 not in after
    kept = torch.cat([public.images, own.images])[after].flatten(0, 1).flatten(1)
    assert len(torch.unique(kept, dim=0)) == len(kept)


def test_planted_direction_at_effect_size_one_is_far_beyond_the_null():
    rng = np.random.default_rng(1)
    truth = np.arange(400) % 2
    noise = rng.standard_normal((400, 400))
    direction = rng.standard_normal(400)
    planted = noise + np.outer(truth, direction / np.linalg.norm(direction) * np.sqrt(400))
    assert effect_size(planted, truth) == pytest.approx(1, abs=0.02)
    found = distance(planted, truth, k=10, permutations=200, names=())
    assert found.z > 5
    assert found.p == pytest.approx(1 / 201)


def test_a_shift_of_the_mean_is_invisible_once_centred_while_an_axis_of_one_group_is_not():
    rng = np.random.default_rng(2)
    truth = np.arange(400) % 2
    noise = rng.standard_normal((400, 400))
    axis = np.eye(400)[0] * np.sqrt(400)
    shifted = distance(noise + np.outer(truth, axis), truth, k=10, permutations=200, names=(), centre=True)
    spread = noise + np.outer(truth * rng.standard_normal(400), axis)
    turned = distance(spread, truth, k=10, permutations=200, names=(), centre=True)
    assert shifted.z < 3
    assert turned.z > 5


def test_distance_is_that_of_scipys_angles_and_saturates_for_random_subspaces():
    rng = np.random.default_rng(3)
    features, truth = rng.standard_normal((20, 10_000)), np.arange(20) % 2
    found = distance(features, truth, k=10, permutations=2, names=())
    angles = subspace_angles(features[truth == 1].T, features[truth == 0].T)
    assert found.share == pytest.approx(np.linalg.norm(angles) / (np.sqrt(10) * np.pi / 2), abs=1e-6)
    assert found.share > 0.97


def test_top_subspace_of_each_group_is_that_of_its_singular_vectors():
    rng = np.random.default_rng(4)
    features = rng.standard_normal((60, 30)) * np.exp(-np.arange(30) / 4)
    truth = rng.permutation(np.arange(60) % 2)
    found = distance(features, truth, k=3, permutations=2, names=())
    tops = [np.linalg.svd(features[truth == own].T, full_matrices=False)[0][:, :3] for own in (0, 1)]
    assert found.share == pytest.approx(np.linalg.norm(subspace_angles(*tops)) / (np.sqrt(3) * np.pi / 2), abs=1e-6)


def test_degenerate_features_give_no_evidence():
    truth = np.arange(40) % 2
    for features in (np.zeros((40, 7)), np.ones((40, 7))):
        for centre in (False, True):
            found = distance(features, truth, k=10, permutations=20, names=(), centre=centre)
            assert abs(found.z) < 1e-6
            assert found.p == 1
        assert effect_size(features, truth) == 0
        assert held_out_auc(features, truth, 20, "x") == (0.5, 0.5, 0.5)


def test_probe_is_a_held_out_ridge_regression():
    rng = np.random.default_rng(5)
    truth = rng.integers(2, size=300)
    features = rng.standard_normal((300, 12)) + 0.4 * truth[:, None]
    auc, low, high = held_out_auc(features, truth, 200, "x")
    scaled = (features - features[:200].mean(0)) / features[:200].std(0) / np.sqrt(12)
    plain = RidgeCV(alphas=np.logspace(-4, 4, 9)).fit(scaled[:200], truth[:200])
    assert auc == pytest.approx(roc_auc_score(truth[200:], plain.predict(scaled[200:])))
    assert low < auc < high


def test_sketch_keeps_inner_products_and_small_layers_whole():
    rng = torch.Generator().manual_seed(6)
    a, b = torch.randn(2, 30, 7, 1000, generator=rng, dtype=torch.float64)
    a, b = a.abs(), b.abs()
    small = sketch(2048)([torch.stack([a.flatten(1), b.flatten(1)]).flatten(0, 1)]).view(2, 30, -1)
    assert small.shape[2] == 2048
    exact = (a * b).flatten(1).sum(1)
    norms = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
    errors = ((small[0] * small[1]).sum(1) - exact) / norms
    assert errors.abs().max() < 4 * np.sqrt(2 / 2048)
    assert errors.abs().max() > 0
    torch.testing.assert_close(sketch(7000)([a]), a.flatten(1))
    for size in (17, 32, 50):
        units = sketch(16)([torch.eye(size)])
        assert bool(((units.abs() == 1).sum(1) == 1).all())
        assert units.abs().sum() == size
        assert bool((units.abs().sum(0) >= size // 16).all())


def test_coordinates_keep_inner_products_of_all_rows():
    rng = np.random.default_rng(7)
    products = kernel(rng.standard_normal((50, 9)), 30)
    points = coordinates(products, 30)
    assert points.shape == (50, 9)
    np.testing.assert_allclose(points @ points.T, products, atol=1e-9)


def test_attribute_of_digits_turns_the_updates_of_lenet():
    own = subject(trials=60, train=120, batch=8)
    found = subspace_distance(own, k=5, permutations=60, train=120)
    layers = (*own.layers, "all")
    assert all(profile.layers == layers and profile.values.shape == (len(layers),) for profile in found.values())
    assert bool((found["subspace_effect"].values > 0.3).all())
    assert float(found["subspace_probe_auc"].values[-1]) > 0.9
    assert float(found["subspace_p"].values.min()) < 0.05
    own.truth = own.truth[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    own.auxiliary.truth = own.auxiliary.truth[torch.randperm(120, generator=torch.Generator().manual_seed(1))]
    null = subspace_distance(own, k=5, permutations=60, train=120)
    assert bool((null["subspace_z"].values < 3).all())
    low, high = null["subspace_probe_auc"].low, null["subspace_probe_auc"].high
    assert bool(((low < 0.6) & (high > 0.4)).all())


def test_too_few_trials_or_no_attribute_are_declined():
    with pytest.raises(NotApplicable, match="attribute"):
        subspace_distance(subject(truth=False, trials=20, train=40), train=40)
    with pytest.raises(NotApplicable, match="at least 10"):
        subspace_distance(subject(trials=8, train=40), train=40)
    alone = subject(trials=40, train=40)
    alone.truth[:] = 1
    with pytest.raises(NotApplicable, match="held-out"):
        subspace_distance(alone, train=40)

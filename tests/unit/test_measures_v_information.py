"""V-information: nothing from noise (T7), closed forms of linear-Gaussian tasks, held-out truth that no rule sees."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fitted_subjects import subject
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.linear_model import Ridge, RidgeCV

from leakbench.errors import NotApplicable, UserError
from leakbench.measures import v_information_original as original
from leakbench.measures.families import FAMILIES, View, calibrated
from leakbench.measures.features import coordinates, directed, kernel, matrix, moduli, observe
from leakbench.measures.fitted import mean_with_interval
from leakbench.measures.v_information import Rung, chosen, climb, v_information
from leakbench.tasks import Protocol

RUNGS = list(FAMILIES)


def view(features, truth, fit, known):
    """A layer whose update is ``features`` (n, d): one output unit each for the conv net."""
    own = features.astype(np.float32)
    return View.of([own], [np.abs(own)], [own[:, :, None]], truth[:known], fit)


def estimate(features, truth, fit, known, rungs):
    ladder = climb(view(features, truth, fit, known), truth[known:], rungs)
    return {name: mean_with_interval(rung.bits, name) for name, rung in ladder.items()}


def mixture_bits(distance):
    """Shannon information, in bits, of a fair bit with N(+-mu, S), the means ``distance`` deviations apart."""
    middle, deviation = distance**2 / 2, distance

    def loss(odds):
        return norm.pdf(odds, middle, deviation) * np.logaddexp(0, -odds) / np.log(2)

    return 1 - quad(loss, middle - 9 * deviation, middle + 9 * deviation)[0]


def test_independent_truth_gives_no_bits():
    rng = np.random.default_rng(0)
    features, truth = rng.standard_normal((4000, 20)), rng.integers(2, size=4000)
    found = estimate(features, truth, 1600, 2000, RUNGS)
    assert {name: own.mean for name, own in found.items() if abs(own.mean) >= 0.02} == {}


def test_linear_rule_gives_almost_all_bits_to_logistic_regression():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((4000, 10))
    truth = (features @ rng.standard_normal(10) > 0).astype(np.int64)
    assert estimate(features, truth, 1600, 2000, ["logistic"])["logistic"].mean > 0.95


@pytest.mark.parametrize("distance", [0.5, 1.5, 3.0])
def test_logistic_regression_gets_the_closed_form_of_a_gaussian_mixture(distance):
    rng = np.random.default_rng(2)
    spread = rng.standard_normal((5, 5))
    truth = rng.integers(2, size=3500)
    apart = distance * rng.standard_normal(5)
    apart *= distance / np.linalg.norm(apart)
    white = rng.standard_normal((3500, 5)) + (truth - 0.5)[:, None] * apart
    found = estimate(white @ spread, truth, 1600, 2000, ["logistic"])["logistic"]
    assert found.low <= mixture_bits(distance) <= found.high
    assert found.high - found.low < 0.1


@pytest.mark.slow
def test_intervals_cover_the_closed_form_as_often_as_they_say():
    covered = []
    for draw in range(25):
        rng = np.random.default_rng(draw)
        truth = rng.integers(2, size=800)
        features = rng.standard_normal((800, 2)) + truth[:, None] * np.sqrt(0.5) * 1.5
        found = estimate(features, truth, 400, 500, ["logistic"])["logistic"]
        covered.append(found.low <= mixture_bits(1.5) <= found.high)
    assert np.mean(covered) > 0.8


def test_more_features_and_a_larger_family_do_not_lose_bits_beyond_the_interval():
    rng = np.random.default_rng(3)
    truth = rng.integers(2, size=3000)
    features = rng.standard_normal((3000, 8)) + 0.6 * truth[:, None]
    nested = [estimate(features[:, :own], truth, 1600, 2000, ["logistic"])["logistic"] for own in (1, 2, 4, 8)]
    assert all(more.high > fewer.low for fewer, more in pairwise(nested))
    assert nested[-1].low > nested[0].high
    larger = estimate(features, truth, 1600, 2000, ["logistic", "mlp"])
    assert larger["mlp"].high > larger["logistic"].low


def test_what_is_not_linear_shows_in_the_higher_rungs_alone():
    rng = np.random.default_rng(4)
    features = rng.standard_normal((3000, 4))
    truth = (np.abs(features[:, 0]) > 0.674).astype(np.int64)
    found = estimate(features, truth, 1600, 2000, RUNGS)
    assert found["logistic"].mean < 0.02
    assert found["forest"].mean > 0.9
    assert min(found["mlp"].mean, found["conv"].mean) > 0.6


def test_rules_never_see_held_out_truth():
    rng = np.random.default_rng(5)
    truth = rng.integers(2, size=300)
    features = rng.standard_normal((300, 6)) + truth[:, None]
    own = view(features, truth, 160, 200)
    honest, flipped = (climb(own, held_out, RUNGS) for held_out in (truth[200:], 1 - truth[200:]))
    for name in RUNGS:
        assert flipped[name].validation == honest[name].validation
        assert honest[name].bits.mean() > 0.05
        assert flipped[name].bits.mean() < -0.05


def test_rung_is_chosen_on_the_calibration_rows_not_on_the_held_out_ones():
    ladder = {"a": Rung(np.array([0.9]), 0.1), "b": Rung(np.array([0.2]), 0.3)}
    assert chosen(ladder) == "b"


def test_calibration_ignores_scores_that_say_nothing_and_repairs_overconfident_ones():
    rng = np.random.default_rng(6)
    truth = rng.integers(2, size=4000)
    own = view(truth[:, None] + rng.standard_normal((4000, 1)), truth, 1000, 3000)
    odds = own.moduli[:, 0] * 0 + (truth - 0.5) + rng.standard_normal(4000)  # true log-odds of N(+-0.5, 1): itself
    fixed = calibrated(50 * odds + 7, own)
    np.testing.assert_allclose(fixed, odds, atol=0.5)
    assert np.corrcoef(fixed, odds)[0, 1] > 0.999
    against = calibrated(-odds, own)
    assert np.ptp(against) < 1e-6
    told_apart = calibrated(1e9 * (truth - 0.5), own)
    np.testing.assert_allclose(np.abs(told_apart), np.log(2001))


# --- reconstruction ---------------------------------------------------------------------------------------------------


def channel(gains, noise, rows=1500, seed=0):
    """Updates A x + noise of white images x, A with these singular values into 10 numbers, each a parameter to fit."""
    rng = np.random.default_rng(seed)
    dims = len(gains)
    left = np.linalg.qr(rng.standard_normal((10, dims)))[0]
    right = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
    images = rng.standard_normal((rows, dims))
    return images, images @ (left * gains @ right).T + noise * rng.standard_normal((rows, 10))


def invert(images, updates, fit=800, calibrate=200):
    targets = images - images[:fit].mean(0)
    return original.invert(kernel(updates, fit), targets @ targets.T, fit, calibrate, images.shape[1])


def test_inverters_get_the_closed_form_of_a_linear_gaussian_channel():
    gains, noise = np.full(8, 2.0), 1.0
    images, updates = channel(gains, noise)
    found = {name: mean_with_interval(bits, name) for name, (bits, _) in invert(images, updates).items()}
    shannon = 0.5 * np.log2(1 + (gains / noise) ** 2).mean()
    assert found["ridge"].low <= shannon <= found["ridge"].high
    assert found["ridge"].high - found["ridge"].low < 0.08
    assert found["mlp"].mean == pytest.approx(shannon, abs=0.15)


def test_unequal_gains_give_the_isotropic_closed_form_below_shannon():
    gains, noise = np.array([0.1, 0.3, 1.0, 3.0, 10.0]), 1.0
    images, updates = channel(gains, noise, seed=1)
    found = mean_with_interval(invert(images, updates)["ridge"][0], "ridge")
    usable = -0.5 * np.log2((1 / (1 + (gains / noise) ** 2)).mean())
    assert found.low <= usable <= found.high
    assert found.high < 0.5 * np.log2(1 + (gains / noise) ** 2).mean()


def test_updates_without_images_give_no_bits_and_exact_ones_many():
    images, updates = channel(np.ones(8), 1.0)
    noise = np.random.default_rng(7).standard_normal(updates.shape)
    assert all(abs(bits.mean()) < 0.01 for bits, _ in invert(images, noise).values())
    exact = invert(images, channel(np.ones(8), 0.0)[1])["ridge"][0]
    assert exact.mean() > 8
    assert np.isfinite(exact).all()


def test_ridge_is_scikit_learns():
    images, updates = channel(np.linspace(0.2, 3, 6), 1.0, rows=300)
    fit = 160
    products = kernel(updates, fit)
    targets = images - images[:fit].mean(0)
    guess = original.ridge(products, targets @ targets.T, fit, 200)
    points = coordinates(products, fit)
    penalties = np.logspace(-6, 3, 19) * np.linalg.eigvalsh(products[:fit, :fit]).max()
    chosen_penalty = RidgeCV(alphas=penalties).fit(points[:fit], targets[:fit]).alpha_
    expected = Ridge(chosen_penalty).fit(points[:fit], targets[:fit]).predict(points)
    np.testing.assert_allclose(guess.power, (expected**2).sum(1), atol=1e-6)
    np.testing.assert_allclose(guess.cross, (expected * targets).sum(1), atol=1e-6)


def test_bits_are_half_the_log_of_the_ratio_of_errors():
    rng = np.random.default_rng(8)
    targets = rng.standard_normal((600, 5))
    guesses = targets + 0.5 * rng.standard_normal((600, 5))
    guess = original.Guess((targets * guesses).sum(1), (guesses**2).sum(1))
    # Held-out rows that repeat the calibration rows have their errors, so the identity is exact.
    rows = np.r_[0:200, 200:400, 200:400]
    own = original.Guess(guess.cross[rows], guess.power[rows])
    bits, calibration = original.bits_per_dim(own, targets[rows] @ targets[rows].T, 200, 200, 5)
    share = guess.cross[200:400].sum() / guess.power[200:400].sum()
    ratio = (targets[200:400] ** 2).mean() / ((targets - share * guesses)[200:400] ** 2).mean()
    assert bits.mean() == pytest.approx(0.5 * np.log2(ratio))
    assert calibration == pytest.approx(0.5 * np.log2(ratio))


# --- on real updates --------------------------------------------------------------------------------------------------


def test_attribute_of_digits_leaks_from_lenet_and_shuffled_truth_does_not():
    own = subject(batch=8)
    found = v_information(own, train=200)
    layers = (*own.layers, "all")
    for profile in found.values():
        assert profile.layers == layers
        assert profile.n == own.trials
        assert bool(((profile.low <= profile.values) & (profile.values <= profile.high)).all())
        assert bool((profile.high <= 1).all())
    assert float(found["v_information"].low[-1]) > 0.3
    assert float(found["v_information_conv"].low[-2]) > 0.3  # the last layer, whose signs follow the labels
    again = v_information(own, train=200, families="forest,mlp")
    for name in ("v_information_forest", "v_information_mlp"):
        assert torch.equal(found[name].values, again[name].values)
    own.auxiliary.truth = own.auxiliary.truth[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    null = v_information(own, train=200, families="logistic,forest")
    assert float(null["v_information"].values.max()) < 0.15
    assert null["v_information_conv"].layers == ()
    assert null["v_information_conv"].n == own.trials


def test_more_images_behind_an_update_leak_less_of_each():
    found = {
        batch: original.v_information_original(subject(batch=batch, architecture="mlp", width=32, depth=1), train=200)
        for batch in (1, 16)
    }
    one, many = (own["v_information_original"] for own in found.values())
    assert float(one.low[0]) > float(many.high[0]) > 0
    assert one.layers[-1] == "all"


def test_order_of_a_batch_does_not_matter_to_the_target():
    own = subject(batch=6)
    own.images[:, 1], own.labels[:, 1] = own.images[:, 0].flip(-1), own.labels[:, 0]  # as bright as its mirror image
    before = original.sorted_images(own)
    order = torch.arange(5, -1, -1)
    own.images, own.labels = own.images[:, order], own.labels[:, order]
    np.testing.assert_array_equal(original.sorted_images(own), before)
    first = own.images.flatten(2).sum(2).masked_fill(own.labels != own.labels.amin(1, keepdim=True), np.inf).amin(1)
    np.testing.assert_allclose(before.reshape(own.trials, 6, -1)[:, 0].sum(1), first.numpy(), rtol=1e-5)


def test_observations_do_not_depend_on_how_trials_are_cut():
    own = subject(protocol=Protocol(sends="delta", local_steps=2, lr=0.1), trials=11)
    maps = {"signed": directed(50), "moduli": moduli, "matrix": matrix(8)}
    whole, cut = (observe(own, maps, whole={"signed"}, chunk=chunk) for chunk in (None, 3))
    assert set(whole["signed"]) == {*own.layers, "all"}
    for name, layers in whole.items():
        for layer, rows in layers.items():
            assert len(rows) == 11
            np.testing.assert_allclose(rows, cut[name][layer], atol=1e-4)


def test_spoiled_updates_give_finite_bits():
    class Spoiled(type(subject())):
        def update(self, *args, **kwargs):
            good = super().update(*args, **kwargs)
            spoil = torch.tensor([np.nan, np.inf, 0.0, 1e30])[torch.arange(self.trials) % 4]
            return {name: value * spoil.view(-1, *[1] * (value.dim() - 1)) for name, value in good.items()}

    own = subject(trials=20, train=40)
    own.__class__ = own.auxiliary.__class__ = Spoiled
    for measure in (v_information, original.v_information_original):
        for profile in measure(own, train=40).values():
            assert bool(torch.isfinite(torch.stack([profile.values, profile.low, profile.high])).all())


def test_what_cannot_be_fitted_is_declined():
    with pytest.raises(NotApplicable, match="attribute"):
        v_information(subject(truth=False), train=200)
    with pytest.raises(NotApplicable, match="at least 10"):
        original.v_information_original(subject(trials=9), train=200)
    with pytest.raises(NotApplicable, match="auxiliary trials with"):
        v_information(subject(train=14), train=14)
    with pytest.raises(UserError, match="logistic,forest,mlp,conv"):
        v_information(subject(), train=200, families="logistic,svm")

"""What measures say from the Jacobian, against closed forms, explicit matrices and Hessians."""

from __future__ import annotations

import math

import pytest
import torch
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dropout import Dropout
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.topk import TopK
from measure_subjects import Explicit, exact, net, subject
from torch.autograd.functional import hessian

from leakbench import Defense
from leakbench.errors import NotApplicable
from leakbench.measures import spectrum as spectra
from leakbench.measures.catalogue import MEASURES
from leakbench.measures.inversion_influence import i2f, influence
from leakbench.measures.jacobian import Jacobian
from leakbench.measures.latent import contrast, latent_sensitivity
from leakbench.measures.sensitivity import frobenius, graddefense_sensitivity, sensitivity
from leakbench.measures.spectrum import spectrum, top
from leakbench.measures.subject import ALL
from leakbench.tasks import Protocol

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = Protocol(sends="delta", local_steps=2, lr=0.3)
MEASURED = (sensitivity, graddefense_sensitivity, spectrum, i2f, latent_sensitivity)


def regression(trials=3, d=6):
    """Return the subject of T1, loss (w.x - y)^2 / 2 on one example, and its Jacobian (T, d, d) by hand."""
    stream = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, d, generator=stream, dtype=torch.float64) for n in (trials, 1))
    r = x @ w[0] - 0.7
    whose = Explicit(lambda images: {"linear": (images @ w[0] - 0.7)[:, None] * images}, x)
    return whose, r[:, None, None] * torch.eye(d, dtype=torch.float64) + x[:, :, None] * w, (x, w, r)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_linear_regression_has_the_frobenius_norm_of_its_closed_form():
    whose, matrix, (x, w, r) = regression()
    squares = 6 * r**2 + 2 * r * (x @ w[0]) + x.square().sum(1) * w.square().sum()
    torch.testing.assert_close(matrix.square().sum((1, 2)), squares)
    found = sensitivity(whose, probes=6)
    assert found["sensitivity_rms"].layers == ("linear", ALL)
    torch.testing.assert_close(found["sensitivity_rms"].values[:, 0], (squares / 36).sqrt())
    length = x.norm(dim=1)
    torch.testing.assert_close(found["gradient_norm"].values[:, 1], r.abs() * length)
    torch.testing.assert_close(found["sensitivity_relative"].values[:, 1], squares.sqrt() / r.abs())


@pytest.mark.parametrize("way", [{"exact": 100}, {"exact": 0, "iterations": 6, "probes": 600}])
def test_linear_regression_has_the_spectrum_of_its_closed_form(way):
    whose, matrix, (x, _, r) = regression()
    found = {name: p.values[:, 0] for name, p in spectrum(whose, noise=0.5, **way).items()}
    s = torch.linalg.svdvals(matrix)
    sure = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(found["spectral_norm"], s[:, 0], **sure)
    torch.testing.assert_close(found["lavp_l2"], 2 * s[:, 0] ** 2, **sure)
    g = (r[:, None] * x)[:, :, None]
    square = g.square().sum((1, 2), keepdim=True)
    seen = matrix.mT @ (torch.eye(6, dtype=torch.float64) - g @ g.mT / square) @ matrix / square
    torch.testing.assert_close(found["lavp_cosine"], torch.linalg.eigvalsh(seen)[:, -1], **sure)
    near = sure if way["exact"] else {"rtol": 0.1, "atol": 0.0}
    share = s**2 / (s**2).sum(1, keepdim=True)
    torch.testing.assert_close(found["effective_rank"], (-(share * share.log()).sum(1)).exp(), **near)
    torch.testing.assert_close(found["numerical_rank"], torch.ones(3, dtype=torch.float64), **near)
    sigma = 0.5 * (square[:, :, 0] / 6).sqrt()
    known = (0.25 * s / sigma) ** 2
    torch.testing.assert_close(found["gaussian_information"], (1 + known).log2().sum(1) / 2, **near)
    torch.testing.assert_close(found["recoverable_fraction"], 1 - (1 / (1 + known)).mean(1), **near)


def test_influence_is_that_of_the_inverse_and_never_below_its_bound():
    whose, matrix, (x, w, r) = regression(trials=40)
    jacobian = Jacobian(whose)
    inverse = (torch.eye(6, dtype=torch.float64) - x[:, :, None] * w / (r + x @ w[0])[:, None, None]) / r[:, None, None]
    torch.testing.assert_close(inverse @ matrix, torch.eye(6, dtype=torch.float64).expand(40, 6, 6))
    delta = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = influence(jacobian, {"linear": delta}, damping=0)
    torch.testing.assert_close(found["i2f"], (inverse @ delta[:, :, None]).flatten(1).norm(dim=1), rtol=1e-4, atol=0.0)
    assert (found["i2f_lower"] <= found["i2f"]).all()
    s = torch.linalg.svdvals(matrix)[:, 0]
    torch.testing.assert_close(top(jacobian), s)
    bound = (matrix.mT @ delta[:, :, None]).flatten(1).norm(dim=1) / s**2
    torch.testing.assert_close(found["i2f_lower"], bound)


def test_curvatures_of_gradient_matching_are_those_of_the_hessian():
    whose = subject("mlp", batch=1, trials=1)
    found = spectrum(whose)
    goal = {k: v.detach() for k, v in whose.by_layer(whose.update()).items()}
    goal[ALL] = torch.cat(list(goal.values()), 1)

    def curvature(objective, layer):
        def loss(images):
            sent = whose.by_layer(whose.update(images, create_graph=True))
            return objective(torch.cat(list(sent.values()), 1) if layer == ALL else sent[layer], goal[layer])

        return torch.linalg.eigvalsh(hessian(loss, whose.images).view(16, 16))[-1]

    for i, layer in enumerate(found["lavp_l2"].layers):
        l2 = curvature(lambda a, b: (a - b).square().sum(), layer)
        cosine = curvature(lambda a, b: 1 - torch.cosine_similarity(a, b).sum(), layer)
        torch.testing.assert_close(found["lavp_l2"].values[0, i], l2, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["lavp_cosine"].values[0, i], cosine, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("copies", [2, 5])
def test_each_of_equal_examples_has_the_sensitivity_of_one_divided_by_their_number(copies):
    one = subject("lenet", batch=1)
    same = subject("lenet", batch=copies, images=one.images.expand(-1, copies, -1, -1, -1))
    same.labels = one.labels.expand(-1, copies)
    single, many = (sensitivity(whose, probes=999)["sensitivity_rms"].values for whose in (one, same))
    torch.testing.assert_close(many, single / copies)  # ||J|| falls by sqrt(B), its root mean square entry by B
    v = torch.rand_like(one.images)
    first = torch.cat([v, torch.zeros_like(same.images[:, 1:])], 1)
    torch.testing.assert_close(Jacobian(same).energy(first), Jacobian(one).energy(v) / copies**2)


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet20"])
@pytest.mark.parametrize("way", [{}, {"exact": 0, "probes": 1, "iterations": 12}])
def test_single_precision_finds_the_same_spectral_norms(name, way):
    double = spectrum(subject(name, batch=1), **way)["spectral_norm"].values
    model = net(name).to(dtype=torch.float32)
    single = spectrum(subject(name, model=model, dtype=torch.float32, batch=1), **way)["spectral_norm"].values
    torch.testing.assert_close(single, double, rtol=1e-3, atol=0.0)


# --- estimates --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "mlp": {"batch": 3},
    "lenet": {"name": "lenet"},
    "resnet20": {"name": "resnet20"},
    "local steps": {"protocol": STEPS},
    "lenet, local steps": {"name": "lenet", "protocol": STEPS, "batch": 1},
    "cohort": {"protocol": Protocol(clients=3, secure_aggregation=True)},
    "clip_l2": {"parts": [ClipL2()]},
    "dropout": {"parts": [Dropout()]},
    "gaussian_noise": {"parts": [GaussianNoise(relative=True, std=0.1)]},
    "topk": {"parts": [TopK(p=0.6)]},
    "topk, local steps": {"parts": [TopK(p=0.6)], "protocol": STEPS},
}
PROBES, REPEATS = 8, 60


@pytest.mark.parametrize("setting", SETTINGS)
def test_probes_estimate_the_norm_of_the_exact_jacobian_within_their_stated_error(setting):
    whose = subject(trials=1, **SETTINGS[setting])
    norms = torch.stack([matrix[0].square().sum() for matrix in exact(whose).values()])
    jacobian = Jacobian(whose)
    energy = torch.cat([frobenius(jacobian, PROBES, f"set {i} of probes") for i in range(REPEATS)])
    energy = torch.cat([energy, energy.sum(1, keepdim=True)], 1)
    moving = norms > 1e-12 * norms[-1]
    error = math.sqrt(2 / PROBES)
    off = (energy.mean(0) / norms - 1)[moving]
    assert (off.abs() < 4 * error / math.sqrt(REPEATS)).all(), off
    assert ((energy.std(0) / norms)[moving] < 1.3 * error).all()
    sizes = torch.tensor([*jacobian.sizes.values()])
    entries = torch.cat([sizes, sizes.sum()[None]]) * jacobian.size
    for probes in (PROBES, jacobian.size):
        found = sensitivity(whose, probes=probes)
        squares = found["sensitivity_rms"].values[0].square() * entries
        own = frobenius(jacobian, probes, "sensitivity")[0]
        torch.testing.assert_close(squares, torch.cat([own, own.sum()[None]]))
        torch.testing.assert_close(found["sensitivity_share"].values[0], own / own.sum())
    torch.testing.assert_close(squares, norms, rtol=1e-4, atol=float(1e-9 * norms[-1]))


@pytest.mark.parametrize("setting", ["mlp", "lenet"])
def test_quadrature_finds_greatest_values_and_estimates_the_rest(setting):
    whose = subject(trials=1, **SETTINGS[setting])
    sure, guess = spectrum(whose), spectrum(whose, exact=0, iterations=25, probes=40)
    for name in ("spectral_norm", "lavp_l2", "lavp_cosine"):
        torch.testing.assert_close(guess[name].values, sure[name].values, rtol=1e-6, atol=1e-9)
    for name in ("effective_rank", "gaussian_information", "recoverable_fraction"):
        torch.testing.assert_close(guess[name].values, sure[name].values, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("room", [1500, 3000])
def test_the_spectrum_does_not_depend_on_how_rows_are_cut_to_fit_the_memory(room, monkeypatch):
    whose = subject("lenet", batch=1)
    whole = spectrum(whose)
    explicit = exact(whose)
    for i, layer in enumerate(whole["spectral_norm"].layers):
        wanted = torch.linalg.svdvals(explicit[layer])
        torch.testing.assert_close(whole["spectral_norm"].values[:, i], wanted[:, 0], rtol=1e-6, atol=1e-9)
        ranks = (wanted > 1e-3 * wanted[:, :1]).double().sum(1) / 36
        torch.testing.assert_close(whole["numerical_rank"].values[:, i], ranks)
    monkeypatch.setattr(spectra, "_COLUMNS", room)
    monkeypatch.setattr(spectra, "_GRAM", 36**2)
    for name, profile in spectrum(whose).items():
        torch.testing.assert_close(profile.values, whole[name].values)


# --- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [Protocol(), STEPS])
@pytest.mark.parametrize("defense", [GaussianNoise(std=0.01), TopK(p=0.5), ClipL2()])
def test_influence_solves_the_normal_equations_of_the_undefended_client(defense, protocol):
    whose, bare = (subject("mlp", protocol, parts) for parts in ([defense], []))
    found = i2f(whose, damping=1e-2, iterations=200)
    assert found["i2f"].layers == (ALL,)
    jacobian = exact(bare)[ALL]
    before, after = (torch.cat([*own.by_layer(own.update()).values()], 1) for own in (bare, whose))
    pulled = (jacobian.mT @ (after - before)[:, :, None])[:, :, 0]
    gram = jacobian.mT @ jacobian
    greatest = torch.linalg.eigvalsh(gram)[:, -1]
    damped = gram + 1e-2 * greatest[:, None, None] * torch.eye(gram.shape[1], dtype=torch.float64)
    moved = torch.linalg.solve(damped, pulled)
    torch.testing.assert_close(found["i2f"].values[:, 0], moved.norm(dim=1), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["i2f_lower"].values[:, 0], pulled.norm(dim=1) / greatest, rtol=1e-4, atol=1e-9)


def test_influence_asks_for_a_defense_that_perturbs():
    with pytest.raises(NotApplicable, match="undefended"):
        i2f(subject())


def test_products_with_ones_are_those_of_the_graddefense_code_and_no_norm():
    whose = subject("mlp")
    found = graddefense_sensitivity(whose)["graddefense_sensitivity"]
    for i, (layer, matrix) in enumerate(exact(whose).items()):
        assert found.layers[i] == layer
        each = matrix.sum(1).view(2, 2, 16).norm(dim=2)
        torch.testing.assert_close(found.values[:, i], each.mean(1), rtol=1e-5, atol=1e-8)


def planted(spread):
    """Return a subject with a layer that sees the attribute's pixels only, one that sees all, and one that sees none.

    Args:
        spread: Standard deviation of auxiliary images around their group's mean.
    """
    stream = torch.Generator().manual_seed(2)
    pattern = torch.zeros(200, dtype=torch.float64)
    pattern[:2] = 1
    truth = torch.arange(60) % 2
    noise = spread * torch.randn(60, 1, 200, generator=stream, dtype=torch.float64)
    auxiliary = subject(trials=60, batch=1)
    auxiliary.images = (0.5 * truth[:, None, None] * pattern + noise)[:, :, None, None]
    auxiliary.truth = truth
    ones = torch.ones(1, 3, dtype=torch.float64)

    def sent(images):
        return {"reads": (images @ pattern)[:, None] * ones, "copies": 3 * images, "ignores": images[:, 100:] ** 2}

    return Explicit(sent, torch.rand(4, 200, generator=stream, dtype=torch.float64), auxiliary)


def test_a_layer_that_reads_the_attribute_reacts_more_to_it_than_to_noise():
    found = latent_sensitivity(planted(0.0), probes=400)["latent_sensitivity"]
    assert found.layers == ("reads", "copies", "ignores", ALL)
    reads, copies, ignores, whole = found.values.mean(0).tolist()
    assert reads == pytest.approx(math.sqrt(math.pi * 200 / 2), rel=0.05)  # one over the mean of |v . p| / |p|
    assert copies == pytest.approx(1)
    assert ignores == 0
    assert 1 < whole < reads


def test_specificity_compares_with_differences_of_random_groups():
    reads, copies, ignores, _ = latent_sensitivity(planted(0.05), probes=100)["latent_specificity"].values.mean(0)
    assert reads > 2
    assert copies == pytest.approx(1)
    assert 0 < ignores < 1


def test_the_contrast_is_the_difference_of_group_means():
    means = torch.rand(7, 2, 3, dtype=torch.float64)
    truth = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]])
    wanted = torch.stack([means[row == 1].mean(0) - means[row == 0].mean(0) for row in truth])
    torch.testing.assert_close(contrast(means, truth), wanted)


def test_latent_sensitivity_needs_both_groups():
    one_group = planted(0.1)
    one_group.auxiliary.truth = torch.ones(60, dtype=torch.int64)
    for whose in (subject(), one_group):
        with pytest.raises(NotApplicable, match="auxiliary"):
            latent_sensitivity(whose)


# --- laws of all ------------------------------------------------------------------------------------------------------


class Nothing(Defense):
    """Sends zeros."""

    def update(self, update, ctx):
        return {name: torch.zeros_like(value) for name, value in update.items()}


def with_attribute(parts, **options):
    whose, auxiliary = subject(parts=parts, **options), subject(trials=6)
    auxiliary.truth, whose.auxiliary = torch.arange(6) % 2, auxiliary
    return whose


@pytest.mark.parametrize("measure", MEASURED)
@pytest.mark.parametrize("way", [{}, {"exact": 0}])
def test_a_client_that_sends_nothing_leaks_nothing(measure, way):
    options = way if measure is spectrum else {}
    for name, profile in measure(with_attribute([Nothing()]), **options).items():
        assert profile.values.isfinite().all()
        assert bool(profile.values.any()) == (measure is i2f), name  # far from what an undefended client sends


@pytest.mark.parametrize("measure", MEASURED)
def test_a_measure_gives_what_the_catalogue_declares_and_no_trial_depends_on_the_others(measure, monkeypatch):
    parts = [GaussianNoise()]
    spec = MEASURES.get(measure.__name__)
    whole = measure(with_attribute(parts, trials=3), **spec.params)
    assert set(whole) == {quantity.name for quantity in spec.quantities}
    assert all(profile.values.shape == (3, len(profile.layers)) for profile in whole.values())
    monkeypatch.setattr("leakbench.measures.jacobian.trials_at_once", lambda _: 1)
    for name, profile in measure(with_attribute(parts, trials=3), **spec.params).items():
        torch.testing.assert_close(profile.values, whole[name].values)

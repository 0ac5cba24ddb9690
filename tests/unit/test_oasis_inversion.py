"""Which of the turns of an image was private, and the search through OASIS."""

from __future__ import annotations

import pytest
import torch
from inversion_blocks import digits, observe, psnr
from leakbench_baselines.attacks.bayes_adaptive import BayesAdaptive
from leakbench_baselines.attacks.oasis_inversion import (
    MODEL,
    OasisInversion,
    Usual,
    described,
    log_density,
    shrunk,
)
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.oasis import Oasis
from torch.distributions import MultivariateNormal

from leakbench import Recovery, UserError


def points(count=200, size=6, seed=0):
    return torch.rand(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    images, labels = digits()
    return described(images[1500:].flatten(1), labels[1500:], 10, 16, 0.1)


def prepared(seen, model):
    return seen.with_prepared({MODEL + name: value for name, value in model.items()})


def test_the_density_is_that_of_a_normal_distribution():
    data, other = points(), points(count=7, seed=1)
    found = described(data, torch.zeros(200, dtype=torch.int64), 1, 6, 0.3)
    noisy = data.T.cov(correction=0) + 0.09 * torch.eye(6, dtype=torch.float64)
    true = MultivariateNormal(data.mean(0), noisy)
    for group in (0, 1):  # of all, and of the only class
        ours = log_density(other[None], torch.full((1, 7), group), found)[0]
        theirs = true.log_prob(other) - true.log_prob(data.mean(0))
        torch.testing.assert_close(ours, theirs)


def test_fewer_components_spread_the_rest_of_the_variance_evenly():
    data = points()
    found = described(data, torch.zeros(200, dtype=torch.int64), 1, 2, 0.0)
    total = data.var(0, correction=0).sum()
    torch.testing.assert_close(found["variances"][0].sum() + 4 * found["rest"][0], total + 2 * found["rest"][0])


def test_a_class_with_few_images_is_described_by_all():
    labels = torch.tensor([0] * 100 + [1] * 7 + [2] * 93)
    found = described(points(), labels, 4, 3, 0.1)
    assert found["group"].tolist() == [1, 0, 2, 0, 0]
    torch.testing.assert_close(found["mean"][2], points()[107:].mean(0))


@pytest.mark.parametrize(("transforms", "turns", "least"), [("major_rotation", 4, 0.9), ("flip", 2, 0.8)])
def test_real_digits_are_turned_back(model, monkeypatch, transforms, turns, least):
    seen, inputs, _ = observe(trials=60, batch=2, defense=Oasis(transforms=transforms), known=True)
    turned = inputs.clone()
    for t in range(60):
        for n in range(2):
            k = (t + 2 * n) % turns
            turned[t, n] = inputs[t, n].rot90(k, (-2, -1)) if turns == 4 else inputs[t, n].flip([-1] * k)
    attack = OasisInversion()
    monkeypatch.setattr("leakbench.inversion.InversionAttack.run", lambda *_: Recovery(inputs=turned))
    found = attack.run(prepared(seen, model)).inputs
    right = (found == inputs).flatten(2).all(2).double().mean()
    before = (turned == inputs).flatten(2).all(2).double().mean()
    assert before < 0.6
    assert right > least


def test_every_choice_sends_the_same_update(model):
    seen, inputs, labels = observe(trials=2, batch=2, defense=Oasis(), known=True)
    mixed = torch.stack([inputs[:, 0].rot90(1, (-2, -1)), inputs[:, 1].rot90(3, (-2, -1))], 1)
    other = seen.simulate(mixed, labels)
    for name, value in seen.update.items():
        torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-12)


def test_inputs_are_found_where_the_attack_that_knows_the_defense_alone_ends_in_mixtures(model):
    seen, inputs, _ = observe(trials=2, defense=Oasis(), known=True, dtype=torch.float32)
    bayes = psnr(BayesAdaptive(steps=100).run(seen).inputs, inputs).mean()
    ours = psnr(OasisInversion(steps=100).run(prepared(seen, model)).inputs, inputs).mean()
    assert bayes < 15
    assert ours > 18


def test_the_first_restart_starts_at_the_mean_of_the_class(model):
    seen, _, labels = observe(trials=3, batch=2, defense=Oasis(), known=True)
    images, targets = digits()
    start = Usual(spread=0.0).start(prepared(seen, model), 2, 2)["inputs"].view(3, 2, 2, 1, 8, 8)
    for t in range(3):
        for n in range(2):
            mean = images[1500:][targets[1500:] == labels[t, n]].mean(0)
            torch.testing.assert_close(start[t, 0, n], mean.float())
    assert start[:, 1].std() > 0.8


def test_unknown_labels_start_at_the_mean_of_all_images(model):
    seen, _, _ = observe(trials=3, batch=2, defense=Oasis(), known=True, labels=False)
    start = Usual(spread=0.0).start(prepared(seen, model), 1, 2)["inputs"]
    torch.testing.assert_close(start, digits()[0][1500:].mean(0).float().expand(3, 2, 1, 8, 8))


@pytest.mark.parametrize("defense", [GaussianNoise(std=1e-3), Oasis(transforms="shearing")])
def test_without_choices_nothing_is_turned(model, defense):
    seen, _, _ = observe(trials=2, defense=defense, known=True)
    ours = prepared(seen, model)
    attack = OasisInversion(steps=5)
    assert torch.equal(attack.run(ours).inputs, attack.fitted(ours).run(ours).inputs)
    if not isinstance(defense, Oasis):
        assert torch.equal(attack.run(ours).inputs, BayesAdaptive(steps=5, tv=1e-6).run(seen).inputs)


def test_larger_images_are_compared_shrunk_and_start_at_their_size():
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 40, 40, generator=stream).double()
    seen, _, _ = observe(
        trials=2, defense=Oasis(), known=True, dataset=(images.repeat(126, 1, 1, 1), torch.zeros(1512).long())
    )
    assert shrunk(images).shape == (12, 3 * 32 * 32)
    small = described(shrunk(images), torch.zeros(12).long(), 10, 2, 0.1)
    start = Usual(spread=0.0).start(prepared(seen, small), 1, 1)["inputs"]
    assert start.shape == (2, 1, 3, 40, 40)
    assert (start.mean() - images.mean()).abs() < 0.01


@pytest.mark.parametrize("params", [{"components": 0}, {"noise": 0.0}])
def test_wrong_arguments_are_told(params):
    with pytest.raises(UserError, match="components"):
        OasisInversion(**params)

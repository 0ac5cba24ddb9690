"""The Cocktail Party Attack: its parts against closed forms, and known sources from a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from leakbench_baselines.attacks.cocktail_party import CocktailParty, inputs_from, whitening
from test_spear import DEGENERATE, block, decibels, expect_valid_inputs

from leakbench import Knowledge, NotApplicable, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def mixture(count=3, rows=20, pixels=64):
    """Return inputs (2, n, P) and gradients (2, m, P) and (2, m) of a dense layer that saw them."""
    generator = torch.Generator().manual_seed(0)
    inputs, at_output = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((count, pixels), (rows, count))
    )
    return inputs, at_output @ inputs, at_output.sum(2)


def test_whitened_rows_are_uncorrelated_with_unit_variance():
    _, rows, _ = mixture()
    white = whitening(rows, 3) @ rows
    for each in white:
        torch.testing.assert_close(each.cov(), torch.eye(3).double())


def test_sign_and_scale_of_perfectly_separated_inputs_follow_from_the_bias_gradient():
    inputs, rows, bias = mixture()
    unmixing = torch.linalg.pinv(rows @ torch.linalg.pinv(inputs))
    wrong = torch.tensor([-2.0, 0.1, 5.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(inputs_from(wrong * unmixing, rows, bias), inputs)


def test_objective_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(1, 2, 9, generator=generator)
    unmix = torch.nn.functional.normalize(torch.randn(1, 2, 2, generator=generator), dim=2)
    attack = CocktailParty(decorrelation=0.7, temperature=2.0, tv=0.3, negentropy=0.5)
    found = attack._loss(unmix, mixed, mixed, (1, 3, 3)).item()
    components = unmix[0] @ mixed[0]
    cosine = abs((unmix[0, 0] @ unmix[0, 1]).item())
    images = components.view(2, 3, 3)
    smooth = (images[:, 1:] - images[:, :-1]).abs().mean() + (images[:, :, 1:] - images[:, :, :-1]).abs().mean()
    surprise = components.cosh().log().mean(1).square().mean()
    expected = 0.7 * 2 * (math.exp(2 * cosine) - 1) / 4 + 0.3 * smooth - 0.5 * surprise
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_independent_sources_are_separated():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(2, 3, 1500, generator=generator).sign()  # flatter than a Gaussian: what this contrast finds
    rows = torch.randn(2, 20, 3, generator=generator) @ sources
    observation = block(batch=3, trials=2)[1]({})
    mixed = whitening(rows, 3) @ rows
    attack = CocktailParty(steps=300, lr=0.02, tv=0.0, negentropy=30.0)
    unmix, loss, trace = attack._separate(observation, mixed, (1, 30, 50))
    for found, true in zip(unmix @ mixed, sources, strict=True):
        likeness = torch.cat([found, true]).corrcoef()[:3, 3:].abs()
        assert likeness.amax(0).min() > 0.98
    assert (loss < trace[:, 0]).all()
    assert trace.shape[1] <= 200


def test_one_input_is_exact():
    _, observe, update, truth = block(batch=1, activation="sigmoid")
    assert (decibels(CocktailParty(steps=1).run(observe(update)).inputs, truth) > 90).all()


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_one_input_needs_no_learning_rate(sends):
    protocol = type(block(batch=1)[0]["facts"].protocol)(sends=sends, local_steps=1, lr=0.05, precision="float64")
    _, observe, update, truth = block(batch=1, protocol=protocol, own_models=False)
    assert (decibels(CocktailParty(steps=1).run(observe(update)).inputs, truth) > 90).all()


@pytest.mark.parametrize("spoil", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_updates_give_finite_inputs_within_bounds(spoil):
    expect_valid_inputs(CocktailParty(steps=5), spoil, batch=3)


def test_a_layer_narrower_than_the_batch_gives_fewer_candidates():
    _, observe, update, _ = block(batch=8, trials=2, width=5)
    assert CocktailParty(steps=2).run(observe(update)).inputs.shape[:2] == (2, 5)


def test_nets_that_start_with_a_convolution_are_declined():
    knowledge, _, _, _ = block(batch=2, net="lenet_zhu", trials=1)
    with pytest.raises(NotApplicable):
        CocktailParty().prepare(Knowledge(**knowledge))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0}])
def test_senseless_parameters_are_refused(wrong):
    with pytest.raises(UserError):
        CocktailParty(**wrong)

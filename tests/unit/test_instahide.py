"""InstaHide against a mixture written out by hand (oracle T12), and what its absolute values give away."""

from __future__ import annotations

import pytest
import torch
from inversion_blocks import observe
from label_blocks import CLASSES
from leakbench_baselines.attacks.instahide_decode import InstaHideDecode, signed
from leakbench_baselines.defenses.instahide import InstaHide
from scipy.optimize import linear_sum_assignment
from scipy.stats import kstest
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.defense import DefenseContext
from leakbench.randomness import TrialRandom


def encode(defense, inputs, labels, stream=0):
    """Return encodings and mixed labels."""
    observation, _, _ = observe(trials=1)
    seeds = torch.randint(0, 256, (len(inputs), 32), generator=torch.manual_seed(stream)).to(torch.uint8)
    ctx = DefenseContext(
        model=observation.model,
        inputs=inputs,
        labels=labels,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=0.1,
        random=TrialRandom(seeds),
    )
    return defense.batch(inputs, labels, ctx)


def weights_of(defense, batch, trials=3, stream=0):
    """Return the weights (T, B, B) of a mixture: inputs are unit vectors, so that encodings are the weights."""
    inputs = torch.eye(batch, dtype=torch.float64).expand(trials, -1, -1)
    labels = torch.zeros(trials, batch, dtype=torch.int64)
    encodings, _ = encode(defense, inputs, labels, stream)
    return encodings.abs(), encodings


@pytest.mark.parametrize("sampler", ["official", "dirichlet"])
@pytest.mark.parametrize(("batch", "k"), [(2, 4), (6, 4), (6, 2), (9, 6)])
def test_weights_sum_to_1_of_distinct_examples_the_own_among_them_and_none_is_too_large(batch, k, sampler):
    """Oracle T12."""
    weights, _ = weights_of(InstaHide(k=k, sampler=sampler), batch, trials=40)
    torch.testing.assert_close(weights.sum(2), torch.ones(40, batch, dtype=torch.float64))
    assert ((weights > 0).sum(2) == min(k, batch)).all()
    assert (weights.diagonal(dim1=1, dim2=2) > 0).all()
    assert weights.max() <= 0.65
    assert weights.max() > 0.6


def test_absolute_values_are_those_of_the_unmasked_mixture_and_labels_are_mixed_alike():
    """Oracle T12: |InstaHide(x)| = |mixture(x)| pixel by pixel."""
    _, inputs, labels = observe(trials=3, batch=5)
    inputs = inputs - 0.4
    encodings, mixed = encode(InstaHide(), inputs, labels)
    weights, _ = weights_of(InstaHide(), 5)  # the same streams draw the same weights
    torch.testing.assert_close(encodings.abs(), torch.einsum("tij,tj...->ti...", weights, inputs).abs())
    torch.testing.assert_close(mixed, weights @ F.one_hot(labels, CLASSES).double())
    soft = encode(InstaHide(), inputs, F.one_hot(labels, CLASSES).double())[1]
    assert torch.equal(soft, mixed)


def test_signs_are_fair_and_fresh_for_every_pixel_example_and_trial():
    ones = torch.ones(4, 3, 1, 8, 8, dtype=torch.float64)
    labels = torch.zeros(4, 3, dtype=torch.int64)
    once, other = (encode(InstaHide(), ones, labels, stream)[0] for stream in (0, 1))
    assert abs(once.mean()) < 0.1
    flat = torch.cat([once.flatten(0, 1), other.flatten(0, 1)]).flatten(1)
    assert (flat @ flat.T / 64 - torch.eye(24)).abs().max() < 0.6


def test_samplers_are_what_they_are_called():
    """Without a bound: the own share is Beta(3, 1) under Dirichlet(3, 1), and (2 / pi) atan of a ratio of normals."""
    free = {"k": 2, "largest": 1.0}
    own = weights_of(InstaHide(sampler="dirichlet", **free), 2, trials=400)[0].diagonal(dim1=1, dim2=2).flatten()
    assert kstest(own.numpy(), "beta", (3, 1)).pvalue > 1e-3
    own = weights_of(InstaHide(sampler="official", **free), 2, trials=400)[0].diagonal(dim1=1, dim2=2).flatten()
    angle = torch.atan2(own, 1 - own) * 2 / torch.pi  # |z1| over |z2| is the tangent of a uniform angle
    assert kstest(angle.numpy(), "uniform").pvalue > 1e-3


def test_a_trial_draws_the_same_whatever_the_others_need():
    many, alone = weights_of(InstaHide(), 4, trials=30)[0], weights_of(InstaHide(), 4, trials=1)[0]
    assert many.shape[0] == 30
    torch.testing.assert_close(many[:1], alone)


def test_what_cannot_be_is_refused():
    for wrong, message in (({"k": 0}, "k: expected"), ({"sampler": "x"}, "sampler"), ({"largest": 0.5}, "largest")):
        with pytest.raises(UserError, match=message):
            InstaHide(**wrong)
    with pytest.raises(UserError, match="expected steps, starts and fits"):
        InstaHideDecode(fits=0)


# --- the attack -------------------------------------------------------------------------------------------------------


def matched(found, inputs):
    """Return the PSNR of every trial after the best assignment."""
    psnr = []
    for one, true in zip(found.flatten(2), inputs.flatten(2), strict=True):
        error = torch.cdist(true, one).square() / true.shape[1]
        rows, columns = linear_sum_assignment(error)
        psnr.append((-10 * error[rows, columns].clamp(min=1e-12).log10()).mean())
    return torch.stack(psnr)


def test_more_rounds_of_the_same_pair_unmix_it():
    """The second stage on true encodings: far beyond the best of their absolute values."""
    observation, inputs, labels = observe(trials=3, batch=2, defense=InstaHide(), known=True)
    rounds = torch.cat([encode(InstaHide(), inputs, labels, stream)[0] for stream in range(16)], 1)
    attack = InstaHideDecode(starts=4)
    raw, often = (matched(found, inputs).mean() for found in (rounds.abs(), attack._decoded(rounds.abs(), observation)))
    assert often > raw + 10


def test_one_image_is_all_but_bare():
    observation, inputs, _ = observe(trials=2, defense=InstaHide(), known=True)
    attack = InstaHideDecode(steps=250)
    recovery = attack.run(observation.with_prepared(attack.prepare(observation)))
    assert matched(recovery.inputs, inputs).min() > 20
    assert recovery.model_evaluations <= 251


def test_inputs_of_either_sign_are_reached():
    observation, _, _ = observe(trials=2)
    low, high = observation.bounds
    assert signed(low.double(), observation).item() == -1
    assert signed(high.double(), observation).item() == 1

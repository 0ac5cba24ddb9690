"""Bins of a measurement: what lies alone in a bin is exact, what shares one is an average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from leakbench_baselines.attacks.robbing_the_fed import RobbingTheFed, bin_edges
from malicious_blocks import SPOILS, play, showing

from leakbench import UserError
from leakbench.models.functional import build_model
from leakbench.models.imprint import insert
from leakbench.tasks import Architecture

LENET = Architecture(name="lenet_zhu", params={"activation": "relu"})

pytestmark = pytest.mark.usefixtures("one_thread")


def block(attack, *, trials=3, own_models=False, dtype=torch.float64, **task):
    """Return the cast of digits on a LeNet with the attack's module in front."""
    params = {"bins": attack.bins, "sparse": attack.sparse, "gain": attack.gain}
    model = build_model(
        LENET,
        (1, 8, 8),
        10,
        seeds=range(trials if own_models else 1),
        transform=lambda m: insert(m, "imprint_linear", (1, 8, 8), params),
    ).to(dtype=dtype)
    return play(attack, trials=trials, model=model, dtype=dtype, **task)


def alone(cast):
    """Return the private inputs that share their bin with no other, by trial."""
    inputs = torch.cat(cast.inputs, 1).double()
    prepared = cast.observation.prepared
    bins = np.digitize((inputs.flatten(2) @ prepared["probe"]).numpy(), prepared["edges"].numpy())
    return [
        [x for x, b in zip(images, own, strict=True) if (own == b).sum() == 1]
        for images, own in zip(inputs, bins, strict=True)
    ]


def distance(image, claims):
    return (claims.double() - image).abs().flatten(1).amax(1).min()


@pytest.mark.parametrize("measure", ["mean", "cosine", "random"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("own_models", [False, True])
def test_inputs_alone_in_their_bin_are_exact(measure, sparse, own_models):
    attack = RobbingTheFed(bins=40, measure=measure, mode=3, sparse=sparse)
    cast = block(attack, own_models=own_models, sizes=(12,))
    claims = attack.run(cast.observation).inputs
    assert claims.shape == (3, 12, 1, 8, 8)
    singles = alone(cast)
    assert all(len(one) >= 4 for one in singles)
    for t, images in enumerate(singles):
        assert all(distance(image, claims[t]) < 1e-6 for image in images)


def test_the_others_are_averages_within_their_bin():
    attack = RobbingTheFed(bins=1)
    cast = block(attack, sizes=(2,))
    first, second = torch.cat(cast.inputs, 1).unbind(1)
    claim = attack.run(cast.observation).inputs[:, 0]
    for t in range(3):
        # The claim lies on the line through the two, clamped to valid pixels.
        share = ((claim - second)[t] * (first - second)[t]).sum() / (first - second)[t].square().sum()
        on_line = second[t] + share * (first - second)[t]
        if 0 < share < 1:
            torch.testing.assert_close(claim[t], on_line, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sends", ["delta", "weights"])
@pytest.mark.parametrize(("sparse", "gain"), [(False, 1e-3), (True, 1e-5)])
def test_one_local_step_is_exact_in_float32_without_the_learning_rate(sends, sparse, gain):
    attack = RobbingTheFed(bins=40, sparse=sparse, gain=gain)
    cast = block(attack, sizes=(12,), sends=sends, lr=0.05, dtype=torch.float32, withheld=("lr",))
    claims = attack.run(cast.observation).inputs
    for t, images in enumerate(alone(cast)):
        assert all(distance(image, claims[t]) < 1e-2 for image in images)


@pytest.mark.parametrize("batches", ["fresh", "same"])
def test_several_local_steps_are_exact_where_rows_are_clamped(batches):
    attack = RobbingTheFed(bins=60, sparse=True, gain=1e-5)
    cast = block(attack, sizes=(12,), sends="delta", local_steps=3, batches=batches, lr=0.05)
    claims = attack.run(cast.observation).inputs
    for t, images in enumerate(alone(cast)):
        assert all(distance(image, claims[t]) < 1e-4 for image in images)


def test_clients_of_unequal_size_are_one_batch():
    attack = RobbingTheFed(bins=60)
    cast = block(attack, sizes=(5, 2, 3), secure_aggregation=True, weighting="examples")
    claims = attack.run(cast.observation).inputs
    assert claims.shape[1] == 10
    for t, images in enumerate(alone(cast)):
        assert all(distance(image, claims[t]) < 1e-6 for image in images)


def test_what_is_not_found_is_the_mean_auxiliary_input():
    attack = RobbingTheFed(bins=2)
    cast = block(attack, sizes=(6,))
    claims = attack.run(cast.observation).inputs
    mean = cast.observation.auxiliary[0].mean(0)
    torch.testing.assert_close(claims[:, 2:], mean.expand(3, 4, 1, 8, 8))


@pytest.mark.parametrize("examples", [40, 3000])
@pytest.mark.parametrize("bins", [100, 400])
def test_as_many_are_alone_as_the_law_of_equal_bins_says(bins, examples):
    stream = torch.Generator().manual_seed(0)
    measured = torch.randn(examples, generator=stream, dtype=torch.float64)
    edges = bin_edges(measured, bins, torch.tensor([-50.0, 50.0], dtype=torch.float64))
    assert (edges.diff() > 0).all()
    draws = torch.randn(400, 64, generator=stream, dtype=torch.float64)
    place = torch.searchsorted(edges, draws)
    single = (place[:, :, None] == place[:, None]).sum(2) == 1
    assert abs(single.sum(1).double().mean() - 64 * (1 - 1 / bins) ** 63) < 1.5


@pytest.mark.parametrize("measured", [torch.zeros(5), torch.full((1,), 0.7), torch.tensor([0.0, 1.0])])
def test_edges_of_odd_measurements_still_rise(measured):
    edges = bin_edges(measured.double(), 50, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edges[0] == 0
    assert edges[-1] == 1
    assert (edges.diff() > 0).all()


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_degenerate_updates_give_finite_inputs_within_bounds(spoil):
    attack = RobbingTheFed(bins=20)
    cast = block(attack, sizes=(30,))
    claims = attack.run(showing(cast, {n: spoil(v) for n, v in cast.observation.update.items()})).inputs
    assert claims.shape[1] == 30
    assert claims.min() >= 0
    assert claims.max() <= 1


def test_the_scale_of_the_update_does_not_matter():
    attack = RobbingTheFed(bins=20)
    cast = block(attack, sizes=(6,))
    scaled = showing(cast, {n: 17.0 * v for n, v in cast.observation.update.items()})
    torch.testing.assert_close(attack.run(scaled).inputs, attack.run(cast.observation).inputs)


@pytest.mark.parametrize("params", [{"bins": 0}, {"mode": 0}, {"gain": 0.0}, {"measure": "median"}])
def test_parameters_are_checked(params):
    with pytest.raises(UserError, match="write robbing_the_fed"):
        RobbingTheFed(**params)

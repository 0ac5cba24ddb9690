"""Columns of their own: a secure aggregate is read client by client."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from leakbench_baselines.attacks.loki import Loki
from malicious_blocks import SPOILS, play, showing
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.models.functional import build_model
from leakbench.models.imprint import insert
from leakbench.observation import Cohort
from leakbench.tasks import Architecture, InputSpec

NET = Architecture(name="lenet_zhu", params={"activation": "relu"})

pytestmark = pytest.mark.usefixtures("one_thread")


def block(attack, sizes, *, dtype=torch.float64, **task):
    """Return the cast of digits on a LeNet with the attack's module in front."""
    params = {"bins": attack.bins, "clients": len(sizes)}
    model = build_model(
        NET, (1, 8, 8), 10, seeds=[0], transform=lambda m: insert(m, "imprint_conv", (1, 8, 8), params)
    ).to(dtype=dtype)
    return play(attack, sizes=sizes, model=model, dtype=dtype, **task)


def places(cast):
    """Return the bin of every private input, (T, N) per client."""
    edges = cast.observation.prepared["edges"].numpy()
    return [np.digitize(inputs.double().flatten(2).mean(2).numpy(), edges) for inputs in cast.inputs]


def distance(image, claims):
    return (claims.double() - image).abs().flatten(1).amax(1).min()


@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_every_client_s_inputs_are_claimed_in_its_own_place(sends):
    attack = Loki(bins=64)
    sizes = (4, 2, 3)
    cast = block(attack, sizes, secure_aggregation=True, sends=sends, weighting="examples")
    claims = attack.run(cast.observation).inputs.split(sizes, 1)
    found = 0
    for k, bins in enumerate(places(cast)):
        for t in range(3):
            others = np.concatenate([b[t] for j, b in enumerate(places(cast)) if j != k])
            for i, place in enumerate(bins[t]):
                if (bins[t] == place).sum() == 1:
                    # Exact where no other client is in the bin; else right up to the bin's width.
                    error = distance(cast.inputs[k][t, i], claims[k][t])
                    assert error < (0.1 if place in others else 1e-6)
                    found += 1
    assert found > 20


def test_a_bin_that_clients_share_is_scaled_by_its_middle():
    attack = Loki(bins=64)
    row = torch.tensor([[3, 3]])
    cast = block(attack, (1, 1), picks=row, secure_aggregation=True)
    claims = attack.run(cast.observation).inputs
    edges, image = cast.observation.prepared["edges"], cast.inputs[0][0, 0]
    place = int(torch.searchsorted(edges, image.mean()))
    middle = (edges[place - 1] + edges[place]) / 2
    for k in range(2):
        torch.testing.assert_close(claims[0, k], (image * middle / image.mean()).clamp(0, 1))


def test_several_local_steps_are_exact_up_to_the_width_of_a_bin():
    attack = Loki(bins=64, scale=500)
    cast = block(attack, (6, 6), sends="delta", local_steps=3, lr=0.05, secure_aggregation=True)
    claims = attack.run(cast.observation).inputs.split(6, 1)
    for k, bins in enumerate(places(cast)):
        for t in range(3):
            for i, place in enumerate(bins[t]):
                if (bins[t] == place).sum() == 1:
                    assert distance(cast.inputs[k][t, i], claims[k][t]) < 0.1


def test_clients_differ_in_their_kernels_alone():
    cast = block(Loki(bins=16), (2, 2, 2))
    planted = cast.observation.planted
    assert {name: len(value) for name, value in planted.items()} == {
        "imprint.kernel": 3,
        "imprint.offset": 3,
        "imprint.weight": 1,
        "imprint.bias": 1,
        "imprint.out": 1,
    }


def test_channels_hold_pixels_however_inputs_are_normalised():
    attack = Loki(bins=16, scale=5.0)
    cast = block(attack, (2, 2))
    seen = cast.observation
    spec = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
    facts = dataclasses.replace(seen._facts, normalised=True, input_spec=spec)
    cohort = Cohort(seen.prepared, facts=facts, random=seen._random, model=cast.model)
    planted = attack.plant(cast.model, cohort, [])
    pixels = cast.inputs[0][0]
    channels = F.conv2d(
        (pixels - 0.3) / 0.4, planted["imprint.kernel"][0, :, :, None, None], planted["imprint.offset"][0]
    )
    torch.testing.assert_close(channels[:, :1], 5 * pixels)
    assert not channels[:, 1:].any()


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_degenerate_updates_give_finite_inputs_within_bounds(spoil):
    attack = Loki(bins=8)
    cast = block(attack, (10, 4))
    claims = attack.run(showing(cast, {n: spoil(v) for n, v in cast.observation.update.items()})).inputs
    assert claims.shape == (3, 14, 1, 8, 8)
    assert claims.min() >= 0
    assert claims.max() <= 1


@pytest.mark.parametrize("params", [{"bins": 0}, {"scale": 0.0}])
def test_parameters_are_checked(params):
    with pytest.raises(UserError, match="write loki"):
        Loki(**params)

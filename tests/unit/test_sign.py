"""The sign of the update against numpy's, and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.sign import Sign
from torch.nn import functional as F  # noqa: N812
from update_blocks import context, flat, updates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_numpys_sign_and_that_of_nothing_is_nothing(dtype):
    clean = updates(4, dtype=dtype)
    clean["a.bias"] = clean["a.bias"].clone()
    clean["a.bias"][:, :7] = 0
    for name, value in Sign().update(clean, context(4)).items():
        np.testing.assert_array_equal(value.numpy(), np.sign(clean[name].numpy()))
        assert value.dtype == dtype


def test_scaled_it_is_the_nearest_multiple_of_the_signs():
    clean = updates(4)
    for name, value in Sign(scaled=True).update(clean, context(4)).items():
        for before, after in zip(clean[name].flatten(1).numpy(), value.flatten(1).numpy(), strict=True):
            factor = np.linalg.lstsq(np.sign(before)[:, None], before, rcond=None)[0].item()
            np.testing.assert_allclose(after, factor * np.sign(before))


@settings(deadline=None)
@given(st.floats(1e-6, 1e6))
def test_the_size_of_the_update_does_not_show_unless_scaled(scale):
    plain, grown = ({n: f * v for n, v in updates(2).items()} for f in (1.0, scale))
    assert torch.equal(flat(Sign().update(plain, None)), flat(Sign().update(grown, None)))
    one, other = (flat(Sign(scaled=True).update(u, None)) for u in (plain, grown))
    torch.testing.assert_close(other, scale * one)


def test_of_normal_coordinates_the_direction_is_kept_as_mean_and_mean_square_say():
    clean = flat(updates(8))
    sent = flat(Sign().update(updates(8), None))
    # E|z| / sqrt(E z^2) = sqrt(2 / pi)
    assert F.cosine_similarity(sent, clean).mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)


def test_the_sign_of_signs_is_the_same():
    once = Sign(scaled=True).update(updates(2), None)
    torch.testing.assert_close(flat(Sign(scaled=True).update(once, None)), flat(once))

"""Quantisation to int8 against torch's own, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.int8 import Int8
from update_blocks import context, flat, updates


def test_it_is_torchs_symmetric_quantisation():
    clean = updates(3, dtype=torch.float32)
    for name, value in Int8().update(clean, context(3)).items():
        for before, after in zip(clean[name], value, strict=True):
            scale = before.abs().max().item() / 127
            expected = torch.fake_quantize_per_tensor_affine(before, scale, 0, -127, 127)
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-36, 1e30), st.sampled_from([torch.float32, torch.float64]))
def test_the_error_is_half_a_step_and_the_greatest_is_kept(scale, dtype):
    clean = updates(2, scale=scale, dtype=dtype)
    for name, value in Int8().update(clean, context(2)).items():
        before, after = clean[name].flatten(1).double(), value.flatten(1).double()
        greatest = before.abs().amax(1, keepdim=True)
        assert ((after - before).abs() <= greatest / 127 * (0.5 + 1e-4)).all()
        torch.testing.assert_close(after.abs().amax(1, keepdim=True), greatest, rtol=1e-6, atol=0)
        assert all(len(row.unique()) <= 255 for row in after)
        assert value.dtype == dtype


def test_what_was_rounded_stays_and_so_does_nothing():
    once = Int8().update(updates(2), context(2))
    torch.testing.assert_close(flat(Int8().update(once, context(2))), flat(once), rtol=1e-12, atol=0)
    assert (flat(Int8().update({n: v * 0 for n, v in once.items()}, context(2))) == 0).all()


def test_of_uniform_coordinates_the_error_has_the_variance_of_rounding():
    uniform = {"v": 2 * torch.rand(4, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1}
    error = (Int8().update(uniform, context(4))["v"] - uniform["v"]) * 127
    assert error.square().mean().item() == pytest.approx(1 / 12, rel=0.02)

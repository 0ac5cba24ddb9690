"""Half precision against numpy's, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leakbench_baselines.defenses.fp16 import FP16
from update_blocks import context, flat, updates

from leakbench import UserError


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e4])
def test_float16_is_numpys(scale):
    clean = updates(3, scale=scale)
    for name, value in FP16().update(clean, context(3)).items():
        np.testing.assert_array_equal(value.numpy(), clean[name].numpy().astype(np.float16).astype(np.float64))


def test_bfloat16_is_float32_rounded_to_its_upper_half():
    clean = updates(3, dtype=torch.float32)
    for name, value in FP16(form="bfloat16").update(clean, context(3)).items():
        bits = clean[name].numpy().view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16  # to the nearest, ties to even
        np.testing.assert_array_equal(value.numpy(), nearest.astype(np.uint32).view(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([("float16", 11, 1e-3, 1e3), ("bfloat16", 8, 1e-30, 1e30)]), st.floats(0, 1))
def test_the_relative_error_is_at_most_half_a_unit_of_the_last_place(kind, where):
    form, bits, least, most = kind
    magnitude = least * (most / least) ** where
    clean = {"v": magnitude * (1 + torch.rand(2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64))}
    sent = FP16(form=form).update(clean, context(2))["v"]
    assert ((sent / clean["v"] - 1).abs() <= 2.0**-bits * (1 + 1e-6)).all()


@pytest.mark.parametrize("form", ["float16", "bfloat16"])
def test_a_diverged_update_stays_finite_and_what_was_rounded_stays(form):
    sent = FP16(form=form).update(updates(2, scale=1e300), context(2))
    most = torch.finfo(getattr(torch, form)).max
    assert (flat(sent).abs() == most).all()
    once = FP16(form=form).update(updates(2), context(2))
    assert torch.equal(flat(FP16(form=form).update(once, context(2))), flat(once))
    assert not torch.equal(flat(once), flat(updates(2)))


def test_another_format_is_refused():
    with pytest.raises(UserError, match=r"form: expected 'float16' or 'bfloat16', got 'int8'; write"):
        FP16(form="int8")

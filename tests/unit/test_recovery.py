from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakbench import Recovery
from leakbench.attack import TRACE_LIMIT, RecoveryShape
from leakbench.errors import InvalidOutput

T, K, N, C = 3, 2, 4, 5
SHAPE = RecoveryShape(trials=T, clients=K, inputs=K * N, num_classes=C, input_shape=(1, 2, 2))
BOTH = frozenset({"labels", "inputs"})


def counts(value=1):
    return torch.full((T, K, C), value, dtype=torch.int64)


def images(count=K * N):
    return torch.zeros(T, count, 1, 2, 2)


def changed(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


NAN, INF = float("nan"), float("inf")
WRONG = [
    ("label_counts", None, "got None"),
    ("label_counts", counts().tolist(), "expected a tensor, got list"),
    ("label_counts", counts().numpy(), "expected a tensor, got ndarray"),
    ("label_counts", counts().float(), "expected an integer dtype, got torch.float32"),
    ("label_counts", counts().bool(), "expected an integer dtype, got torch.bool"),
    ("label_counts", counts().to(torch.complex64), "expected an integer dtype, got torch.complex64"),
    ("label_counts", counts()[:, :, :-1], "expected shape (3, 2 or 1, 5), got (3, 2, 4)"),
    ("label_counts", counts()[:-1], "got (2, 2, 5)"),
    ("label_counts", counts()[:, 0], "got (3, 5)"),
    ("label_counts", torch.ones(T, K + 1, C, dtype=torch.int64), "got (3, 3, 5)"),
    ("label_counts", changed(counts(), -1), "expected counts in 0.."),
    ("label_counts", changed(counts(), 1 << 60), "expected counts in 0.."),
    ("label_counts", counts().to_sparse(), "expected a dense tensor"),
    ("label_counts", counts().to("meta"), "expected a dense tensor"),
    ("inputs", None, "got None"),
    ("inputs", images().numpy(), "expected a tensor, got ndarray"),
    ("inputs", images().long(), "expected a floating dtype, got torch.int64"),
    ("inputs", images().to(torch.complex64), "expected a floating dtype, got torch.complex64"),
    ("inputs", changed(images(), NAN), "NaN or infinity"),
    ("inputs", changed(images(), -INF), "NaN or infinity"),
    ("inputs", changed(images().double(), 1e300), "overflows float32"),
    ("inputs", images(K * N + 1), "at most 8 candidates per trial, got 9"),
    ("inputs", images()[:, 0], "expected shape (3, at most 8, 1, 2, 2), got (3, 1, 2, 2)"),
    ("inputs", images()[:2], "got (2, 8, 1, 2, 2)"),
    ("inputs", images().flatten(2), "got (3, 8, 4)"),
    ("inputs", images().transpose(2, 3), "got (3, 8, 2, 1, 2)"),
    ("inputs", images().to("meta"), "expected a dense tensor"),
    ("visible_loss", 0.5, "expected a tensor, got float"),
    ("visible_loss", torch.zeros(T, 1), "expected shape (3,), got (3, 1)"),
    ("visible_loss", torch.zeros(T - 1), "expected shape (3,), got (2,)"),
    ("visible_loss", torch.zeros(T, dtype=torch.int64), "expected a floating dtype, got torch.int64"),
    ("visible_loss", torch.tensor([0, 1, NAN]), "NaN or infinity"),
    ("visible_loss", torch.tensor([0, 1, 1e300], dtype=torch.float64), "overflows float32"),
    ("visible_loss_trace", torch.zeros(T), "expected shape (3, at most 200), got (3,)"),
    ("visible_loss_trace", torch.zeros(T, TRACE_LIMIT + 1), "at most 200), got (3, 201)"),
    ("visible_loss_trace", torch.full((T, 2), INF), "NaN or infinity"),
    ("model_evaluations", -1, "expected a count, got -1"),
    ("model_evaluations", 1 << 62, "expected a count"),
    ("model_evaluations", 2.5, "expected a count, got 2.5"),
    ("model_evaluations", NAN, "expected a count, got nan"),
    ("model_evaluations", "many", "expected a count, got many"),
    ("model_evaluations", torch.tensor(3), "expected a count"),
    ("model_evaluations", np.int64(3), "expected a count"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_an_invalid_field_is_one_line_that_names_it(field, value, message):
    fields = {"label_counts": counts(), "inputs": images(), field: value}
    with pytest.raises(InvalidOutput) as error:
        SHAPE.check(Recovery(**fields), BOTH)
    text = str(error.value)
    assert text.startswith(f"Recovery.{field}: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 200


@pytest.mark.parametrize("value", [None, {}, torch.zeros(T), Recovery])
def test_what_is_no_recovery_is_refused(value):
    with pytest.raises(InvalidOutput, match=r"run\(\) must return a Recovery, got "):
        SHAPE.check(value, BOTH)


def test_a_claim_over_the_boundary_is_checked_like_one_that_was_returned():
    for field, value, message in WRONG:
        if isinstance(value, torch.Tensor) and field != "model_evaluations":
            target = "inputs" if field == "inputs" else "labels"
            tensors = {"label_counts": counts(), "inputs": images(), field: value}
            with pytest.raises(InvalidOutput, match=f"Recovery.{field}"):
                SHAPE.claim(tensors, 1, target)
            assert message
    with pytest.raises(InvalidOutput, match="'extra', which is no field"):
        SHAPE.claim({"label_counts": counts(), "extra": counts()}, 1, "labels")
    for evaluations in (None, -1, "3", 1.5, [1]):
        with pytest.raises(InvalidOutput, match="count"):
            SHAPE.claim({"label_counts": counts()}, evaluations, "labels")


def test_only_what_an_attack_recovers_is_kept():
    recovery = Recovery(label_counts=counts(), inputs=images())
    assert SHAPE.check(recovery, frozenset({"labels"})).tensors().keys() == {"label_counts"}
    assert SHAPE.claim({"inputs": images()}, 3, "inputs").model_evaluations == 3


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([1, K]),
    st.integers(0, K * N),
    st.integers(0, TRACE_LIMIT),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_a_valid_recovery_keeps_its_values_as_int64_and_float32(integer, floating, clients, count, trace, grad, seed):
    stream = torch.Generator().manual_seed(seed)
    given_counts = torch.randint(0, 100, (T, clients, C), generator=stream).to(integer)
    given_inputs = torch.randn(T, count, 1, 2, 2, generator=stream).to(floating).requires_grad_(grad)
    loss = torch.rand(T, generator=stream).to(floating)
    recovery = Recovery(
        label_counts=given_counts,
        inputs=given_inputs,
        visible_loss=loss,
        visible_loss_trace=torch.rand(T, trace, generator=stream),
        model_evaluations=seed,
    )
    checked = SHAPE.check(recovery, BOTH)
    assert checked.label_counts.dtype == torch.int64
    assert checked.inputs.dtype == checked.visible_loss.dtype == torch.float32
    assert checked.label_counts.tolist() == given_counts.tolist()
    np.testing.assert_allclose(checked.inputs.numpy(), given_inputs.detach().double().numpy(), rtol=1e-6)
    assert not checked.inputs.requires_grad
    again = SHAPE.claim(checked.tensors(), checked.model_evaluations, "labels")
    assert torch.equal(again.label_counts, checked.label_counts)

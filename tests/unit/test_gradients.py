from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from leakbench.errors import LeakbenchError
from leakbench.federation.gradients import default_chunk, per_example_gradients, per_trial_gradients
from leakbench.models.catalogue import architecture_spec
from leakbench.models.functional import Model, build_model
from leakbench.tasks import Architecture

C, T, B = 5, 3, 4
NETS = {
    "mlp": ({"width": 7}, (1, 4, 4)),
    "lenet_zhu": ({}, (1, 8, 8)),
    "lenet5": ({}, (1, 12, 12)),
    "convnet": ({"width": 2}, (3, 9, 9)),
    "resnet18": ({"width": 2}, (1, 8, 8)),
    "resnet20": ({"width": 2}, (3, 8, 8)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str, draws: int, trials: int = T, batch: int = B, soft: bool = False):
    params, shape = NETS[name]
    model = build_model(Architecture(name=name, params=params), shape, C, seeds=range(draws)).to(dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    # Statistics and affine parameters away from their initial zeros and ones, so that a mix-up would show.
    lively = {k: v + 0.1 * torch.rand(v.shape, generator=generator) for k, v in model.parameters.items()}
    moved = {k: v + 0.3 if v.is_floating_point() else v + 2 for k, v in model.buffers.items()}
    inputs = torch.randn(trials, batch, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (trials, batch), generator=generator)
    if soft:
        labels = torch.rand(trials, batch, C, generator=generator, dtype=torch.float64)
    return model.with_state(lively, moved), inputs, labels


def torch_module(model: Model, trial: int):
    """PyTorch's own layers, BatchNorm included, with one trial's weights."""
    module, _, function = architecture_spec(model.architecture.name).build.partition(":")
    build = getattr(importlib.import_module(module), function)
    net = build(model.input_shape, C, **model.architecture.params).to(torch.float64)
    net.load_state_dict({k: v[min(trial, model.draws - 1)] for k, v in (model.parameters | model.buffers).items()})
    return net


def loop(model, inputs, labels, batch_norm="eval", reduction="mean", create_graph=False):
    gradients, losses, buffers = [], [], []
    for t in range(len(inputs)):
        net = torch_module(model, t).train(batch_norm == "train")
        loss = cross_entropy(net(inputs[t]), labels[t], reduction=reduction)
        gradients.append(torch.autograd.grad(loss, list(net.parameters()), create_graph=create_graph))
        losses.append(loss)
        buffers.append(dict(net.named_buffers()))
    stacked = {k: torch.stack([g[i] for g in gradients]) for i, k in enumerate(model.parameters)}
    return stacked, torch.stack(losses), {k: torch.stack([b[k] for b in buffers]) for k in model.buffers}


def close(actual, expected):
    assert actual.keys() == expected.keys()
    # Biases before a BatchNorm have gradient zero up to rounding, so the absolute part is shared by all tensors.
    atol = 1e-11 * max((float(v.abs().max()) for v in expected.values()), default=0.0)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("name", NETS)
def test_gradients_equal_those_of_a_loop(name, draws, batch_norm, soft, reduction):
    model, inputs, labels = make(name, draws, soft=soft)
    expected, losses, buffers = loop(model, inputs, labels, batch_norm, reduction)
    # Two chunks, the last one smaller, so that the joints are covered.
    actual = per_trial_gradients(model, inputs, labels, batch_norm=batch_norm, reduction=reduction, chunk=2)
    close(actual.tensors, expected)
    torch.testing.assert_close(actual.losses, losses.detach(), rtol=1e-10, atol=1e-12)
    close(actual.buffers, buffers if batch_norm == "train" and model.has_batch_norm else {})


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("name", ["lenet_zhu", "resnet20"])
def test_named_tensors_equal_those_among_all(name, draws, batch_norm):
    model, inputs, labels = make(name, draws)
    expected, _, buffers = loop(model, inputs, labels, batch_norm)
    for names in (["fc.weight"], ["fc.bias", "fc.weight"], [], [model.parameter_names[0]], model.parameter_names[1:4]):
        actual = per_trial_gradients(model, inputs, labels, names=names, batch_norm=batch_norm)
        close(actual.tensors, {n: expected[n] for n in model.parameter_names if n in names})
        close(actual.buffers, buffers if batch_norm == "train" and model.has_batch_norm else {})


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("names", [None, ["fc.weight", "fc.bias"]])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("name", NETS)
def test_second_order_gradients_equal_those_of_a_loop(name, draws, batch_norm, names, soft):
    model, inputs, labels = make(name, draws, soft=soft)
    wrt = [inputs.requires_grad_()] + ([labels.requires_grad_()] if soft else [])

    def second(tensors):
        # Any smooth function of the gradients does; the weights make every entry count differently.
        return torch.autograd.grad(sum((v**2 * (1 + v.cos())).sum() for v in tensors), wrt)

    expected, _, _ = loop(model, inputs, labels, batch_norm, create_graph=True)
    actual = per_trial_gradients(model, inputs, labels, names=names, batch_norm=batch_norm, create_graph=True, chunk=2)
    close(
        dict(enumerate(second(actual.tensors.values()))),
        dict(enumerate(second([expected[n] for n in actual.tensors]))),
    )


@pytest.mark.parametrize("draws", [1, T])
@pytest.mark.parametrize("name", NETS)
def test_per_example_gradients_equal_those_of_a_loop(name, draws):
    model, inputs, labels = make(name, draws)
    actual = per_example_gradients(model, inputs, labels)
    for b in range(B):
        expected, _, _ = loop(model, inputs[:, b : b + 1], labels[:, b : b + 1])
        close({k: v[:, b] for k, v in actual.items()}, expected)


@settings(max_examples=20, deadline=None)
@given(trials=st.integers(1, 9), batch=st.integers(1, 5), chunk=st.integers(1, 10), draws=st.sampled_from(["1", "T"]))
def test_the_chunk_changes_no_number(trials, batch, chunk, draws):
    model, inputs, labels = make("lenet_zhu", 1 if draws == "1" else trials, trials, batch)
    expected = per_trial_gradients(model, inputs, labels, chunk=trials)
    close(per_trial_gradients(model, inputs, labels, chunk=chunk).tensors, expected.tensors)


def test_results_leave_no_graph_and_inputs_untouched():
    model, inputs, labels = make("convnet", 1)
    before = inputs.clone()
    result = per_trial_gradients(model, inputs.requires_grad_(), labels)
    assert not any(v.requires_grad for v in (*result.tensors.values(), result.losses))
    assert not any(v.requires_grad for v in model.parameters.values())
    assert inputs.grad is None
    assert torch.equal(inputs, before)


def test_a_name_the_model_lacks_is_an_error():
    model, inputs, labels = make("mlp", 1)
    with pytest.raises(LeakbenchError, match=r"no parameter 'fc\.weigth'"):
        per_trial_gradients(model, inputs, labels, names=["fc.weigth"])


def test_per_example_gradients_refuse_shared_batch_statistics():
    model, inputs, labels = make("convnet", 1)
    with pytest.raises(LeakbenchError, match="batch_norm: eval"):
        per_example_gradients(model, inputs, labels, batch_norm="train")


def test_the_chunk_depends_on_shapes_alone():
    model, inputs, _ = make("lenet_zhu", 1)
    assert default_chunk(model, inputs) == default_chunk(model, torch.zeros_like(inputs)) == 64

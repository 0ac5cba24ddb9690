"""Inner products of per-trial gradients against plain autograd, layer kind by layer kind."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from leakbench.federation import products
from leakbench.federation.gradients import per_trial_gradients
from leakbench.federation.products import per_trial_products
from leakbench.models.batch_norm import explicit_batch_norm
from leakbench.models.functional import Model, build_model
from leakbench.models.small import Classifier
from leakbench.tasks import Architecture

C = 4

pytestmark = pytest.mark.usefixtures("one_thread")

BODIES = {
    "linear": lambda: [nn.Flatten(), nn.Linear(2 * 8 * 8, 9), nn.Sigmoid()],
    "wide_linear": lambda: [nn.Flatten(), nn.Linear(2 * 8 * 8, 50), nn.Sigmoid()],
    "conv": lambda: [nn.Conv2d(2, 5, 3), nn.Sigmoid()],
    "conv_without_bias": lambda: [nn.Conv2d(2, 5, 3, bias=False), nn.Tanh()],
    "conv_padded": lambda: [nn.Conv2d(2, 3, (3, 5), padding=(1, 2)), nn.Tanh()],
    "conv_strided": lambda: [nn.Conv2d(2, 3, 5, stride=2, padding=2), nn.Sigmoid(), nn.Conv2d(3, 4, 3, stride=2)],
    "conv_strided_even": lambda: [nn.Conv2d(2, 3, 4, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(3, 2, 1, stride=2)],
    "conv_strides_differ": lambda: [nn.Conv2d(2, 3, 3, stride=(2, 4), padding=(1, 0)), nn.Tanh()],
    "conv_stride_over_kernel": lambda: [nn.Conv2d(2, 3, 2, stride=4, padding=1), nn.Tanh()],
    "conv_dilated": lambda: [nn.Conv2d(2, 3, 3, dilation=2, padding=2), nn.Tanh(), nn.Conv2d(3, 3, 2, 2, dilation=3)],
    "conv_grouped": lambda: [
        nn.Conv2d(2, 6, 3, groups=2, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=3),
    ],
    "conv_few_positions": lambda: [nn.Conv2d(2, 20, 4, stride=4), nn.Tanh(), nn.Conv2d(20, 30, 2), nn.Tanh()],
    "conv_few_positions_strided": lambda: [nn.Conv2d(2, 20, 3, 2), nn.Tanh(), nn.Conv2d(20, 30, 3, 2, padding=1)],
    "batch_norm": lambda: [nn.Conv2d(2, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 4, 2)],
    "batch_norm_flat": lambda: [nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6), nn.Tanh()],
    "batch_norm_alone": lambda: [nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 3, padding=1)],
    "pooled": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)],
}


def classifier(kind: str, draws: int, shape=(2, 8, 8)):
    """Return our model with M sets of weights, and the same net made of PyTorch's own layers."""
    torch.manual_seed(3)
    plain = Classifier(nn.Sequential(*BODIES[kind](), nn.Flatten()), shape, C).double().eval()
    state = {
        name: torch.stack([lively(name, v, draw) for draw in range(draws)]) for name, v in plain.state_dict().items()
    }
    named = dict(plain.named_parameters())
    model = Model(
        explicit_batch_norm(copy.deepcopy(plain)).to("meta"),
        {name: value for name, value in state.items() if name in named},
        {name: value for name, value in state.items() if name not in named},
        num_classes=C,
        input_shape=shape,
        architecture=Architecture(name="lenet5"),
    )
    return model, plain


def lively(name, value, draw):
    """Return values away from zeros and ones, so that a mix-up would show; variances stay positive."""
    generator = torch.Generator().manual_seed(100 * draw + len(name))
    if not value.is_floating_point():
        return value + 2
    return value + 0.3 * torch.rand(value.shape, generator=generator, dtype=value.dtype)


def example(trials, batch, shape=(2, 8, 8), soft=False):
    generator = torch.Generator().manual_seed(trials + 10 * batch)
    inputs = torch.randn(trials, batch, *shape, generator=generator, dtype=torch.float64)
    if soft:
        return inputs, torch.rand(trials, batch, C, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(C, (trials, batch), generator=generator)


def goals(model, trials, names=None):
    generator = torch.Generator().manual_seed(9)
    names = names or model.parameters
    return {
        name: torch.randn(trials, *model.parameters[name].shape[1:], generator=generator, dtype=torch.float64)
        for name in names
    }


def by_loop(model, plain, inputs, labels, target, batch_norm, reduction="mean"):
    """Return both products from gradients that autograd makes, one trial after the other."""
    plain.train(batch_norm == "train")
    dots, squares = [], []
    for t in range(len(inputs)):
        state = {name: v[min(t, model.draws - 1)].clone() for name, v in (model.parameters | model.buffers).items()}
        weights = [state[name].requires_grad_() for name in target]
        loss = cross_entropy(functional_call(plain, state, (inputs[t],)), labels[t], reduction=reduction)
        found = torch.autograd.grad(loss, weights, create_graph=True)
        dots.append(torch.stack([(g * goal[t]).sum() for g, goal in zip(found, target.values(), strict=True)]))
        squares.append(torch.stack([g.square().sum() for g in found]))
    return torch.stack(dots), torch.stack(squares)


def with_derivatives(computed, wrt):
    """Return the products and the derivatives of a function that weighs every one of them differently."""
    dot, square = computed
    weights = torch.linspace(0.5, 1.5, dot.numel(), dtype=dot.dtype).view_as(dot)
    value = (weights * dot.cos()).sum() + (weights.flip(0, 1) * square.add(0.1).sqrt()).sum()
    return dot, square, *torch.autograd.grad(value, wrt)


def check(model, plain, inputs, labels, target, batch_norm="eval", reduction="mean"):
    wrt = [v.requires_grad_() for v in (inputs, labels) if v.is_floating_point()]
    expected = with_derivatives(by_loop(model, plain, inputs, labels, target, batch_norm, reduction), wrt)
    computed = per_trial_products(model, inputs, labels, target, batch_norm=batch_norm, reduction=reduction)
    for found, wanted in zip(with_derivatives(computed, wrt), expected, strict=True):
        scale = max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11 * scale)


WAYS = {
    "as_chosen": {},
    "gradients": {"prefers_gram": lambda *_: False},
    "columns": {"prefers_gram": lambda *_: False, "has_grouped_kernels": lambda *_: False},
    "gram": {"prefers_gram": lambda *_: True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("trials", "draws"), [(3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", BODIES)
def test_products_and_their_derivatives_are_those_of_autograd(kind, batch, trials, draws, way, monkeypatch):
    for name, choice in WAYS[way].items():
        monkeypatch.setattr(products, name, choice)
    model, plain = classifier(kind, draws)
    check(model, plain, *example(trials, batch), goals(model, trials))


@pytest.mark.parametrize(("trials", "draws"), [(3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize(("kind", "batch"), [("batch_norm", 1), ("batch_norm", 3), ("batch_norm_flat", 3)])
def test_batch_statistics_take_part_in_train_mode(kind, batch, trials, draws):
    model, plain = classifier(kind, draws)
    check(model, plain, *example(trials, batch), goals(model, trials), "train")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["linear", "conv_strided", "conv_few_positions", "batch_norm"])
def test_soft_labels_have_derivatives_too(kind, reduction):
    model, plain = classifier(kind, 1)
    check(model, plain, *example(3, 2, soft=True), goals(model, 3), reduction=reduction)


@pytest.mark.parametrize("kind", ["linear", "conv_strided", "conv_few_positions", "batch_norm"])
def test_a_choice_of_tensors_in_another_order_gets_columns_in_that_order(kind):
    model, plain = classifier(kind, 1)
    names = list(model.parameters)[::-1][1:]
    check(model, plain, *example(2, 2), goals(model, 2, names))


@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 18)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    batch=st.integers(1, 3),
    trials=st.integers(1, 3),
)
def test_any_geometry_of_a_convolution_gives_autograds_products(
    channels, kernel, stride, padding, dilation, groups, size, batch, trials
):
    kernel = tuple(min(k, (n + 2 * p - 1) // dilation + 1) for k, n, p in zip(kernel, size, padding, strict=True))
    wide, narrow = (groups * c for c in channels)
    BODIES["drawn"] = lambda: [
        nn.Conv2d(2, wide, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(wide, narrow, kernel, stride, padding, dilation, groups),
        nn.Tanh(),
    ]
    model, plain = classifier("drawn", 1, (2, *size))
    check(model, plain, *example(trials, batch, (2, *size)), goals(model, trials))


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck_of_a_small_net_passes(way, monkeypatch):
    for name, choice in WAYS[way].items():
        monkeypatch.setattr(products, name, choice)
    model, _ = classifier("conv_few_positions", 1)
    inputs, labels = example(2, 1, soft=True)
    target = goals(model, 2)
    assert torch.autograd.gradcheck(
        lambda x, y: per_trial_products(model, x, y, target),
        (inputs.requires_grad_(), labels.requires_grad_()),
        fast_mode=True,
    )


def test_gram_matrices_serve_large_weights_at_few_positions():
    large, small = torch.zeros(2, 512, 512, 3, 3), torch.zeros(2, 10, 768)
    assert products.prefers_gram(large, 16)
    assert not products.prefers_gram(large, 1024)
    assert not products.prefers_gram(small, 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("net", ["lenet_zhu", "lenet5", "resnet18", "convnet", "mlp"])
def test_products_in_float32_are_those_of_the_gradients(net, batch):
    params = {"width": 24} if net in ("resnet18", "convnet") else {}
    model = build_model(Architecture(name=net, params=params), (3, 16, 16), C, seeds=[0])
    inputs, labels = example(2, batch, (3, 16, 16))
    inputs = inputs.float()
    target = {name: value.float() for name, value in goals(model, 2).items()}
    dot, square = per_trial_products(model, inputs.requires_grad_(), labels, target)
    found = per_trial_gradients(model, inputs, labels).tensors
    pairs = [(found[name].flatten(1), goal.flatten(1)) for name, goal in target.items()]
    wanted = torch.stack([g.square().sum(1) for g, _ in pairs], 1)
    torch.testing.assert_close(square, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))
    size = torch.stack([g.norm(dim=1) * goal.norm(dim=1) for g, goal in pairs], 1)
    assert ((dot - torch.stack([(g * goal).sum(1) for g, goal in pairs], 1)).abs() <= 1e-5 * size + 1e-7).all()


def test_a_trial_does_not_depend_on_its_block():
    model, _ = classifier("conv_strided", 1)
    inputs, labels = example(5, 2)
    target = goals(model, 5)
    whole = per_trial_products(model, inputs, labels, target)
    for t in range(5):
        part = slice(t, t + 1)
        alone = per_trial_products(model, inputs[part], labels[part], {n: v[part] for n, v in target.items()})
        for a, b in zip(alone, whole, strict=True):
            torch.testing.assert_close(a, b[part], rtol=1e-10, atol=1e-13)

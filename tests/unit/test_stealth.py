"""What a client can find out about its model: closed forms, a plain loop for D-SNR, honest and planted nets."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from plain_client import examples, make
from sklearn.datasets import load_digits
from torch.nn import functional as F  # noqa: N812

from leakbench.data import load_dataset
from leakbench.federation.gradients import per_trial_gradients
from leakbench.federation.inputs import to_inputs
from leakbench.metrics import METRICS, headline
from leakbench.metrics.stealth import (
    Thresholds,
    _compared,
    d_snr,
    dead_gradient_share,
    findings,
    head_gradient_rank,
    least_norm_scale,
    logit_spread,
    model_disagreement,
    parameter_distance,
)
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture

ROOT = Path(os.environ.get("LEAKBENCH_DATA") or Path(__file__).parents[3] / "shared" / "data").resolve()
SPECS = {name: spec for name, spec in METRICS.items() if spec.target == "stealth"}


def net(name, shape=(3, 32, 32), draws=1, **params):
    return build_model(Architecture(name=name, params=params), shape, 10, seeds=range(draws))


@cache
def pictures():
    """Digits as 3x32x32 images, standardised; and their classes."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, size=32, mode="bilinear")
    return ((images - 0.3) / 0.4).expand(-1, 3, -1, -1), torch.tensor(data.target)


def batch(size, trials=2, of=pictures):
    images, labels = of()
    pick = torch.randint(len(images), (trials, size), generator=torch.Generator().manual_seed(size))
    return images[pick], labels[pick]


def changed(model, **tensors):
    """Replace parameters; dots in names are written as double underscores."""
    new = {name.replace("__", "."): value for name, value in tensors.items()}
    parameters = {k: torch.as_tensor(v).expand_as(model.parameters[k]) for k, v in new.items()}
    return model.with_state(parameters=parameters)


def test_least_norm_scale_is_the_smallest_of_the_layers_largest_scales():
    model = net("lenet5", batch_norm=True)
    first, second = torch.linspace(-3, 0, 6)[None], torch.linspace(0, 0.25, 16)[None]
    planted = changed(model, body__0__bn0__weight=first, body__0__bn1__weight=second)
    assert least_norm_scale(planted).tolist() == [0.25]
    assert least_norm_scale(changed(planted, body__0__bn0__weight=0.0)).tolist() == [0]
    assert least_norm_scale(net("lenet5")) is None


def test_layers_that_started_zeroed_do_not_count_as_zeroed():
    model = net("timm/resnet10t")
    assert least_norm_scale(model).tolist() == [0]
    assert least_norm_scale(model, model).tolist() == [1]
    assert least_norm_scale(changed(model, bn1__weight=0.0), model).tolist() == [0]


def test_layer_norm_scales_count():
    model = net("timm/vit_tiny_patch16_224", (1, 8, 8), img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2)
    assert least_norm_scale(model).tolist() == [1]
    assert least_norm_scale(changed(model, norm__weight=0.0)).tolist() == [0]


def test_logit_spread_is_the_largest_range_relative_to_the_largest_logit():
    model, (inputs, _) = make("mlp"), examples(make("mlp"), 4)
    logits = model.logits(inputs)
    expected = [float((z.max(0).values - z.min(0).values).max() / z.abs().max()) for z in logits]
    torch.testing.assert_close(logit_spread(model, inputs), torch.tensor(expected, dtype=torch.float64))
    head = {k: 5 * model.parameters[k] for k in ("fc.weight", "fc.bias")}
    torch.testing.assert_close(logit_spread(model.with_state(parameters=head), inputs), logit_spread(model, inputs))


def test_logit_spread_of_equal_inputs_is_none_and_of_a_single_one_undefined():
    model, (inputs, _) = make("mlp"), examples(make("mlp"), 1)
    assert (logit_spread(model, inputs.expand(-1, 6, -1, -1, -1)) < 1e-14).all()
    assert logit_spread(model, inputs) is None


def test_dead_gradient_share_counts_parameters_of_tensors_without_any_gradient():
    gradients = {"a": torch.zeros(2, 3), "b": torch.ones(2, 1), "c": torch.zeros(2, 2, 2)}
    gradients["c"][1, 0, 1] = 1e-30
    assert dead_gradient_share(gradients).tolist() == [7 / 8, 3 / 8]


@pytest.mark.parametrize("rank", [0, 1, 2, 7, 10])
def test_rank_of_a_float32_gradient_is_that_of_its_factors(rank):
    stream = torch.Generator().manual_seed(rank)
    weight = torch.randn(5, 10, rank, generator=stream) @ torch.randn(5, rank, 300, generator=stream)
    for scale in (1e-20, 1.0, 1e10):
        assert head_gradient_rank({"fc.weight": scale * weight}, "fc").tolist() == [rank] * 5


def test_rank_of_a_gradient_that_is_not_finite_is_zero():
    assert head_gradient_rank({"fc.weight": torch.full((1, 3, 4), torch.nan)}, "fc").tolist() == [0]


def plain_d_snr(model, inputs, labels, train=False):
    """D-SNR of one trial by a loop over examples; with ``train``, BatchNorm normalises with given statistics."""
    state = {k: v[0].detach().clone() for k, v in (model.parameters | model.buffers).items()}
    if train:
        layers = {n: m for n, m in model.module.named_modules() if f"{n}.running_mean" in state}
        seen = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, n=name: seen.__setitem__(n, args[0]))
            for name, layer in layers.items()
        ]
        with torch.no_grad():  # without vmap
            model.logits(inputs[None], batch_norm="train")
        for hook in hooks:
            hook.remove()
        for name, x in seen.items():
            x = x.transpose(0, 1).flatten(1)
            state |= {f"{name}.running_mean": x.mean(1), f"{name}.running_var": x.var(1)}
    names = [n for n, v in state.items() if v.dim() > 1 and n.endswith("weight")]
    norms = []
    for x, y in zip(inputs, labels, strict=True):
        own = {n: state[n].clone().requires_grad_() for n in names}
        loss = F.cross_entropy(model.call(state | own, x[None], train=False)[0], y[None])
        norms.append([g.norm() for g in torch.autograd.grad(loss, list(own.values()))])
    by_layer = torch.tensor(norms).T.double()
    return max(float(n.max() / (n.sum() - n.max() + 1e-6)) for n in by_layer)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("name", "params"),
    [("mlp", {}), ("lenet5", {"batch_norm": True}), ("resnet20", {"width": 4}), ("timm/resnet14t", {})],
)
def test_d_snr_equals_a_plain_loop_over_examples(name, params, mode):
    model, (inputs, labels) = net(name, **params), batch(5)
    found = d_snr(model, inputs, labels, mode)
    train = mode == "train" and model.has_batch_norm
    expected = [plain_d_snr(model, x, y, train) for x, y in zip(inputs, labels, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [2, 3, 9])
def test_d_snr_of_equal_examples_is_one_over_the_others(size):
    model, (inputs, labels) = make("lenet_zhu"), examples(make("lenet_zhu"), 1)
    found = d_snr(model, inputs.expand(-1, size, -1, -1, -1), labels.expand(-1, size))
    torch.testing.assert_close(found, torch.full((3,), 1 / (size - 1), dtype=torch.float64), rtol=1e-4, atol=0)


def test_d_snr_is_large_where_one_example_alone_has_a_gradient():
    model, (inputs, labels) = net("mlp", width=30), batch(8)
    fitted = model.with_state(parameters={"fc.bias": F.one_hot(torch.tensor([3]), 10) * 60.0})
    labels = torch.full_like(labels, 3)
    labels[:, 5] = 4
    assert (d_snr(fitted, inputs, labels) > 1e4).all()
    assert (d_snr(model, inputs, labels) < 1).all()


def test_parameter_distance_is_relative_to_the_model_before():
    model = make("lenet_zhu", draws=3)
    assert parameter_distance(model, model).tolist() == [0, 0, 0]
    grown = model.with_state(parameters={k: 1.5 * v for k, v in model.parameters.items()})
    torch.testing.assert_close(parameter_distance(grown, model), torch.full((3,), 0.5, dtype=torch.float64))
    zero = model.with_state(parameters={k: 0 * v for k, v in model.parameters.items()})
    assert parameter_distance(model, zero).isfinite().all()


def test_model_disagreement_counts_further_models():
    assert model_disagreement(["a"]) is None
    assert [model_disagreement(list(text)) for text in ("aaaa", "aaab", "abcd")] == [0, 1 / 3, 1]


@pytest.mark.parametrize("draws", [1, 3])
def test_every_metric_is_found_and_a_trial_stands_alone(draws):
    model = net("lenet5", batch_norm=True, draws=draws).to(dtype=torch.float64)
    inputs, labels = batch(4, 3)
    inputs = inputs.double()
    previous = model.with_state(parameters={k: 0.9 * v for k, v in model.parameters.items()})
    found = findings(model, previous, inputs, labels, digests=("a", "b"), batch_norm="train")
    assert set(found) == set(SPECS)
    for t in range(3):
        weights, before = model.trials(t, t + 1), previous.trials(t, t + 1)
        alone = findings(weights, before, inputs[t : t + 1], labels[t : t + 1], digests=("a", "b"), batch_norm="train")
        for name, value in found.items():
            assert value.shape == (3,)
            assert value.dtype == torch.float64
            torch.testing.assert_close(value[t : t + 1], alone[name])


def test_what_a_task_does_not_have_is_left_out():
    found = findings(net("mlp"), net("mlp"), *batch(1))
    assert set(SPECS) - set(found) == {"least_norm_scale", "logit_spread", "d_snr", "model_disagreement"}
    assert "d_snr" not in findings(net("mlp"), net("mlp"), *batch(2), with_d_snr=False)


def test_specs_say_what_less_visible_means():
    assert headline("stealth").name == "detected"
    assert {spec.reference for spec in SPECS.values()} == {f"{name}_honest" for name in SPECS}
    assert {n for n, s in SPECS.items() if s.higher_is_better} == {
        "least_norm_scale",
        "logit_spread",
        "head_gradient_rank",
    }


HONEST = [
    ("mlp", {}),
    ("lenet_zhu", {}),
    ("lenet5", {}),
    ("lenet5", {"batch_norm": True}),
    ("resnet18", {"width": 8}),
    ("resnet20", {"width": 4}),
    ("convnet", {"width": 4}),
]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("name", "params"), HONEST)
def test_untrained_honest_models_are_not_refused(name, params, mode):
    model = net(name, **params)
    for size in (2, 8, 64):
        inputs, labels = batch(size, 1)
        for y in (labels, labels[:, :1].expand_as(labels)):
            found = findings(model, model, inputs, y, batch_norm=mode, with_d_snr=False)
            assert found["detected"].tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [11, 16, 19])
def test_untrained_vggs_are_not_refused(depth):
    model = net("vgg", depth=depth)
    for mode in ("eval", "train"):
        assert findings(model, model, *batch(3, 1), batch_norm=mode, with_d_snr=False)["detected"].tolist() == [0]


def test_nets_that_start_without_gradients_are_not_refused():
    model = net("timm/resnet10t")
    found = findings(model, model, *batch(2, 1), with_d_snr=False)
    assert found["dead_gradient_share"] > 0.9
    assert found["detected"].tolist() == [0]


def trained(model, images, labels, steps):
    """Fit all parameters with AdamW, BatchNorm in train mode."""
    parameters = {k: v[0].clone().requires_grad_() for k, v in model.parameters.items()}
    buffers = {k: v[0] for k, v in model.buffers.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    stream = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pick = torch.randint(len(images), (32,), generator=stream)
        logits, _, after = model.call(parameters | buffers, images[pick], train=True)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[pick]).backward()
        optimizer.step()
        buffers = {k: v.detach() for k, v in after.items()}
    return model.with_state(
        {k: v.detach()[None] for k, v in parameters.items()}, {k: v[None] for k, v in buffers.items()}
    )


@pytest.mark.parametrize(("name", "params"), [("mlp", {}), ("lenet5", {"batch_norm": True})])
def test_models_that_fit_the_batch_by_heart_are_not_refused(name, params, one_thread):
    images, labels = pictures()
    start = net(name, **params)
    model = trained(start, images[:200], labels[:200], 80)
    inputs, y = batch(32, 4, lambda: (images[:200], labels[:200]))
    assert (model.logits(inputs).argmax(2) == y).double().mean() > 0.95
    for size in (2, 32):
        for mode in ("eval", "train"):
            found = findings(model, start, inputs[:, :size], y[:, :size], batch_norm=mode)
            assert found["detected"].tolist() == [0] * 4


@pytest.fixture
def cifar10(monkeypatch):
    if not (ROOT / "uoft-cs" / "cifar10").is_dir():
        pytest.skip("no uoft-cs/cifar10 in LEAKBENCH_DATA or in shared/data beside the checkout")
    monkeypatch.setenv("LEAKBENCH_DATA", str(ROOT))
    data = load_dataset("cifar10")
    rows = data.splits["private"][:256]
    return to_inputs(data.images[rows], data.input_spec, True), torch.tensor(data.labels[rows])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), [("lenet5", {"batch_norm": True}), ("resnet18", {"width": 16})])
def test_honest_models_on_cifar_are_not_refused(name, params, cifar10, one_thread):
    start = net(name, **params)
    for model in (start, trained(start, *cifar10, 100)):
        for size in (2, 16, 64):
            inputs, labels = batch(size, 2, lambda: cifar10)
            for mode in ("eval", "train"):
                assert findings(model, start, inputs, labels, batch_norm=mode)["detected"].tolist() == [0, 0]


VGG_LAST = "body.0.26"


def zeroed(model, layer, shift=0.5):
    stream = torch.Generator().manual_seed(1)
    bias = shift + torch.rand(model.parameters[f"{layer}.bias"].shape, generator=stream)
    return model.with_state(parameters={f"{layer}.weight": torch.zeros_like(bias), f"{layer}.bias": bias})


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("name", "params", "layer"),
    [
        ("lenet5", {"batch_norm": True}, "body.0.bn1"),
        ("resnet18", {"width": 8}, "body.1"),
        pytest.param("vgg", {"depth": 11}, VGG_LAST, marks=pytest.mark.slow),
    ],
)
def test_a_zeroed_batch_norm_shows_in_scale_logits_and_gradients(name, params, layer, mode):
    model = net(name, **params)
    found = findings(zeroed(model, layer), model, *batch(6), batch_norm=mode, with_d_snr=False)
    assert found["detected"].tolist() == [1, 1]
    assert found["least_norm_scale"].tolist() == [0, 0]
    assert (found["logit_spread"] < Thresholds().logit_spread).all()
    assert (found["dead_gradient_share"] > 0).all()
    assert found["head_gradient_rank"].tolist() == [1, 1]
    honest = findings(model, model, *batch(6), batch_norm=mode, with_d_snr=False)
    assert (honest["logit_spread"] > found["logit_spread"]).all()


@pytest.mark.parametrize("odd_before", [False, True])
def test_what_is_known_of_the_model_before_need_not_be_computed_again(odd_before, monkeypatch):
    model, (inputs, labels) = net("lenet5", batch_norm=True), batch(6)
    planted = zeroed(model, "body.0.bn1")
    previous = planted if odd_before else model
    known = findings(previous, previous, inputs, labels)
    expected = findings(planted, previous, inputs, labels)
    looked = []
    monkeypatch.setattr("leakbench.metrics.stealth._compared", lambda *a: looked.append(a) or _compared(*a))
    found = findings(planted, previous, inputs, labels, before=known)
    assert len(looked) == 1
    assert found["detected"].tolist() == [not odd_before] * 2
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize(("scale", "refused"), [(1e-2, True), (5e-2, False)])
def test_a_small_scale_passes_above_the_limit_though_it_shows(scale, refused):
    model = net("lenet5", batch_norm=True)
    planted = changed(zeroed(model, "body.0.bn1"), body__0__bn1__weight=scale)
    found = findings(planted, model, *batch(6))
    assert found["detected"].tolist() == [refused] * 2
    torch.testing.assert_close(found["least_norm_scale"], torch.tensor([scale] * 2).double(), rtol=1e-6, atol=0)
    assert findings(planted, planted, *batch(6))["detected"].tolist() == [0, 0]


def test_a_dead_layer_is_refused_for_its_gradients():
    model = net("mlp")
    dead = changed(model, body__linear1__weight=0.0, body__linear1__bias=-1.0)
    gradients = per_trial_gradients(dead, *batch(4)).tensors
    assert [name for name, value in gradients.items() if bool(value.any())] == ["fc.bias"]
    found = findings(dead, model, *batch(4))
    assert found["head_gradient_rank"].tolist() == [0, 0]
    assert (found["dead_gradient_share"] > 0.99).all()
    assert found["detected"].tolist() == [1, 1]


def test_each_check_refuses_alone():
    model, harmless = net("mlp"), {"dead_gradient_share": 1.0, "head_gradient_rank": 0.0, "logit_spread": 0.0}
    dead = changed(model, body__linear1__weight=0.0, body__linear1__bias=-1.0)
    defaults = vars(Thresholds())
    for name in (None, *harmless):
        limits = {k: v for k, v in harmless.items() if k != name}
        found = findings(dead, model, *batch(4), thresholds=Thresholds(**(defaults | limits)))
        assert found["detected"].tolist() == [float(name is not None)] * 2
    far = changed(model, fc__weight=100.0)
    assert findings(far, model, *batch(4))["detected"].tolist() == [1, 1]
    assert findings(model, model, *batch(2), thresholds=Thresholds(d_snr=0.1))["detected"].tolist() == [1, 1]


def test_weights_that_are_not_finite_are_refused_and_leave_finite_numbers():
    model = net("lenet5", batch_norm=True)
    for value in (torch.nan, torch.inf):
        broken = changed(model, fc__weight=value, body__0__bn0__weight=value)
        found = findings(broken, model, *batch(4))
        assert found["detected"].tolist() == [1, 1]
        assert all(v.isfinite().all() for v in found.values())

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from leakbench.errors import LeakbenchError, UserError
from leakbench.federation.gradients import per_trial_gradients
from leakbench.models.batch_norm import explicit_batch_norm
from leakbench.models.catalogue import ARCHITECTURES, architecture_spec
from leakbench.models.functional import build_model
from leakbench.models.small import convnet
from leakbench.tasks import Architecture

SHAPES = {"lenet5": (1, 12, 12), "convnet": (1, 9, 9), "vgg": (3, 32, 32)}
PARAMETERS = {  # counted by hand from the papers' tables for the usual input and 10 classes
    ("lenet_zhu", (3, 32, 32), 100): 3 * 300 + 12 + 2 * (3600 + 12) + 768 * 100 + 100,
    ("lenet5", (1, 28, 28), 10): 61706,
    ("resnet20", (3, 32, 32), 10): 269722 + 512 + 64 + 2048 + 128,  # with identity shortcuts, and two projections
    ("resnet18", (3, 32, 32), 10): 11173962,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, seeds=(0,), init="default", classes=5, **params):
    shape = SHAPES.get(name, (1, 8, 8))
    return build_model(Architecture(name=name, init=init, params=params), shape, classes, seeds=seeds)


@pytest.mark.parametrize(("name", "shape", "classes"), PARAMETERS)
def test_the_nets_are_those_of_the_papers(name, shape, classes):
    model = build_model(Architecture(name=name), shape, classes, seeds=[0])
    assert sum(v.numel() for v in model.parameters.values()) == PARAMETERS[name, shape, classes]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_catalogue_says_is_true(name):
    model = build(name)
    inputs = torch.randn(2, 3, *model.input_shape)
    assert model.logits(inputs).shape == (2, 3, 5)
    assert model.has_batch_norm == architecture_spec(name).batch_norm
    assert (model.features(inputs).min() >= 0) == architecture_spec(name).nonnegative_features
    assert model.head == "fc"
    assert model.has_head_bias
    head = model.features(inputs) @ model.parameters["fc.weight"][0].T + model.parameters["fc.bias"][0]
    torch.testing.assert_close(model.logits(inputs), head)


@pytest.mark.parametrize("name", ["mlp", "lenet_zhu", "lenet5"])
@pytest.mark.parametrize("activation", ["elu", "leaky_relu", "relu", "selu", "sigmoid", "silu", "softplus", "tanh"])
def test_features_are_nonnegative_where_the_catalogue_says_so(name, activation):
    model = build(name, activation=activation)
    inputs = 3 * torch.randn(2, 3, *model.input_shape)
    assert (model.features(inputs).min() >= 0) == model.nonnegative_features


def test_a_net_without_hidden_layers_has_the_features_of_its_inputs():
    model = build("mlp", depth=0)
    inputs = torch.randn(2, 3, *model.input_shape)
    torch.testing.assert_close(model.features(inputs), inputs.flatten(2))
    assert model.nonnegative_features is False


@pytest.mark.parametrize("name", ["mlp", "lenet5"])
def test_batch_norm_is_optional_and_comes_before_the_activation(name):
    assert not build(name).has_batch_norm
    model = build(name, batch_norm=True)
    kinds = [type(layer).__name__ for layer in model.module.modules() if not isinstance(layer, nn.Sequential)]
    places = [i for i, kind in enumerate(kinds) if kind == "ExplicitBatchNorm"]
    assert len(places) == 2
    assert all(kinds[i - 1] in ("Linear", "Conv2d") and kinds[i + 1] == "ReLU" for i in places)


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_vgg_has_as_many_weight_layers_as_its_name_says(depth, convolutions):
    model = build("vgg", depth=depth)
    weights = [v for name, v in model.parameters.items() if name.endswith("weight")]
    assert sum(v.dim() == 5 for v in weights) == convolutions
    assert sum(v.dim() == 3 for v in weights) == depth - convolutions


@pytest.mark.parametrize("init", ["default", "uniform(0.5)"])
def test_a_seed_fixes_the_weights_and_nothing_global_changes(init):
    before = torch.get_rng_state()
    first, again = build("convnet", [3, 4, 3], init, width=2), build("convnet", [3], init, width=2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.parameters.items():
        assert torch.equal(value[0], value[2])
        assert torch.equal(value[0], again.parameters[name][0])
    assert not torch.equal(first.parameters["fc.weight"][0], first.parameters["fc.weight"][1])


def test_threads_do_not_disturb_each_other():
    expected = [build("mlp", [i]).parameters["fc.weight"] for i in range(8)]
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: build("mlp", [i]).parameters["fc.weight"]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(8))


def test_uniform_init_covers_weights_and_biases():
    model = build("lenet_zhu", [0], "uniform(0.5)")
    for value in model.parameters.values():
        assert value.abs().max() <= 0.5
    assert model.parameters["fc.weight"].abs().max() > 0.49
    assert model.parameters["fc.bias"].abs().max() > 0.1


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("draws", [1, 3])
def test_logits_and_statistics_equal_those_of_pytorch_layers(draws, batch_norm):
    model = build("convnet", range(draws), width=2).to(dtype=torch.float64)
    inputs = torch.randn(3, 4, *model.input_shape, dtype=torch.float64)
    logits, buffers = model.logits_and_buffers(inputs, batch_norm=batch_norm)
    before = {k: v.clone() for k, v in model.buffers.items()}
    for t in range(3):
        net = convnet(model.input_shape, 5, width=2).to(torch.float64).train(batch_norm == "train")
        state = model.trials(t, t + 1) if draws > 1 else model
        net.load_state_dict({k: v[0] for k, v in (state.parameters | state.buffers).items()})
        torch.testing.assert_close(logits[t], net(inputs[t]))
        for name, value in net.named_buffers():
            if batch_norm == "train":
                torch.testing.assert_close(buffers[name][t], value)
    assert bool(buffers) == (batch_norm == "train")
    assert all(torch.equal(model.buffers[k], v) for k, v in before.items())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_cumulative_and_exponential_statistics_equal_pytorchs(momentum):
    inputs = torch.randn(4, 6, 3, dtype=torch.float64)
    theirs = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64))
    ours = explicit_batch_norm(nn.Sequential(nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)))
    for batch in inputs:
        torch.testing.assert_close(ours(batch), theirs(batch))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_state_makes_the_round_trip():
    model = build("resnet20", [1, 2], width=2)
    tensors = model.tensors()
    again = build_model(model.architecture, model.input_shape, 5, state=tensors)
    assert again.draws == 2
    inputs = torch.randn(2, 3, *model.input_shape)
    assert torch.equal(again.logits(inputs), model.logits(inputs))
    with pytest.raises(UserError, match=r"parameter 'fc\.weight' is expected with shape \(5, 8\)"):
        build_model(
            model.architecture, model.input_shape, 5, state={k: v for k, v in tensors.items() if "fc.weight" not in k}
        )


def test_with_state_replaces_some_tensors_and_expands_the_others():
    model = build("mlp")
    planted = model.with_state({"fc.bias": torch.ones(3, 5)})
    assert (model.draws, planted.draws) == (1, 3)
    assert torch.equal(planted.parameters["fc.weight"][2], model.parameters["fc.weight"][0])
    inputs = torch.randn(3, 2, *model.input_shape)
    added = (1 - model.parameters["fc.bias"]).expand(2, 5)
    torch.testing.assert_close(planted.logits(inputs), model.logits(inputs) + added)
    for wrong in ({"fc.bais": torch.ones(1, 5)}, {"fc.bias": torch.ones(1, 6)}):
        with pytest.raises(LeakbenchError):
            model.with_state(wrong)


@pytest.mark.parametrize(
    ("name", "shape", "params", "message"),
    [
        ("lenet_zu", (1, 8, 8), {}, "unknown architecture 'lenet_zu'. Did you mean 'lenet_zhu'"),
        ("lenet5", (1, 8, 8), {}, "architecture 'lenet5' with params {} cannot be built for inputs 1x8x8"),
        ("convnet", (1, 8, 8), {}, "architecture 'convnet' with params {} cannot be built for inputs 1x8x8"),
        ("mlp", (1, 8, 8), {"widht": 3}, "widht"),
        ("torchvision/resnet81", (3, 32, 32), {}, "unknown torchvision architecture 'resnet81'. Did you mean"),
        ("torchvision/resnet18", (1, 32, 32), {}, "cannot take inputs 1x32x32"),
    ],
)
def test_an_impossible_net_is_one_clear_line(name, shape, params, message):
    with pytest.raises(UserError) as caught:
        build_model(Architecture(name=name, params=params), shape, 10, seeds=[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params"),
    [("torchvision/resnet18", {}), ("timm/mobilenetv3_small_050", {}), ("timm/vit_tiny_patch16_224", {"img_size": 32})],
)
def test_classifiers_of_the_zoos_work_for_all_trials_at_once(name, params):
    model = build_model(Architecture(name=name, params=params), (3, 32, 32), 7, seeds=[0]).to(dtype=torch.float64)
    inputs, labels = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64), torch.tensor([[0, 6], [3, 3]])
    for batch_norm in ("eval", "train"):
        both = per_trial_gradients(model, inputs, labels, batch_norm=batch_norm)
        head = per_trial_gradients(model, inputs, labels, names=[f"{model.head}.weight"], batch_norm=batch_norm)
        for t in range(2):
            parameters = {k: v[0].requires_grad_() for k, v in model.parameters.items()}
            state = parameters | {k: v[0] for k, v in model.buffers.items()}
            logits, _, _ = model.call(state, inputs[t], train=batch_norm == "train")
            loss = nn.functional.cross_entropy(logits, labels[t])
            expected = torch.autograd.grad(loss, list(parameters.values()))
            for k, value in zip(parameters, expected, strict=True):
                torch.testing.assert_close(both.tensors[k][t], value, rtol=1e-7, atol=1e-9)
            k = f"{model.head}.weight"
            torch.testing.assert_close(head.tensors[k][t], both.tensors[k][t], rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_attention_can_be_differentiated_twice():
    params = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 12}
    architecture = Architecture(name="timm/vit_tiny_patch16_224", params=params)
    model = build_model(architecture, (3, 8, 8), 7, seeds=[0, 1])
    inputs = torch.randn(2, 2, 3, 8, 8, requires_grad=True)
    tensors = per_trial_gradients(model, inputs, torch.tensor([[0, 6], [3, 3]]), create_graph=True).tensors
    (second,) = torch.autograd.grad(sum(v.square().sum() for v in tensors.values()), [inputs])
    assert second.isfinite().all()
    assert second.abs().max() > 0


def test_the_catalogue_imports_no_torch():
    code = (
        "import sys, leakbench.models.catalogue as c; c.architecture_spec('timm/x'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Modules in front of a net: the identity until something is planted, and gradients that tell inputs apart."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.federation.gradients import per_trial_gradients
from leakbench.models.batch_norm import ExplicitBatchNorm
from leakbench.models.build import build_module
from leakbench.models.functional import build_model
from leakbench.models.imprint import IMPRINTS, insert
from leakbench.tasks import Architecture

SHAPE = (3, 32, 32)
NETS = {
    "lenet5": Architecture(name="lenet5", params={"batch_norm": True}),
    "torchvision": Architecture(name="torchvision/shufflenet_v2_x0_5"),
    "timm": Architecture(
        name="timm/vit_tiny_patch16_224",
        params={"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    ),
}
PARAMS = {
    "imprint_linear": {"bins": 6},
    "sparse": {"bins": 6, "sparse": True, "gain": 0.5},
    "imprint_conv": {"bins": 6, "clients": 2},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def imprinted(net, kind="imprint_linear", draws=1, planted=0.01):
    """Return a float64 model with ``kind`` in front, its tensors random of size ``planted``, and what builds it."""
    name = kind if kind in IMPRINTS else "imprint_linear"

    def transform(module):
        return insert(module, name, SHAPE, PARAMS[kind])

    model = build_model(NETS[net], SHAPE, 10, seeds=range(draws), transform=transform).to(dtype=torch.float64)
    stream = torch.Generator().manual_seed(7)
    own = {n: v for n, v in model.parameters.items() if n.startswith("imprint.")}
    values = {n: planted * torch.randn(v.shape, generator=stream, dtype=torch.float64) for n, v in own.items()}
    values["imprint.bias"] += 20 * planted  # most rows are active, and within their clamp
    return model.with_state(parameters=values), transform


def batch(trials=2, size=3):
    stream = torch.Generator().manual_seed(1)
    images = torch.rand(trials, size, *SHAPE, generator=stream, dtype=torch.float64)
    return images, torch.randint(0, 10, (trials, size), generator=stream)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("net", NETS)
def test_before_planting_a_module_changes_nothing(net, kind, mode):
    images, _ = batch()
    model, _ = imprinted(net, kind, planted=0.0)
    honest = build_model(NETS[net], SHAPE, 10, seeds=[0]).to(dtype=torch.float64)
    assert [n for n in model.parameters if not n.startswith("imprint.")] == list(honest.parameters)
    assert all(torch.equal(model.parameters[n], v) for n, v in honest.parameters.items())
    assert model.head == honest.head
    assert model.head_is_last == honest.head_is_last
    logits = model.logits(images, batch_norm=mode)
    torch.testing.assert_close(logits, honest.logits(images, batch_norm=mode))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize(
    ("net", "kind"),
    [
        ("lenet5", "imprint_linear"),
        ("lenet5", "sparse"),
        ("lenet5", "imprint_conv"),
        ("torchvision", "imprint_linear"),
        ("timm", "imprint_conv"),
    ],
)
def test_gradients_of_planted_models_are_those_of_plain_autograd(net, kind, draws, mode):
    images, labels = batch()
    model, transform = imprinted(net, kind, draws)
    gradients = per_trial_gradients(model, images, labels, batch_norm=mode).tensors
    for t in range(2):
        module = build_module(NETS[net], SHAPE, 10, transform).double()
        own = t if draws > 1 else 0
        module.load_state_dict({n: v[own] for n, v in {**model.parameters, **model.buffers}.items()})
        for layer in module.modules():
            if isinstance(layer, ExplicitBatchNorm):
                layer.training = mode == "train"
        named = dict(module.requires_grad_(True).named_parameters())
        plain = torch.autograd.grad(F.cross_entropy(module(images[t]), labels[t]), list(named.values()))
        for name, value in zip(named, plain, strict=True):
            torch.testing.assert_close(gradients[name][t], value, rtol=1e-6, atol=1e-12)
        assert gradients["imprint.weight"][t].abs().max() > 1e-9


def test_rows_differ_by_which_examples_move_them_and_by_nothing_else():
    images, labels = batch(1, 3)
    model, _ = imprinted("lenet5", planted=0.0)
    heights = images.flatten(2).mean(2)
    ranked = heights[0].sort().values
    edges = torch.cat([ranked[:1] - 1, (ranked[:-1] + ranked[1:]) / 2, ranked[-1:] + 1, ranked[-1:] + 2])
    planted = {
        "imprint.weight": torch.full((1, 6, 3072), 1 / 3072, dtype=torch.float64),
        "imprint.bias": -torch.cat([edges, edges[-1:]])[None],
        "imprint.out": torch.full((1, 6), 0.1, dtype=torch.float64),
    }
    found = per_trial_gradients(model.with_state(parameters=planted), images, labels).tensors
    weight, bias = found["imprint.weight"][0], found["imprint.bias"][0]
    order = heights[0].argsort()
    for j in range(3):
        single = (weight[j] - weight[j + 1]) / (bias[j] - bias[j + 1])
        torch.testing.assert_close(single, images[0, order[j]].flatten())
    assert not weight[3:].any()


def test_a_clamped_row_is_moved_by_what_lies_within_it_alone():
    images, labels = batch(1, 3)
    model, _ = imprinted("lenet5", "sparse", planted=0.0)
    low, middle, high = images[0].flatten(1).mean(1).sort().values
    width = (high - low) / 4
    slope = 0.5 / width  # the row runs from 0 to gain = 0.5 while the mean rises by width
    weight, bias = torch.zeros(1, 6, 3072, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    weight[0, 0], bias[0, 0] = slope / 3072, -slope * (middle - width / 2)
    planted = {"imprint.weight": weight, "imprint.bias": bias, "imprint.out": torch.ones_like(bias)}
    found = per_trial_gradients(model.with_state(parameters=planted), images, labels).tensors
    single = found["imprint.weight"][0, 0] / found["imprint.bias"][0, 0]
    torch.testing.assert_close(single, images[0, images[0].flatten(1).mean(1).argsort()[1]].flatten())


def test_a_client_moves_the_columns_of_its_own_kernels_alone():
    images, labels = batch(1, 3)
    model, _ = imprinted("lenet5", "imprint_conv")
    kernel = torch.zeros(1, 6, 3, dtype=torch.float64)
    kernel[0, 3:] = torch.eye(3)
    planted = {"imprint.kernel": kernel, "imprint.offset": torch.zeros(1, 6, dtype=torch.float64)}
    weight = per_trial_gradients(model.with_state(parameters=planted), images, labels).tensors["imprint.weight"][0]
    assert not weight[:, :3072].any()
    assert weight[:, 3072:].any()


def test_a_module_with_as_many_rows_as_classes_is_not_taken_for_the_head():
    model = build_model(
        NETS["lenet5"], SHAPE, 10, seeds=[0], transform=lambda m: insert(m, "imprint_linear", SHAPE, {"bins": 10})
    )
    assert model.head == "fc"


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("imprint_linaer", {"bins": 4}, "Did you mean 'imprint_linear'"),
        ("imprint_linear", {}, "missing a required argument: 'bins'; it takes bins, sparse, gain"),
        ("imprint_linear", {"bins": 4, "rows": 3}, "unexpected keyword argument 'rows'"),
        ("imprint_linear", {"bins": 0}, "expected a positive integer bins, got 0"),
        ("imprint_conv", {"bins": 4, "clients": 2.0}, "expected a positive integer clients, got 2.0"),
    ],
)
def test_errors_say_what_to_type(name, params, message):
    with pytest.raises(UserError, match=message) as error:
        insert(build_module(NETS["lenet5"], SHAPE, 10), name, SHAPE, params)
    assert "\n" not in str(error.value)


def test_convolutions_need_images():
    with pytest.raises(UserError, match="use imprint_linear"):
        insert(torch.nn.Linear(5, 2), "imprint_conv", (5,), {"bins": 4, "clients": 2})

"""Soteria against scores by a loop of autograd over the released formula; what drop_layer makes of it."""

from __future__ import annotations

import pytest
import torch
from inversion_blocks import observe, psnr
from label_blocks import digits_block
from leakbench_baselines.attacks.drop_layer import DropLayer
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.defenses.soteria import Soteria
from torch.func import functional_call

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext
from leakbench.federation.client import Client
from leakbench.tasks import Protocol

BATCH = 3
NETS = {"lenet_zhu": ("fc", {}), "mlp": ("body.linear1", {"width": 20, "depth": 2})}


def send(block, defense=None, **protocol):
    chain = DefenseChain([defense] if defense else [])
    client = Client(Protocol(precision="float64", **protocol), BATCH, chain)
    return client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])


def features_of(block, trial, layer, x):
    """Return what ``layer`` takes for one input."""
    seen = []
    hook = block.model.module.get_submodule(layer).register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
    functional_call(block.model.module, {n: v[trial] for n, v in block.model.parameters.items()}, (x[None],))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("p", [1, 37.5, 60, 100])
def test_t10_the_columns_of_lowest_score_are_zero_and_nothing_else_changes(net, p):
    layer, params = NETS[net]
    block = digits_block(BATCH, architecture=net, trials=2, **params)
    clean, sent = send(block), send(block, Soteria(p=p, layer=layer))
    name = f"{layer}.weight"
    for trial in range(2):
        score = 0
        for x in block.inputs[trial]:
            jacobian = torch.func.jacrev(lambda x, t=trial: features_of(block, t, layer, x))(x).flatten(1)
            score = score + jacobian.norm(dim=1) / (features_of(block, trial, layer, x).abs() + 0.1)
        count = int(p / 100 * len(score))
        masked = torch.zeros(len(score), dtype=torch.bool)
        masked[score.argsort(stable=True)[:count]] = True
        assert (sent[name][trial] == 0).all(0)[masked].all()
        assert torch.equal(sent[name][trial][:, ~masked], clean[name][trial][:, ~masked])
        if net == "lenet_zhu":  # behind a ReLU some columns are 0 anyway
            assert (sent[name][trial] == 0).all(0).sum() == count
    for other in clean.keys() - {name}:
        assert torch.equal(sent[other], clean[other])


def test_t10_percentage_zero_is_the_identity():
    block = digits_block(BATCH)
    clean, sent = send(block), send(block, Soteria(p=0))
    assert all(torch.equal(sent[name], value) for name, value in clean.items())


def test_the_first_layer_that_takes_a_vector_is_defended():
    assert Soteria().defended(digits_block(1).model) == "fc"
    block = digits_block(1, architecture="mlp", width=20, depth=2)
    assert Soteria().defended(block.model) == "body.linear0"
    with pytest.raises(UserError, match=r"body\.linear0, body\.linear1, fc.*got 'conv9'"):
        Soteria(layer="conv9").defended(block.model)


def test_every_local_step_is_defended():
    block = digits_block(BATCH)
    sent = send(block, Soteria(p=100), sends="delta", local_steps=3, batches="same")
    assert (sent["fc.weight"] == 0).all()
    assert (sent["fc.bias"] != 0).any()


def test_a_signed_feature_near_zero_does_not_hide_a_column():
    # With signed ratios a feature of -stabiliser + tiny would have any score; magnitudes keep it finite.
    block = digits_block(BATCH, architecture="mlp", width=20, depth=1)
    inputs = block.inputs.clone()
    inputs[:, :, 0, 0, 0] = -0.1
    ctx = DefenseContext(
        model=block.model,
        inputs=inputs,
        labels=block.labels,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=0.1,
        random=block.knowledge["random"],
    )
    scores = Soteria().scores(ctx, "body.linear0")
    torch.testing.assert_close(scores, (1 / (inputs.flatten(2).abs() + 0.1)).sum(1))


@pytest.mark.parametrize("arguments", [{"p": -1}, {"p": 101}, {"stabiliser": 0.0}])
def test_bad_parameters_are_named(arguments):
    with pytest.raises(UserError, match=f"soteria: {next(iter(arguments))}"):
        Soteria(**arguments)


# --- its bypass -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recovered():
    """PSNR of attacks on the same trials, by (attack, defense)."""
    found = {}
    for p in (0, 90):
        seen, inputs, _ = observe(trials=2, own_models=True, defense=Soteria(p=p), budget=80)
        for attack in (InvertingGradients(), DropLayer(), DropLayer(leave_out="tensor")):
            name = (type(attack).__name__, getattr(attack, "leave_out", None), p)
            found[name] = psnr(attack.run(seen).inputs, inputs)
    return found


def test_drop_layer_recovers_what_soteria_hides_from_plain_inversion(recovered):
    plain, bypass = recovered["InvertingGradients", None, 90], recovered["DropLayer", "columns", 90]
    assert bypass.mean() > plain.mean() + 20
    assert bypass.mean() > recovered["InvertingGradients", None, 0].mean() - 3


def test_leaving_out_the_whole_layer_works_too(recovered):
    assert recovered["DropLayer", "tensor", 90].mean() > recovered["InvertingGradients", None, 90].mean() + 20


def test_without_a_mask_nothing_is_left_out(recovered):
    for kind in ("columns", "tensor"):
        torch.testing.assert_close(
            recovered["DropLayer", kind, 0], recovered["InvertingGradients", None, 0], atol=0.01, rtol=0
        )

"""What holds for every baseline defense; a new file in baselines/defenses is tested without an edit here."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch

from leakbench.defense import DefenseChain, DefenseContext
from leakbench.federation.client import Client

DEFENSES = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("defenses")]
SWEPT = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("defenses") if cls.strength]
BLOCKS = [pytest.param(tiny.PROTOCOLS[name], id=name) for name in ("gradient", "delta", "clients")]


def distortion(block, defense):
    """Return, per trial, how far the update is from the undefended one."""
    clean, sent = block.update(), block.update(defense=defense)
    return torch.stack([(sent[n] - clean[n]).flatten(1).square().sum(1) for n in clean]).sum(0).sqrt()


@pytest.mark.parametrize("cls", DEFENSES)
def test_an_instance_tells_the_parameters_it_was_made_with(cls):
    signature = inspect.signature(cls).parameters
    assert cls().params() == {name: parameter.default for name, parameter in signature.items()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_names_shapes_and_dtypes_are_kept(cls, block):
    clean, sent = block.update(), block.update(defense=cls())
    assert {n: (v.shape, v.dtype) for n, v in sent.items()} == {n: (v.shape, v.dtype) for n, v in clean.items()}
    assert all(value.isfinite().all() for value in sent.values())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_same_streams_give_the_same_update(cls, block):
    once, again = block.update(defense=cls()), block.update(defense=cls())
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_a_trial_does_not_depend_on_the_others_of_its_block(cls, block):
    whole, alone = block.update(defense=cls()), block.only(2).update(defense=cls())
    for name, value in whole.items():
        torch.testing.assert_close(value[2:3], alone[name])


@pytest.mark.parametrize("cls", DEFENSES)
def test_a_tensorwise_defense_treats_a_tensor_the_same_alone(cls):
    if not cls().tensorwise:
        pytest.skip("looks across tensors")
    block = tiny.PROTOCOLS["gradient"]
    whole = block.update(defense=cls())
    for name, value in whole.items():
        torch.testing.assert_close(block.update(defense=cls(), names=[name])[name], value)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_an_attack_that_reads_nothing_is_sent_nothing(cls, block):
    assert block.update(defense=cls(), names=[]) == {}


@pytest.mark.parametrize("cls", SWEPT)
def test_distortion_grows_with_the_declared_strength(cls):
    parameter, stronger = cls.strength
    default = cls().params()[parameter]
    sweep = [default * share for share in (0.1, 0.4, 0.7, 1.0)]
    if stronger == "lower":
        sweep.reverse()
    block = tiny.PROTOCOLS["gradient"]
    steps = torch.stack([distortion(block, cls(**{parameter: value})) for value in sweep])
    assert (steps.diff(dim=0) >= 0).all()
    assert (steps[-1] > steps[0]).all()


@pytest.mark.parametrize("cls", DEFENSES)
def test_hooks_do_not_change_their_arguments_in_place(cls):
    block = tiny.PROTOCOLS["gradient"]
    model, chain = block.model, DefenseChain([cls()])
    images, labels = block.victims
    images, labels = images[:, 0], labels[:, 0]
    ctx = DefenseContext(
        model=model,
        inputs=images,
        labels=labels,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=0.1,
        random=block.random(1),
    )
    arguments = {"images": images, "labels": labels.double(), **model.parameters}
    gradient = block.update()
    per_example = {name: torch.stack([value] * 3, 1) for name, value in gradient.items()}
    arguments |= {f"gradient {name}": value for name, value in gradient.items()}
    arguments |= {f"per example {name}": value for name, value in per_example.items()}
    before = {name: value.clone() for name, value in arguments.items()}
    chain.batch(images, labels, ctx)
    chain.tensors("per_example", per_example, ctx)
    chain.tensors("step", gradient, ctx)
    chain.tensors("update", gradient, ctx)
    assert all(torch.equal(value, before[name]) for name, value in arguments.items())


DECLARED = [
    pytest.param(cls, name, id=f"{stem}-{name}")
    for stem, cls in tiny.entries("defenses")
    for name in ("gradient", "delta")
    if DefenseChain([cls()]).mechanism(tiny.PROTOCOLS[name].protocol, tiny.PROTOCOLS[name].batch)
]


@pytest.mark.parametrize(("cls", "name"), DECLARED)
def test_a_declared_mechanism_is_kept(cls, name):
    block, chain = tiny.PROTOCOLS[name], DefenseChain([cls()])
    mechanism = chain.mechanism(block.protocol, block.batch)
    images, labels = (value[:, 0] for value in block.victims)
    model = block.model.trials(0, 1)

    def sent(images, labels, purpose=1):
        update = Client(block.protocol, block.batch, chain).update(
            model, images, labels, random=block.only(0, 0, 0, 0).random(purpose)
        )
        return torch.cat([value.flatten(1) for value in update.values()], 1)

    # Trials with the same streams have the same noise, so that distances are free of it.
    for scale in (1, 30):
        one = images[:1].expand_as(images).clone(), labels[:1].expand_as(labels).clone()
        one[0][:, 0], one[1][:, 0] = scale * images[:, 0], labels[:, 0]
        assert torch.pdist(sent(*one)).max() <= mechanism.example * (1 + 1e-9)
        assert torch.pdist(sent(scale * images, labels)).max() <= mechanism.update * (1 + 1e-9)
    difference = (sent(images, labels, 1) - sent(images, labels, 2))[0] / 2**0.5
    assert difference.square().mean().sqrt().item() == pytest.approx(
        mechanism.std, rel=6 / (2 * len(difference)) ** 0.5
    )

"""What holds for every baseline defense; a new file in baselines/defenses is tested without an edit here."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import tiny
import torch

from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext
from leakbench.federation.client import Client

DEFENSES = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("defenses")]
SWEPT = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("defenses") if cls.strength]
BLOCKS = [pytest.param(tiny.PROTOCOLS[name], id=name) for name in ("gradient", "delta", "clients")]


NEUTRAL = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("defenses") if cls.neutral is not None]


def distortion(block, defense):
    """Return, per trial, how far the update is from the undefended one."""
    block = block.under(defense)
    clean, sent = block.update(), block.update(defense=defense)
    return torch.stack([(sent[n] - clean[n]).flatten(1).square().sum(1) for n in clean]).sum(0).sqrt()


@pytest.mark.parametrize("cls", DEFENSES)
def test_an_instance_tells_the_parameters_it_was_made_with(cls):
    signature = inspect.signature(cls).parameters
    assert cls().params() == {name: parameter.default for name, parameter in signature.items()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_names_shapes_and_dtypes_are_kept(cls, block):
    block = block.under(cls())
    clean, sent = block.update(), block.update(defense=cls())
    assert {n: (v.shape, v.dtype) for n, v in sent.items()} == {n: (v.shape, v.dtype) for n, v in clean.items()}
    assert all(value.isfinite().all() for value in sent.values())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_same_streams_give_the_same_update(cls, block):
    block = block.under(cls())
    once, again = block.update(defense=cls()), block.update(defense=cls())
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_a_trial_does_not_depend_on_the_others_of_its_block(cls, block):
    block = block.under(cls())
    whole, alone = block.update(defense=cls()), block.only(2).update(defense=cls())
    for name, value in whole.items():
        torch.testing.assert_close(value[2:3], alone[name])


@pytest.mark.parametrize("cls", DEFENSES)
def test_a_tensorwise_defense_treats_a_tensor_the_same_alone(cls):
    if not cls().tensorwise:
        pytest.skip("looks across tensors")
    block = tiny.PROTOCOLS["gradient"].under(cls())
    whole = block.update(defense=cls())
    for name, value in whole.items():
        torch.testing.assert_close(block.update(defense=cls(), names=[name])[name], value)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", DEFENSES)
def test_an_attack_that_reads_nothing_is_sent_nothing(cls, block):
    assert block.under(cls()).update(defense=cls(), names=[]) == {}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cls", NEUTRAL)
def test_neutral_parameters_change_nothing(cls, block):
    assert distortion(block, cls(**cls.neutral)).max() < 1e-12


@pytest.mark.parametrize("cls", DEFENSES)
def test_what_is_drawn_is_declared(cls):
    block = tiny.PROTOCOLS["gradient"].under(cls())
    again = replace(block, streams=9)
    once, other = block.update(defense=cls()), again.update(defense=cls())
    same = all(torch.equal(value, other[name]) for name, value in once.items())
    assert same == (not cls.draws), "`draws` says what it draws at random, and is empty for a deterministic defense"


def loglikelihood(block, defense):
    """Return the score of every trial's sent update given every trial's clean one, (sent T, clean T)."""
    block = block.under(defense)
    chain = DefenseChain([defense])
    sent = block.update(defense=defense)
    images, labels = (value[:, 0] for value in block.victims)
    leaf = images.clone().requires_grad_()
    client = Client(block.protocol, block.batch, chain.inside)
    clean = client.update(block.model, leaf, labels, random=block.random(1), create_graph=True)
    ctx = DefenseContext(
        model=block.model,
        inputs=images,
        labels=labels,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=0.1,
        random=block.random(2),
    )
    scores = [
        chain.log_likelihood({n: v[[s] * len(images)] for n, v in sent.items()}, clean, ctx) for s in range(len(images))
    ]
    return torch.stack(scores), leaf


@pytest.mark.parametrize("cls", [p for p in DEFENSES if p.values[0].likelihood in ("density", "surrogate")])
def test_a_likelihood_prefers_the_own_clean_update_and_is_differentiable(cls):
    parameter, stronger = cls.strength or ("", "")
    weak = {parameter: 0.1 * cls().params()[parameter]} if stronger == "higher" and cls.draws else {}
    scores, leaf = loglikelihood(tiny.PROTOCOLS["gradient"], cls(**weak))  # strong noise may hide the own update
    assert scores.isfinite().all()
    assert (scores.argmax(1) == torch.arange(len(scores))).all()
    # Off the own update, where a score may be flat.
    (slope,) = torch.autograd.grad(scores[0, 1:].sum(), leaf)
    assert slope.isfinite().all()
    assert slope[1:].abs().amax() > 0


@pytest.mark.parametrize("cls", [p for p in DEFENSES if p.values[0].likelihood == "simulated"])
def test_a_simulated_defense_can_be_differentiated_through(cls):
    block = tiny.PROTOCOLS["gradient"].under(cls())
    images, labels = (value[:, 0] for value in block.victims)
    leaf = images.clone().requires_grad_()
    client = Client(block.protocol, block.batch, DefenseChain([cls()]).inside)
    sent = client.update(block.model, leaf, labels, random=block.random(1), create_graph=True)
    (slope,) = torch.autograd.grad(sum(value.square().sum() for value in sent.values()), leaf)
    assert slope.isfinite().all()
    assert slope.abs().amax() > 0


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
    block = tiny.PROTOCOLS["gradient"].under(cls())
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

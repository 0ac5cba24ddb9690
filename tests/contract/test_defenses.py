"""What holds for every baseline defense; a new file in baselines/defenses is tested without an edit here.

Most laws are those of `leakbench check`; what an adversary is told of a defense is asked of baselines alone.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.submitting.defense_laws import DEFENSE_LAWS

DEFENSES = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("defenses")]


@pytest.mark.parametrize("law", [pytest.param(law, id=law.name) for law in DEFENSE_LAWS])
@pytest.mark.parametrize("cls", DEFENSES)
def test_a_baseline_keeps_the_laws_of_a_submission(cls, law):
    law.check(cls)


def loglikelihood(block, defense):
    """Return the score of every trial's sent update given every trial's clean one, (sent T, clean T)."""
    block = block.under(defense)
    chain = DefenseChain([defense])
    sent = block.update(defense=defense)
    images, labels = (value[:, 0] for value in block.victims)
    leaf = images.clone().requires_grad_()
    client = Client(block.protocol, block.batch, chain.inside)
    clean = client.update(block.model, leaf, labels, random=block.random(1), create_graph=True)
    ctx = block.context(2)
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

"""DCS against its loss written out by hand and a plain solver of its projection."""

from __future__ import annotations

import pytest
import torch
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.dcs_separation import DCSSeparation
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.defenses.dcs import DCS
from scipy.optimize import minimize_scalar
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, UserError
from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext
from leakbench.federation.client import Client
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, Protocol

MLP = Architecture(name="mlp", params={"width": 16, "depth": 1})
SEEDS = torch.arange(3 * 32).reshape(3, 32).to(torch.uint8)


class Spy(Defense):
    """Keeps the batch that the client trains on."""

    def batch(self, inputs, labels, ctx):
        self.inputs, self.labels = inputs, labels
        return inputs, labels


def send(defense, batch=2, **protocol):
    """Return what is sent, what was trained on, and the private batch."""
    observation, inputs, labels = observe(batch=batch, net=MLP)
    spy = Spy()
    client = Client(Protocol(**protocol), batch, DefenseChain([defense, spy]))
    sent = client.update(observation.model, inputs, labels, random=TrialRandom(SEEDS))
    return sent, spy, observation.model, inputs, labels


def by_hand(model, loss):
    """Return one model's gradient of ``loss(logits of inputs)``."""
    state = {n: v[0].detach().clone().requires_grad_() for n, v in model.parameters.items()}
    value = loss(lambda x: functional_call(model.module, state, (x,)))
    return dict(zip(state, torch.autograd.grad(value, list(state.values())), strict=True))


@pytest.mark.parametrize(("lam_y", "count"), [(0.7, 3), (1.0, 2), (0.0, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_sent_is_the_gradient_of_the_weighted_loss(reduction, lam_y, count):
    sent, spy, model, inputs, labels = send(DCS(lam_y=lam_y, steps=3), reduction=reduction)
    assert torch.equal(spy.inputs[:, 2:], inputs)
    for t in range(3):
        made, wrong = spy.inputs[t, :2], (spy.labels[t, :2] - (1 - lam_y) * F.one_hot(labels[t], 10)).argmax(1)
        if lam_y > 0:
            assert (wrong != labels[t]).all()

        def loss(net, t=t, made=made, wrong=wrong):
            terms = (lam_y, made, wrong), (1 - lam_y, made, labels[t]), (1.0, inputs[t], labels[t])
            return sum(w * F.cross_entropy(net(x), y, reduction=reduction) for w, x, y in terms) / count

        slope = by_hand(model, loss)
        true = by_hand(model, lambda net, t=t: F.cross_entropy(net(inputs[t]), labels[t], reduction=reduction))
        if sum((slope[n] * true[n]).sum() for n in slope) > 0:
            for name, value in slope.items():
                torch.testing.assert_close(sent[name][t], value)


def test_made_examples_come_nearer_to_the_private_gradient_and_leave_the_private_input():
    def state(steps):
        _, spy, model, inputs, labels = send(DCS(steps=steps, lam_z=0.0), batch=1)
        alike, far = [], []
        for t in range(3):
            wrong = spy.labels[t, :1].argmax(1)
            found = by_hand(model, lambda net, t=t, wrong=wrong: F.cross_entropy(net(spy.inputs[t, :1]), wrong))
            true = by_hand(model, lambda net, t=t: F.cross_entropy(net(inputs[t]), labels[t]))
            one, other = (torch.cat([v.flatten() for v in g.values()]) for g in (found, true))
            alike.append(F.cosine_similarity(one, other, dim=0))
            far.append((spy.inputs[t, :1] - inputs[t]).norm())
        return torch.stack(alike).mean(), torch.stack(far).mean()

    (before, _), (after, far) = state(1), state(60)
    assert after > before + 0.1
    assert far > 1


def context(model, inputs, labels):
    return DefenseContext(
        model=model,
        inputs=inputs,
        labels=labels,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=0.1,
        random=TrialRandom(SEEDS),
    )


def test_a_gradient_against_the_private_batch_is_turned_as_the_papers_solver_turns_it():
    """min over v >= 1/2 of |v true + sent|^2 / 2, with the solver's ridge; the result no longer works against it."""
    observation, inputs, labels = observe(batch=2, net=MLP)
    union, soft = torch.cat([inputs, inputs], 1), F.one_hot(torch.cat([labels, labels], 1), 10).double()
    true = Client(Protocol(), 2).update(observation.model, inputs, labels, random=TrialRandom(SEEDS))
    away = {n: -0.8 * v + 0.1 * torch.randn(v.shape, generator=torch.manual_seed(1)).double() for n, v in true.items()}
    turned = DCS().step(away, context(observation.model, union, soft))
    for t in range(3):
        flat_true, flat_away, flat = (torch.cat([v[t].flatten() for v in g.values()]) for g in (true, away, turned))
        start = 2 / 3 * flat_away
        square = float(flat_true @ flat_true) + 1e-3
        cost = minimize_scalar(
            lambda v, s=square, q=float(flat_true @ start): 0.5 * v * v * s + v * q, bounds=(0.5, 50), method="bounded"
        )
        torch.testing.assert_close(flat, start + cost.x * flat_true, rtol=1e-3, atol=1e-4)
        assert flat @ flat_true > -1e-2
    kept = DCS().step(true, context(observation.model, union, soft))
    for name, value in true.items():
        torch.testing.assert_close(kept[name], 2 / 3 * value)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="expected steps"):
        DCS(steps=0)
    with pytest.raises(UserError, match="expected 0 <= lam_y"):
        DCS(lam_y=1.2)


def test_searching_for_both_separates_what_plain_inversion_confuses():
    def quality(attack):
        observation, inputs, _ = observe(trials=3, defense=DCS(steps=20), known=True)
        recovery = attack.run(observation.with_prepared(attack.prepare(observation)))
        return psnr(recovery.inputs, inputs)

    plain, separated = quality(InvertingGradients(steps=200)), quality(DCSSeparation(steps=200))
    assert separated.mean() > plain.mean() + 3


def test_without_dcs_it_is_plain_inversion():
    observation, _, _ = observe(trials=2, known=True)
    plain, attack = InvertingGradients(steps=10), DCSSeparation(steps=10)
    assert torch.equal(plain.run(observation).inputs, attack.run(observation).inputs)

"""Learning-rate perturbation against clients that were told another learning rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.learning_rate_perturbation import LearningRatePerturbation
from scipy import stats
from torch.nn import functional as F  # noqa: N812
from update_blocks import context, flat, streams

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client, ClientState
from leakbench.tasks import Protocol

TRIALS = 4


def send(block, defense, state=None, round_index=0, seed=0):
    client = Client(block.protocol, block.batch, DefenseChain([defense] if defense else []))
    more = {"random": streams(TRIALS, seed), "state": state, "round_index": round_index}
    return client.update(block.model, block.inputs, block.labels, **more)


def factors(sent, clean):
    """Return by what a trial's update was multiplied (T,), and the cosine (T,) with the clean one."""
    sent, clean = flat(sent), flat(clean)
    return sent.norm(dim=1) / clean.norm(dim=1), F.cosine_similarity(sent, clean)


@pytest.mark.parametrize(
    "protocol", [Protocol(), Protocol(sends="delta", lr=0.3, momentum=0.9)], ids=["gradient", "delta"]
)
def test_one_step_is_sent_times_a_positive_factor(protocol):
    block = digits_block(3, protocol=protocol)
    factor, cosine = factors(send(block, LearningRatePerturbation(width=0.4)), block.update())
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert ((factor > 0.6) & (factor < 1.4)).all()
    assert len(factor.unique()) == TRIALS


@pytest.mark.parametrize("sends", ["delta", "weights"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_steps_are_those_of_a_client_with_that_learning_rate(sends, momentum):
    protocol = Protocol(sends=sends, local_steps=4, batches="same", lr=0.2, momentum=momentum)
    defense = LearningRatePerturbation(width=0.9)
    block = digits_block(3, protocol=protocol, architecture="mlp", width=12)
    single = replace(block, protocol=Protocol(sends="delta", lr=0.2))
    factor, _ = factors(send(single, defense), single.update())
    sent = send(block, defense)
    for t, share in enumerate(factor.tolist()):
        told = replace(block, protocol=Protocol(**{**protocol.__dict__, "lr": 0.2 * share})).update()
        for name, value in sent.items():
            torch.testing.assert_close(value[t], told[name][t])


def test_rates_are_uniform_and_their_mean_is_the_agreed_one():
    ones = {"v": torch.ones(4000, 2)}
    sent = LearningRatePerturbation(width=0.8).step(ones, context(4000))["v"]
    assert torch.equal(sent[:, 0], sent[:, 1])
    assert stats.kstest(sent[:, 0].numpy(), stats.uniform(0.2, 1.6).cdf).pvalue > 1e-3


def test_a_client_draws_another_rate_in_the_next_round():
    block, state = digits_block(2), ClientState()
    first, again = (factors(send(block, LearningRatePerturbation(), state, r), block.update())[0] for r in (0, 1))
    assert (first - again).abs().min() > 1e-3


@pytest.mark.parametrize("sends", ["gradient", "delta"])
def test_no_width_changes_nothing(sends):
    block = digits_block(2, protocol=Protocol(sends=sends, local_steps=1 if sends == "gradient" else 2))
    clean = block.update()
    assert all(torch.equal(v, clean[n]) for n, v in send(block, LearningRatePerturbation(width=0.0)).items())


@pytest.mark.parametrize("width", [-0.1, 1.0])
def test_a_width_that_allows_no_step_or_a_step_back_is_refused(width):
    with pytest.raises(UserError, match=r"width: expected 0 <= width < 1, got .* write"):
        LearningRatePerturbation(width=width)

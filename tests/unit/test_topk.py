"""Error feedback of top-k sparsification; what one round sends is tested with the other first baselines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.topk import TopK
from update_blocks import context, flat, streams, updates

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client, ClientState
from leakbench.tasks import Protocol

ROUNDS = 6


def play(defense, given):
    """Return what is sent in every round, flat, and what is owed at the end."""
    state = {}
    sent = [flat(defense.update(update, context(len(update["a.bias"]), state=state))) for update in given]
    return sent, state


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_error_feedback_is_the_plain_loop_over_rounds(scope):
    given = [updates(2, seed=r) for r in range(ROUNDS)]
    sent, _ = play(TopK(p=0.9, scope=scope, error_feedback=True), given)
    sizes = [v[0].numel() for v in given[0].values()] if scope == "layer" else [flat(given[0]).shape[1]]
    for trial in range(2):
        owed = np.zeros(sum(sizes))
        for update, got in zip(given, sent, strict=True):
            owed += flat(update)[trial].numpy()
            expected, start = np.zeros_like(owed), 0
            for size in sizes:
                part = slice(start, start + size)
                kept = start + np.argsort(-np.abs(owed[part]))[: -(-size // 10)]
                expected[kept], start = owed[kept], start + size
            owed -= expected
            np.testing.assert_allclose(got[trial].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_sent_and_owed_are_what_was_given_and_nothing_owed_is_lost():
    block, state = digits_block(2, protocol=Protocol(sends="delta", lr=0.1)), ClientState()
    client = Client(block.protocol, block.batch, DefenseChain([TopK(p=0.9, error_feedback=True)]))
    total = None
    for r in range(ROUNDS):
        more = {"random": streams(4), "state": state, "round_index": r}
        sent = client.update(block.model, block.inputs, block.labels, **more)
        total = sent if total is None else {n: v + sent[n] for n, v in total.items()}
    owed = state.defense[("topk", 0)]
    for name, value in block.update().items():
        torch.testing.assert_close(total[name] + owed[name], ROUNDS * value)


def test_the_same_update_again_and_again_is_sent_whole_in_the_mean():
    rounds, update = 400, updates(2)
    sent, _ = play(TopK(p=0.9, error_feedback=True), [update] * rounds)
    without, _ = play(TopK(p=0.9), [update] * rounds)
    error, lost = ((torch.stack(s).mean(0) - flat(update)).norm() / flat(update).norm() for s in (sent, without))
    assert error < 0.05
    assert lost > 0.7


def test_the_first_round_is_the_same_and_other_defenses_keep_states_of_their_own():
    first = updates(2)
    with_feedback, _ = play(TopK(error_feedback=True), [first])
    assert torch.equal(with_feedback[0], flat(TopK().update(first, context(2))))
    block, state = digits_block(2), ClientState()
    chain = DefenseChain([GaussianNoise(), TopK(p=0.5, error_feedback=True), TopK(p=0.9, error_feedback=True)])
    Client(block.protocol, block.batch, chain).update(
        block.model, block.inputs, block.labels, random=streams(4), state=state
    )
    one, other = state.defense[("topk", 0)], state.defense[("topk", 1)]
    assert one.keys() == other.keys() == block.model.parameters.keys()
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].any() or other[name].any())


def test_weights_that_are_sent_themselves_are_refused():
    with pytest.raises(UserError, match="error_feedback: expected a gradient or delta, got weights; write"):
        TopK(error_feedback=True).update(updates(2), context(2, sends="weights"))

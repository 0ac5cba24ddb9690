"""Outpost: coin, pruning and noise, against a loop over tensors; and what the released code forgot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from leakbench_baselines.defenses.outpost import Outpost
from update_blocks import context, flat, updates

from leakbench import UserError

TRIALS = 40


class Weights:
    """A model that has weights of unequal variance, and nothing else."""

    def __init__(self, update):
        stds = {name: 0.1 * (i + 1) for i, name in enumerate(update)}
        self.parameters = {name: stds[name] * value[:1] for name, value in update.items()}


def outpost(update, step=0, round_index=0, **parameters):
    ctx = replace(context(len(flat(update)), local_step=step, round=round_index), model=Weights(updates(1, seed=3)))
    return Outpost(**parameters).step(update, ctx)


def by_hand(value, every, prune, phi):
    """Return the pruned tensor and where noise falls, of one trial, by numpy as the released code does it."""
    fisher = [(g**2).mean(0) for g in every]
    threshold = np.percentile(np.concatenate([f.flatten() for f in fisher]), 100 - phi)
    kept = np.where(np.abs(value) < np.percentile(np.abs(value).flatten(), prune), 0, value)
    return kept, np.broadcast_to((value**2).mean(0) >= threshold, value.shape)


def test_t16_it_prunes_and_adds_noise_where_the_released_formulas_say():
    update = updates(3)
    sent = outpost(update, prune_base=80.0, phi=40.0, noise_base=0.5)
    for trial in range(3):
        every = [value[trial].numpy() for value in update.values()]
        for name, value in update.items():
            kept, loud = by_hand(value[trial].numpy(), every, 80, 40)
            found = sent[name][trial].numpy()
            quiet = ~loud
            assert (found[quiet] == kept[quiet]).all()
            assert (found[loud] != kept[loud]).all()


def test_the_noise_has_the_declared_size():
    update = updates(1)
    sent = outpost(update, prune_base=0.0, phi=100.0, noise_base=0.5)
    for i, name in enumerate(update):
        noise = (sent[name] - update[name]).flatten()
        std = 0.5 * (0.1 * (i + 1)) ** 2 * updates(1, seed=3)[name].var().item()
        assert noise.std().item() == pytest.approx(std, rel=5 / (2 * len(noise)) ** 0.5)


def test_risk_is_at_most_one():
    update = {"a.weight": torch.zeros(1, 100, 100, dtype=torch.float64)}
    model = Weights({"a.weight": 1000 * torch.randn(1, 100, 100, dtype=torch.float64)})
    sent = Outpost(noise_base=0.3).step(update, replace(context(1), model=model))
    assert sent["a.weight"].std().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize(("step", "round_index", "rounds"), [(0, 0, False), (24, 9, False), (8, 16, True)])
def test_t16_the_update_differs_whenever_the_coin_says_so_and_only_then(step, round_index, rounds):
    update = updates(400)
    sent = outpost(update, step, round_index, beta=0.125, rounds=rounds)
    acted = (flat(sent) != flat(update)).any(1)
    share = 1 / (1 + 0.125 * (step + rounds * round_index))
    assert acted.double().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / 400) ** 0.5 + 1e-9)
    for name, value in update.items():
        assert torch.equal(sent[name][~acted], value[~acted])


def test_each_step_tosses_its_own_coin():
    update = updates(100)
    coins = [
        (flat(outpost(update, 8, beta=0.125)) != flat(update)).any(1),
        (
            flat(
                Outpost(beta=0.125).step(
                    update, replace(context(100, seed=1, local_step=8), model=Weights(updates(1, seed=3)))
                )
            )
            != flat(update)
        ).any(1),
    ]
    assert not torch.equal(*coins)


def likelihood(clean, sent, noise_base):
    ctx = replace(context(len(flat(sent))), model=Weights(updates(1, seed=3)))
    return Outpost(noise_base=noise_base).log_likelihood(sent, clean, ctx) / flat(sent).shape[1]


@pytest.mark.parametrize("noise_base", [0.5, 1e9])
def test_the_likelihood_finds_the_clean_gradient_in_the_entries_without_noise(noise_base):
    update = updates(4)
    sent = outpost(update, noise_base=noise_base)
    assert (likelihood(update, sent, noise_base) > likelihood(updates(4, seed=9), sent, noise_base) + 0.3).all()


def test_the_likelihood_sees_that_the_coin_was_against_acting():
    update = updates(2)
    assert likelihood(update, update, 1e9).abs().max() < 1e-9


@pytest.mark.parametrize("arguments", [{"noise_base": -1.0}, {"prune_base": 100.0}, {"phi": 101.0}, {"beta": -0.1}])
def test_bad_parameters_are_told(arguments):
    with pytest.raises(UserError, match="outpost: expected"):
        Outpost(**arguments)

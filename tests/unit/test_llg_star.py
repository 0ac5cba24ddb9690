"""LLG* against a plain loop: the released algorithm with its units put right, batch by batch and label by label."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from label_blocks import CLASSES, SPEC, digits_block
from leakbench_baselines.attacks.llg_star import LLGStar
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, UserError
from leakbench.randomness import TrialRandom
from leakbench.tasks import InputSpec, Protocol

ROUNDS = 2


def row_sums(model, trial, inputs, label):
    """Row sums of the last layer's weight gradient of one batch of one class, by one backward pass."""
    state = {k: v[trial % len(v)].clone() for k, v in (model.parameters | model.buffers).items()}
    weight = state[f"{model.head}.weight"].requires_grad_()
    logits = functional_call(model.module, state, (inputs,))
    loss = F.cross_entropy(logits, torch.full((len(inputs),), label))
    return torch.autograd.grad(loss, weight)[0].sum(-1).tolist()


def counts_of(g, m, s, total):
    """Extraction for one trial: every class of negative signal once, then the least signal until all are named."""
    counts = [int(x < 0) for x in g]
    g = [x - s[i] - m * counts[i] for i, x in enumerate(g)]
    while sum(counts) < total:
        j = min(range(len(g)), key=lambda i: g[i])
        counts[j] += 1
        g[j] -= m
    return counts


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("dummies", ["zeros", "ones", "random"])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 8), (1, 32), (3, 6)])
def test_llg_star_agrees_with_the_plain_loop_on_real_gradients(dummies, steps, batch, models):
    protocol = Protocol() if steps == 1 else Protocol(sends="delta", local_steps=steps, lr=0.05)
    block = digits_block(batch, protocol=protocol, models=models)
    draws = TrialRandom(block.seeds[:models])
    if dummies == "random":
        inputs = [draws.rand(batch, *SPEC.shape).double() for _ in range(ROUNDS)]
    else:
        inputs = [torch.full((models, batch, *SPEC.shape), float(dummies == "ones"), dtype=torch.float64)] * ROUNDS
    update = block.update()
    counts = block.run(LLGStar(dummies=dummies, rounds=ROUNDS), update)
    for t in range(len(counts)):
        m, s = 0.0, [0.0] * CLASSES
        for r in range(ROUNDS):
            for c in range(CLASSES):
                g = row_sums(block.model, t, inputs[r][t % models], c)
                m += g[c] / (CLASSES * batch) / ROUNDS * (1 + 1 / CLASSES)
                for j in range(CLASSES):
                    s[j] += 0 if j == c else steps * g[j] / (ROUNDS * (CLASSES - 1))
        g = (update[f"{block.model.head}.weight"][t] / (1 if steps == 1 else protocol.lr)).sum(-1).tolist()
        assert counts[t].tolist() == counts_of(g, m, s, steps * batch)


class Watched(Knowledge):
    """Knowledge that remembers the inputs that it ran."""

    def forward(self, inputs, *, model=None):
        self.seen = [*getattr(self, "seen", []), inputs]
        return super().forward(inputs, model=model)


def watched(**params):
    block = digits_block(5, **params)
    spec = InputSpec(shape=SPEC.shape, mean=(0.3,), std=(0.4,))
    facts = replace(block.knowledge["facts"], normalised=True, input_spec=spec)
    random = TrialRandom(block.seeds[: block.model.draws])
    return Watched(**{**block.knowledge, "facts": facts, "random": random})


@pytest.mark.parametrize(("dummies", "value"), [("zeros", -0.3 / 0.4), ("ones", 0.7 / 0.4)])
def test_constant_dummies_are_pixels_and_looked_at_once(dummies, value):
    knowledge = watched()
    LLGStar(dummies=dummies).prepare(knowledge)
    (inputs,) = knowledge.seen
    assert inputs.shape == (4, 1, *SPEC.shape)
    torch.testing.assert_close(inputs, torch.full_like(inputs, value))


def test_random_dummies_fill_the_range_of_pixels():
    knowledge = watched()
    LLGStar(dummies="random", rounds=3).prepare(knowledge)
    assert [x.shape for x in knowledge.seen] == [(4, 5, *SPEC.shape)] * 3
    pixels = torch.stack(knowledge.seen)
    assert -0.75 <= pixels.min() < -0.7
    assert 1.7 < pixels.max() <= 1.75
    assert (pixels[0] != pixels[1]).all()


@pytest.mark.parametrize("dummies", ["zeros", "random"])
def test_dummies_come_in_the_clients_batches_where_batch_norm_joins_them(dummies):
    knowledge = watched(architecture="resnet20", width=4, trials=2, models=1, protocol=Protocol(batch_norm="train"))
    prepared = LLGStar(dummies=dummies, rounds=2).prepare(knowledge)
    assert {x.shape[1] for x in knowledge.seen} == {5}
    assert all(value.isfinite().all() for value in prepared.values())


def test_offsets_are_what_one_occurrence_of_another_class_adds():
    prepared = LLGStar().prepare(Knowledge(**digits_block(8).knowledge))
    assert prepared["impact"].lt(0).all()
    assert prepared["offset"].gt(0).all()
    torch.testing.assert_close(  # probabilities sum to 1, so the offsets of all classes make up one impact
        prepared["offset"].sum(1), -prepared["impact"] / (1 - 1 / CLASSES**2)
    )


@pytest.mark.parametrize("arguments", [{"dummies": "twos"}, {"rounds": 0}])
def test_bad_arguments_are_refused_in_one_line(arguments):
    with pytest.raises(UserError, match=r"^llg_star: \w+: expected .*, got .*; write [^\n]*$"):
        LLGStar(**arguments)

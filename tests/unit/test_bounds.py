"""Defenses are told the least and greatest valid input by every client: the harness's and the simulated one."""

from __future__ import annotations

import torch
from inversion_blocks import observe
from label_blocks import digits_block

from leakbench import Defense, Knowledge
from leakbench.chain import DefenseChain
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.federation.inputs import input_bounds, to_inputs
from leakbench.tasks import InputSpec, Protocol

SPEC = InputSpec(shape=(3, 4, 4), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5))


class Spy(Defense):
    """Keeps the bounds."""

    def batch(self, inputs, labels, ctx):
        self.bounds = ctx.bounds
        return inputs, labels


def test_bounds_are_what_black_and_white_become():
    extremes = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255)]).to(torch.uint8).numpy()
    for normalise in (False, True):
        black, white = to_inputs(extremes, SPEC, normalise)
        low, high = input_bounds(SPEC, normalise)
        torch.testing.assert_close(low.expand(3, 4, 4), black)
        torch.testing.assert_close(high.expand(3, 4, 4), white)


def test_a_simulated_client_tells_the_tasks_bounds():
    block, spy = digits_block(2), Spy()
    facts = block.knowledge["facts"]
    normalised = Facts(
        **{**facts.__dict__, "normalised": True, "input_spec": InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.5,))}
    )
    knowledge = Knowledge(**{**block.knowledge, "facts": normalised, "defense": DefenseChain([spy])})
    knowledge.simulate(block.inputs, block.labels)
    assert [bound.item() for bound in spy.bounds] == [bound.item() for bound in knowledge.bounds]
    assert round(spy.bounds[0].item(), 6) == -0.6


def test_a_client_that_is_told_nothing_assumes_pixels():
    observation, inputs, labels = observe(batch=2)
    spy = Spy()
    Client(Protocol(), 2, DefenseChain([spy])).update(observation.model, inputs, labels, random=observation._random)
    assert [bound.item() for bound in spy.bounds] == [0, 1]

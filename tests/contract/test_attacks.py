"""What holds for every baseline attack; a new file in baselines/attacks is tested without an edit here."""

from __future__ import annotations

import contextlib
import copy
import inspect

import pytest
import tiny
import torch

from leakbench import NotApplicable, NotGranted

ATTACKS = [pytest.param(cls, id=stem) for stem, cls in tiny.entries("attacks")]
PROTOCOLS = [pytest.param(block, id=name) for name, block in tiny.PROTOCOLS.items()]


def supported(cls, block):
    """Whether the facts of the task suit the attack; the planner asks the same before it runs anything."""
    single = block.shape.inputs == 1
    return single or "single_example" not in cls.needs


def attacked(cls, block, **options):
    """Return what the attack claims, unless it declines the task before it sees an update."""
    if not supported(cls, block):
        pytest.skip("needs a single example")
    try:
        return block.attack(cls(), **options)
    except NotApplicable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("cls", ATTACKS)
def test_every_attack_accepts_some_task(cls):
    for block in tiny.PROTOCOLS.values():
        if supported(cls, block):
            try:
                block.attack(cls())
            except NotApplicable:
                continue
            return
    pytest.fail("declines every block: add one that suits it to tiny.PROTOCOLS")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["analytic", "april", "r_gap", "spear"])
def test_closed_forms_are_held_to_the_bar_of_exact_attacks(name):
    assert dict(tiny.entries("attacks"))[name].exact


@pytest.mark.parametrize("cls", ATTACKS)
def test_an_instance_tells_the_parameters_it_was_made_with(cls):
    signature = inspect.signature(cls).parameters
    assert cls().params() == {name: parameter.default for name, parameter in signature.items()}


@pytest.mark.parametrize("block", PROTOCOLS)
@pytest.mark.parametrize("cls", ATTACKS)
def test_needs_alone_give_a_valid_recovery(cls, block):
    attacked(cls, block.granting(cls.needs))


@pytest.mark.parametrize("cls", ATTACKS)
def test_each_need_is_needed(cls):
    granted = cls.needs | {"labels"}  # without labels, some need what their label attack needs
    suitable = []
    for block in tiny.PROTOCOLS.values():
        with contextlib.suppress(NotApplicable):
            block.granting(granted).attack(cls())
            suitable.append(block)
    for need in cls.needs - tiny.PUBLIC_FACTS:
        refused = []
        for block in suitable:
            try:
                block.granting(granted - {need}).attack(cls())
            except (NotGranted, NotApplicable):
                refused.append(block)
        assert refused, f"{need!r} is never read: take it out of needs"


@pytest.mark.parametrize("block", PROTOCOLS)
@pytest.mark.parametrize("cls", ATTACKS)
def test_same_observation_gives_the_same_recovery(cls, block):
    once, again = attacked(cls, block).tensors(), attacked(cls, block).tensors()
    assert once.keys() == again.keys()
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("block", PROTOCOLS)
@pytest.mark.parametrize("cls", ATTACKS)
def test_a_trial_does_not_depend_on_the_others_of_its_block(cls, block):
    whole, alone = attacked(cls, block).tensors(), block.only(2).attack(cls()).tensors()
    for name, value in whole.items():
        torch.testing.assert_close(value[2:3], alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", ATTACKS)
def test_update_is_not_changed_in_place(cls):
    seen = []
    attacked(cls, tiny.PROTOCOLS["single"], watch=lambda update: seen.append((update, copy.deepcopy(update))))
    (update, before) = seen[0]
    assert all(torch.equal(update[name], value) for name, value in before.items())


@pytest.mark.parametrize("cls", ATTACKS)
def test_budget_is_honored(cls):
    recovery = attacked(cls, tiny.PROTOCOLS["single"])
    evaluations = recovery.model_evaluations
    assert evaluations is None or evaluations <= tiny.BUDGET

"""The laws of attacks, each tried on every block of `leakbench.submitting.blocks` that the attack accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from leakbench.attack import Attack
from leakbench.errors import InvalidOutput, NotApplicable, NotGranted
from leakbench.submitting.blocks import BLOCKS, BUDGET, PUBLIC_FACTS, Block
from leakbench.submitting.laws import FILE_LAWS, Broken, Law

_ALONE = 2


def accepts(cls: type[Attack], block: Block) -> bool:
    """Whether the attack takes the block on; the planner and `Attack.prepare` decide, before an update is seen."""
    if "single_example" in cls.needs and block.shape.inputs > 1:
        return False
    try:
        block.attack(cls())
    except NotApplicable:
        return False
    return True


@cache
def accepted(cls: type[Attack]) -> tuple[str, ...]:
    """Return the names of the blocks that the attack takes on; the costly transformer is for attacks made for it."""
    names = tuple(name for name, block in BLOCKS.items() if name != "vit" and accepts(cls, block))
    return names or (("vit",) if accepts(cls, BLOCKS["vit"]) else ())


def _accepted(cls: type[Attack]) -> Iterator[tuple[str, Block]]:
    return ((name, BLOCKS[name]) for name in accepted(cls))


def runs_on_some_task(cls: type[Attack]) -> str:
    """It accepts some task, and what it returns is valid wherever it does."""
    try:
        names = accepted(cls)
    except NotGranted as error:
        raise Broken(f"{error}; declare it in needs") from None
    except InvalidOutput as error:
        raise Broken(str(error)) from None
    if not names:
        raise Broken(f"declines every tiny task ({', '.join(BLOCKS)}); see `prepare` and `needs`")
    return "on " + ", ".join(names)


def needs_suffice(cls: type[Attack]) -> None:
    """Where nothing but `needs` is granted, it still runs."""
    for name, block in _accepted(cls):
        try:
            block.granting(cls.needs).attack(cls())
        except NotApplicable:
            continue
        except NotGranted as error:
            raise Broken(f"{name}, with nothing but needs: {error}") from None


def needs_are_needed(cls: type[Attack]) -> None:
    """Without any one of `needs` it cannot run; a need too many costs rows."""
    granted = cls.needs | {"labels"}  # without labels, some need what their label attack needs
    suitable = [block.granting(granted) for _, block in _accepted(cls) if _runs(cls, block.granting(granted))]
    for need in sorted(cls.needs - PUBLIC_FACTS):
        if suitable and all(_runs(cls, block.granting(granted - {need})) for block in suitable):
            raise Broken(f"{need!r} is never read; take it out of needs, so that the attack runs where it is withheld")


def _runs(cls: type[Attack], block: Block) -> bool:
    try:
        block.attack(cls())
    except (NotGranted, NotApplicable):
        return False
    return True


def same_observation_same_recovery(cls: type[Attack]) -> None:
    """A second run on the same observation returns the same, bit by bit."""
    for name, block in _accepted(cls):
        once, again = block.attack(cls()).tensors(), block.attack(cls()).tensors()
        for field, value in once.items():
            if field not in again or not torch.equal(value, again[field]):
                raise Broken(
                    f"{name}: {field} differs between two runs; draw from observation.randn, .rand or .randint, "
                    "never from torch's or Python's own generators"
                )


def trials_are_independent(cls: type[Attack]) -> None:
    """A trial's recovery does not depend on the other trials of its block."""
    for name, block in _accepted(cls):
        whole, alone = block.attack(cls()).tensors(), block.only(_ALONE).attack(cls()).tensors()
        for field, value in whole.items():
            try:
                torch.testing.assert_close(value[_ALONE : _ALONE + 1], alone[field], rtol=1e-5, atol=1e-5)
            except AssertionError:
                raise Broken(
                    f"{name}: {field} of a trial changes when it is run alone; every tensor starts with T, the trials: "
                    "keep means, norms, sorting and stopping rules within a trial (dim=0 is never reduced)"
                ) from None


def update_is_not_changed_in_place(cls: type[Attack]) -> None:
    """What it was shown is as before."""
    for name, block in _accepted(cls):
        seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        block.attack(cls(), watch=lambda u, seen=seen: seen.append((u, {n: v.clone() for n, v in u.items()})))  # type: ignore[misc]
        for tensor, value in seen[0][1].items():
            if not torch.equal(seen[0][0][tensor], value):
                raise Broken(f"{name}: {tensor} of the update was changed in place; work on a copy (.clone())")


def budget_is_respected(cls: type[Attack]) -> None:
    """It makes no more gradient evaluations than are granted."""
    for name, block in _accepted(cls):
        evaluations = block.attack(cls()).model_evaluations or 0
        if evaluations > BUDGET:
            raise Broken(
                f"{name}: {evaluations} gradient evaluations per trial, {BUDGET} were granted; stop at "
                "observation.budget (None: unlimited)"
            )


_DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "constant": torch.ones_like,
    "tiny": lambda v: v * 1e-30,
    "huge": lambda v: v * 1e12,
}


def degenerate_updates_give_finite_output(cls: type[Attack]) -> None:
    """An update of zeros, of one constant, tiny or huge gives a valid recovery, as a defense may send any of them."""
    for name, block in islice(_accepted(cls), 1):  # a fitted attack takes seconds for each
        for how, change in _DEGENERATE.items():

            def spoil(update: dict[str, Tensor], change: Callable[[Tensor], Tensor] = change) -> None:
                update.update({n: change(v) for n, v in update.items()})

            try:
                block.attack(cls(), watch=spoil)
            except (InvalidOutput, ArithmeticError, RuntimeError, ValueError, IndexError) as error:
                text = " ".join(str(error).split())[:200]
                raise Broken(
                    f"{name}: fails on an update of {how} numbers: {text}; guard divisions and logarithms, and return "
                    "any finite guess"
                ) from None


ATTACK_LAWS = (
    *FILE_LAWS,
    Law("runs, and returns what it claims to recover", runs_on_some_task, first=True),
    Law("needs are enough", needs_suffice),
    Law("every need is read", needs_are_needed),
    Law("same observation, same recovery", same_observation_same_recovery),
    Law("trials do not depend on each other", trials_are_independent),
    Law("update is not changed in place", update_is_not_changed_in_place),
    Law("budget is respected", budget_is_respected),
    Law("any update gives finite output", degenerate_updates_give_finite_output),
)

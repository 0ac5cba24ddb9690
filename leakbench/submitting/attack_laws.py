"""The laws of attacks, each tried on every block of `leakbench.submitting.blocks` that the attack accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from leakbench.attack import Attack
from leakbench.errors import InvalidOutput, NotApplicable, NotGranted
from leakbench.submitting.blocks import BLOCKS, BUDGET, PUBLIC_FACTS, Block
from leakbench.submitting.laws import FILE_LAWS, Broken, Law

_ALONE = 2


@dataclass(frozen=True)
class FirstRun:
    """What an attack made of a block: one run, of which several laws ask.

    Args:
        recovery: Tensors of its recovery, by field.
        evaluations: Gradient evaluations per trial that it made.
        changed: A tensor of the update that it changed in place; None: left as it was.
    """

    recovery: dict[str, Tensor]
    evaluations: int
    changed: str | None


@cache
def first_run(cls: type[Attack], name: str) -> FirstRun | None:
    """Return the first run on a block, or None where the attack declines it.

    The planner and `Attack.prepare` decide, before an update is seen.
    """
    block = BLOCKS[name]
    if "single_example" in cls.needs and block.shape.inputs > 1:
        return None
    seen: list[tuple[str, Tensor, Tensor]] = []
    try:
        recovery = block.attack(cls(), watch=lambda update: seen.extend((n, v, v.clone()) for n, v in update.items()))
    except NotApplicable:
        return None
    changed = next((tensor for tensor, value, before in seen if not torch.equal(value, before)), None)
    return FirstRun(recovery.tensors(), recovery.model_evaluations or 0, changed)


def _accepted(cls: type[Attack]) -> Iterator[tuple[str, Block, FirstRun]]:
    for name, block in BLOCKS.items():
        run = first_run(cls, name)
        if run is not None:
            yield name, block, run


def runs_on_some_task(cls: type[Attack]) -> str:
    """It accepts some task, and what it returns is valid wherever it does."""
    try:
        names = [name for name, _, _ in _accepted(cls)]
    except NotGranted as error:
        raise Broken(f"{error}; declare it in needs") from None
    except InvalidOutput as error:
        raise Broken(str(error)) from None
    if not names:
        raise Broken(f"declines every tiny task ({', '.join(BLOCKS)}); see `prepare` and `needs`")
    return "on " + ", ".join(names)


def needs_suffice(cls: type[Attack]) -> None:
    """Where nothing but `needs` is granted, it still runs."""
    for name, block, _ in _accepted(cls):
        try:
            block.granting(cls.needs).attack(cls())
        except NotApplicable:
            continue
        except NotGranted as error:
            raise Broken(f"{name}, with nothing but needs: {error}") from None


def needs_are_needed(cls: type[Attack]) -> None:
    """Without any one of `needs` it cannot run; a need too many costs rows."""
    granted = cls.needs | {"labels"}  # without labels, some need what their label attack needs
    accepted = [name for name, _, _ in _accepted(cls)]
    # Which way of sending asks for a need may only be seen on a batch that the planner would not hand it.
    names = [*accepted, *(name for name in BLOCKS if name not in accepted)]

    @cache
    def runs(name: str, without: str = "") -> bool:
        try:
            BLOCKS[name].granting(granted - {without}).attack(cls())
        except (NotGranted, NotApplicable):
            return False
        except Exception:
            if name in accepted:
                raise
            return without != ""  # neither runs nor refuses
        return True

    for need in sorted(cls.needs - PUBLIC_FACTS):
        if not any(runs(name) and not runs(name, need) for name in names):
            if not any(map(runs, names)):
                raise Broken(f"declines every tiny task where only {', '.join(sorted(granted))} are granted")
            raise Broken(f"{need!r} is never read; take it out of needs, so that the attack runs where it is withheld")


def same_observation_same_recovery(cls: type[Attack]) -> None:
    """A second run on the same observation returns the same, bit by bit."""
    for name, block, run in _accepted(cls):
        again = block.attack(cls()).tensors()
        for field in run.recovery.keys() | again.keys():
            if run.recovery.keys() != again.keys() or not torch.equal(run.recovery[field], again[field]):
                raise Broken(
                    f"{name}: {field} differs between two runs; draw from observation.randn, .rand or .randint, "
                    "never from torch's or Python's own generators"
                )


def trials_are_independent(cls: type[Attack]) -> None:
    """A trial's recovery does not depend on the other trials of its block."""
    for name, block, run in _accepted(cls):
        alone = block.only(_ALONE).attack(cls()).tensors()
        for field, value in run.recovery.items():
            try:
                torch.testing.assert_close(value[_ALONE : _ALONE + 1], alone[field], rtol=1e-5, atol=1e-5)
            except (AssertionError, KeyError):
                raise Broken(
                    f"{name}: {field} of a trial changes when it is run alone; every tensor starts with T, the trials: "
                    "keep means, norms, sorting and stopping rules within a trial (dim=0 is never reduced)"
                ) from None


def update_is_not_changed_in_place(cls: type[Attack]) -> None:
    """What it was shown is as before."""
    for name, _, run in _accepted(cls):
        if run.changed is not None:
            raise Broken(f"{name}: {run.changed} of the update was changed in place; work on a copy (.clone())")


def budget_is_respected(cls: type[Attack]) -> None:
    """It makes no more gradient evaluations than are granted."""
    for name, _, run in _accepted(cls):
        if run.evaluations > BUDGET:
            raise Broken(
                f"{name}: {run.evaluations} gradient evaluations per trial, {BUDGET} were granted; stop at "
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
    for name, block, _ in islice(_accepted(cls), 1):  # a fitted attack takes seconds for each
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

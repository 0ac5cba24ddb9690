"""AutoLeak: a fixed ensemble of complementary attacks without a knob, after AutoAttack. No torch here.

What made robustness to adversarial examples comparable was one ensemble that everybody runs alike (Croce and Hein 2020,
"Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", arXiv 2003.01690).
In a suite's ``attacks``, and after ``--attack``, the expression ``autoleak`` stands for the members that recover the
task's target, each with the parameters written here. Attacks cannot see the truth, so which member was worst, and in
which trial, is told by the board: `leakbench.board.autoleak`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from leakbench.errors import UserError
from leakbench.parts import content_hash

NAME = "autoleak"
"""The expression."""

VERSION = 1
"""Raised when a member, one of its parameters or the budget changes; scores of different ones are not compared."""

CONTROL = "null_update"
"""Defense that lets nothing through: what members reach on it is the floor of their maximum."""


@dataclass(frozen=True)
class Ensemble:
    """The members for one target.

    Args:
        members: Expressions as rows' labels have them, in the order in which ties are decided.
        evaluations: Most gradient evaluations of one member, per trial; a suite has to allow as many.
    """

    members: tuple[str, ...]
    evaluations: int


ENSEMBLES: dict[str, Ensemble] = {
    "labels": Ensemble(
        (
            *("llg", "llg_plus", "gradinversion_labels", "ilrg", "rlg", "llbg_aux", "zlg_plus"),
            "learned_labels",
        ),
        evaluations=0,
    ),
    "inputs": Ensemble(
        (
            "analytic",
            "inverting_gradients(steps=500)",
            "bayes_adaptive(steps=500)",
            "learning_to_invert(width=300, epochs=20, simulations=2000)",
        ),
        evaluations=500,
    ),
}
"""By target: labels by counting, linear systems and auxiliary data; inputs by quotients, matching and learning."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "floor": ("mean_image", "prior_labels", "random_image", "random_labels"),
    "counting": ("bias_count", "gradinversion_labels", "idlg", "llg", "llg_plus", "llg_star", "soft_label"),
    "linear system": ("fedavg_labels", "ilrg", "llbg", "llbg_aux", "rlg", "rlu", "zlg", "zlg_plus"),
    "analytic": ("analytic", "april", "cocktail_party", "r_gap", "spear"),
    "matching": (
        *("bayes_adaptive", "breaching_modern", "deep_image_prior", "dlg", "dlm", "dlm_plus", "fedavg_dimitrov"),
        *("gradinversion", "gradvit", "inverting_gradients", "sme"),
    ),
    "learned": ("learned_labels", "learning_to_invert"),
}
"""Attacks by the idea that they share: a defense that was attacked with one idea only may fall to another."""


def family(attack: str) -> str:
    """Return the family of an attack; one that is in none is its own."""
    return next((name for name, attacks in FAMILIES.items() if attack in attacks), attack)


def is_meant(expression: str) -> bool:
    """Whether an expression means the ensemble.

    Raises:
        UserError: It gives it parameters.
    """
    name, bracket, arguments = expression.strip().partition("(")
    if name.strip() != NAME:
        return False
    if bracket and arguments.strip() != ")":
        raise UserError(f"{expression!r}: expected {NAME} without parameters: its members are fixed; write {NAME}")
    return True


def spelled_out(expressions: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """Return expressions of attacks with the members for some targets in the place of the ensemble, each once.

    Args:
        expressions: Of attacks, `NAME` among them or not.
        targets: What is to be recovered.

    Raises:
        UserError: The ensemble is asked for, and has members for none of the targets.
    """
    found: list[str] = []
    for expression in expressions:
        if not is_meant(expression):
            found.append(expression)
            continue
        chosen = [ENSEMBLES[target] for target in targets if target in ENSEMBLES]
        if not chosen:
            raise UserError(
                f"{NAME!r} recovers {' and '.join(ENSEMBLES)}, expected an attack that recovers "
                f"{' or '.join(targets)}; see: leakbench list attacks"
            )
        found += [member for ensemble in chosen for member in ensemble.members]
    return tuple(dict.fromkeys(found))


def check_budget(target: str, evaluations: int | None) -> None:
    """Check that a suite lets members do what makes their scores comparable.

    Args:
        target: What the task asks for.
        evaluations: Gradient evaluations per trial that the suite allows; None: unlimited.

    Raises:
        UserError: It does not.
    """
    needed = ENSEMBLES[target].evaluations
    if evaluations is not None and evaluations < needed:
        raise UserError(
            f"{NAME}: expected a budget of at least {needed} model_evaluations, got {evaluations}: its numbers are of "
            f"that much work; write budget: {{model_evaluations: {needed}}}"
        )


def item() -> dict[str, Any]:
    """Return what `leakbench list attacks` and `leakbench show autoleak` say of it."""
    return {
        "name": NAME,
        "summary": f"A fixed ensemble of attacks without parameters, version {VERSION}: worst mean, worst per trial.",
        "version": VERSION,
        "needs": [],
        "recovers": list(ENSEMBLES),
        "params": {},
        "source_sha256": content_hash({target: asdict(ensemble) for target, ensemble in ENSEMBLES.items()}),
        "members": {target: list(ensemble.members) for target, ensemble in ENSEMBLES.items()},
        "model_evaluations": {target: ensemble.evaluations for target, ensemble in ENSEMBLES.items()},
        "floor": f"the same maximum over the same members against {CONTROL}, which suites get on their own",
        "reference": "leakbench; after Croce and Hein 2020, arXiv 2003.01690",
        "doc": __doc__ or "",
    }

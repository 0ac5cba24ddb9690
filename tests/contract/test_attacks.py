"""What holds for every baseline attack; a new file in baselines/attacks is tested without an edit here.

The laws are those of `leakbench check`, so that what is asked of a submission is what is asked of a baseline.
"""

from __future__ import annotations

import pytest
import tiny

from leakbench.submitting.attack_laws import ATTACK_LAWS
from leakbench.submitting.laws import Broken

KNOWN = {
    # Mended with the next version of that entry: its rows would change.
    ("breaching_modern", "degenerate_updates_give_finite_output"): "visible_loss overflows float32 on zeros",
}
"""The baselines that break a law, and how; each is expected to fail until it is mended, then to be taken out here."""


def tried(stem, cls, law):
    known = KNOWN.get((stem, law.name))
    marks = [pytest.mark.xfail(raises=Broken, reason=known, strict=True)] if known else []
    return pytest.param(cls, law, id=f"{stem}-{law.name}", marks=marks)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("cls", "law"), [tried(stem, cls, law) for stem, cls in tiny.entries("attacks") for law in ATTACK_LAWS]
)
def test_a_baseline_keeps_the_laws_of_a_submission(cls, law):
    law.check(cls)


def test_known_exceptions_are_of_entries_and_laws_that_exist():
    assert {stem for stem, _ in KNOWN} <= dict(tiny.entries("attacks")).keys()
    assert {name for _, name in KNOWN} <= {law.name for law in ATTACK_LAWS}


@pytest.mark.parametrize("name", ["analytic", "april", "r_gap", "spear"])
def test_closed_forms_are_held_to_the_bar_of_exact_attacks(name):
    assert dict(tiny.entries("attacks"))[name].exact

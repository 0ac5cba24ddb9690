"""The exceptions leakbench raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130
"""Exit code of a run that the user stopped."""


class LeakbenchError(Exception):
    """Root of every exception that leakbench raises on purpose."""


class UserError(LeakbenchError):
    """Something the user typed or supplied is wrong; the CLI prints it as one line and exits with 2.

    The message says what was expected, what was got and what to type next.
    """


class Unavailable(UserError):
    """Something that a task needs, a dataset or pretrained weights, cannot be had here; its rows say so."""


class NotGranted(LeakbenchError):
    """An entry read knowledge that the task's threat model does not grant."""


class NotApplicable(LeakbenchError):
    """Raised by `Attack.prepare`: the attack cannot work on such a task; its rows say so, with this reason."""


class InvalidOutput(LeakbenchError):
    """An entry returned a value of the wrong type, shape, dtype, size or range."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string.

    Args:
        name: What was typed.
        known: The names that would have been accepted.
    """
    close = difflib.get_close_matches(name.lower(), {k.lower(): k for k in known}, n=1, cutoff=0.55)
    if not close:
        return ""
    original = next(k for k in known if k.lower() == close[0])
    return f" Did you mean {original!r}?"


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that a registry does not hold.

    Args:
        kind: What the name should have been, e.g. ``"attack"``.
        name: What was typed.
        known: The names that would have been accepted.
    """
    names = sorted(known)
    listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return UserError(f"unknown {kind} {name!r}.{did_you_mean(name, names)} Known: {listed or 'none'}.")

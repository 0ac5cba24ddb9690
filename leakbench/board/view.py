"""What `leakbench board --measures` reads and writes: measures beside the rows of attacks in the same directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from leakbench.board.correlations import correlations
from leakbench.board.measure_text import TABLES
from leakbench.board.measures import missing, tables
from leakbench.errors import UserError
from leakbench.measures.consistency import Violation, violations
from leakbench.results import holds_rows, load_measures, load_rows, no_rows

PICTURES = (".svg", ".png")
"""Suffixes of a profile."""


@dataclass(frozen=True)
class Found:
    """What there is.

    Args:
        tables: What was asked for, by name of `leakbench.board.measure_text.TABLES`.
        kinds: The table of every kind.
        violations: Proved bounds that were exceeded.
    """

    tables: dict[str, pd.DataFrame]
    kinds: dict[str, pd.DataFrame]
    violations: list[Violation]


def read(out: Sequence[Path], only: str | None = None, *, layers: bool = True) -> Found:
    """Return what was measured under output directories.

    Args:
        out: The directories; those of attacks' rows may be others than those of measures.
        only: The one table that is wanted; None: all.
        layers: Whether proxies of single layers are correlated with attacks too.

    Raises:
        UserError: There are no rows of measures, or rows of another schema.
    """
    rows, measured = _load(out)
    kinds = tables(measured)
    found = kinds | {"missing": missing(measured)}
    if only in (None, "correlations"):
        found["correlations"] = correlations(rows, measured, layers=layers)
    shown = {name: found[name] for name in TABLES if only in (None, name)}
    return Found(shown, kinds, violations(rows, measured))


def exceeded(out: Sequence[Path]) -> list[Violation]:
    """Return the proved bounds that attacks' rows under output directories exceed.

    Raises:
        UserError: There are no rows of measures, or rows of another schema.
    """
    return violations(*_load(out))


def _load(out: Sequence[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    measured = load_measures(out)
    attacked = [folder for folder in out if holds_rows(folder)]
    return load_rows(attacked) if attacked else no_rows(), measured


def write_profile(kinds: dict[str, pd.DataFrame], to: Path) -> None:
    """Draw the layer profile.

    Args:
        kinds: What `leakbench.board.measures.tables` returns.
        to: The file, of one of `PICTURES`.

    Raises:
        UserError: There is nothing to draw, or the file cannot be written.
    """
    from leakbench.board.profile import render

    picture = render(kinds, to.suffix.lower()[1:])
    try:
        to.write_bytes(picture)
    except OSError as error:
        raise UserError(f"--profile {to}: cannot be written ({error.strerror}); use another file") from None

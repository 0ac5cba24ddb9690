"""What `leakbench board --measures` reads, prints and draws: measures beside rows of attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

from leakbench.board import measure_text
from leakbench.board.correlations import correlations
from leakbench.board.measures import missing, tables
from leakbench.errors import UserError, unknown
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


def show(out: Sequence[Path], form: str | None, only: str | None, profile: Path | None) -> list[Violation]:
    """Print what was measured under output directories, draw its profile, and return what exceeds a proved bound.

    Args:
        out: The directories.
        form: ``json``, ``csv``, ``markdown``, or None for the terminal.
        only: The one table that is wanted; None: all.
        profile: File of the picture; None: beside the rows where all is printed to the terminal, else no picture.

    Raises:
        UserError: There are no rows of measures, a name is unknown, or the picture asked for cannot be had.
    """
    if only is not None and only not in measure_text.TABLES:
        raise unknown("table", only, measure_text.TABLES)
    if profile is not None and profile.suffix.lower() not in PICTURES:
        raise UserError(f"--profile {profile}: expected a .svg or .png file; write --profile profile.svg")
    found = read(out, only, layers=form in ("json", "csv"))
    if form is None:
        measure_text.terminal(found.tables)
    else:
        write = {"json": measure_text.to_json, "markdown": measure_text.markdown, "csv": measure_text.to_csv}[form]
        click.echo(write(found.tables).rstrip("\n"))
    if profile is not None or (form is None and only is None):
        to = profile or out[0] / "profile.svg"
        try:
            write_profile(found.kinds, to)
            click.echo(f"layer profile: {to}", err=form is not None)
        except UserError as error:
            if profile is not None:
                raise
            click.echo(f"no layer profile: {error}", err=True)
    return found.violations


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
    shown = {name: found[name] for name in measure_text.TABLES if only in (None, name)}
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

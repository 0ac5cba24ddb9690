"""What `leakbench board --defenses` reads, prints and draws."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import pandas as pd

from leakbench.board import defense_text
from leakbench.board.curves import board
from leakbench.board.view import PICTURES
from leakbench.entries import Description, try_describe
from leakbench.errors import UserError, unknown
from leakbench.results import holds_rows, holds_utility, load_rows, load_utility
from leakbench.sources import sources


def show(out: Sequence[Path], form: str | None, only: str | None, pareto: Path | None) -> None:
    """Print the board of defenses of the rows under output directories, and draw it.

    Args:
        out: The directories; those of attacks' rows may be others than those of trainings.
        form: ``json``, ``csv``, ``markdown``, or None for the terminal.
        only: The one table that is wanted; None: all, of CSV the settings.
        pareto: File of the picture; None: none.

    Raises:
        UserError: There are no rows, a name is unknown, or the picture asked for cannot be had.
    """
    if only is not None and only not in defense_text.COLUMNS:
        raise unknown("table", only, defense_text.COLUMNS)
    if pareto is not None and pareto.suffix.lower() not in PICTURES:
        raise UserError(f"--pareto {pareto}: expected a .svg or .png file; write --pareto pareto.svg")
    tables = read(out)
    only = only or ("settings" if form == "csv" else None)
    shown = {name: tables[name] for name in defense_text.COLUMNS if only in (None, name)}
    if form is None:
        defense_text.terminal(shown)
    else:
        write = {"json": defense_text.to_json, "markdown": defense_text.markdown, "csv": defense_text.to_csv}[form]
        click.echo(write(shown).rstrip("\n"))
    if pareto is not None:
        from leakbench.board.pareto import render

        picture = render(tables["settings"], pareto.suffix.lower()[1:])
        try:
            pareto.write_bytes(picture)
        except OSError as error:
            raise UserError(f"--pareto {pareto}: cannot be written ({error.strerror}); use another file") from None
        click.echo(f"picture: {pareto}", err=form is not None)


def read(out: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """Return the tables of the board of defenses by name; see `leakbench.board.curves.board`.

    Raises:
        UserError: There are no rows of attacks, or rows of another schema.
    """
    rows = load_rows([folder for folder in out if holds_rows(folder)] or out)
    trained = [folder for folder in out if holds_utility(folder)]
    named = {name for text in rows["defense_adaptive"].unique() for part in json.loads(text) for name in part}
    return board(rows, load_utility(trained) if trained else None, recovered(named))


def recovered(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return what installed attacks recover, by name; others are left out."""
    registry = sources("attack")
    found = [registry.get(name) for name in sorted(names) if name in registry]
    answers = zip(found, try_describe(found), strict=True)
    return {source.name: answer.recovers for source, answer in answers if isinstance(answer, Description)}

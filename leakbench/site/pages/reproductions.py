"""Papers' figures and claims beside ours: what `leakbench reproduce` wrote into results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from leakbench.site.data import Data, slug
from leakbench.site.page import Page
from leakbench.site.table import Column, Line, Table, Value

_FIGURES = ("setting", "attack", "defense", "metric", "reference", "ours", "low", "high", "n", "difference", "verdict")
_NUMBERS = frozenset(
    {"reference", "ours", "low", "high", "n", "difference", "more", "less", "agree", "differ", "undecided"}
)
_CLAIMS = ("claim", "verdict", "agree", "differ", "undecided", "source")


def pages(data: Data) -> Iterator[Page]:
    """Yield the page of reproductions."""
    tables = [table for folder in data.folders for table in _of_folder(folder)]
    intro = ["A figure agrees where it differs from ours by no more than sampling explains (95%)."]
    empty = "No paper was reproduced into these results; run, for instance: leakbench reproduce ilrg --quick"
    yield Page("reproductions.html", "Reproductions", context={"intro": intro, "tables": tables, "empty": empty})


def _of_folder(folder: Path) -> Iterator[Table]:
    """Yield the tables of a folder; a file that cannot be read is left out, as if it were not there."""
    command = f"Written by leakbench reproduce {folder.name.removesuffix('-quick')}."
    for stem, key, columns in (("reproduction", None, _FIGURES), ("claims", "claims", _CLAIMS)):
        try:
            found = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
            lines = found if key is None else found[key]
            table = [[_value(line.get(column), column) for column in columns] for line in lines]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        counts = pd.Series([str(line.get("verdict")) for line in lines]).value_counts()
        caption = f"{folder.name}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        yield Table(
            slug(f"{stem}-{folder.name}"),
            caption,
            [Column(name, name in _NUMBERS, choose=name in ("verdict", "metric", "attack")) for name in columns],
            [Line(values, str(i)) for i, values in enumerate(table)],
            [command],
            compare=True,
        )


def _value(value: Any, column: str) -> Value:
    if value is None or value != value:
        return Value("–")
    if column in _NUMBERS:
        return Value(f"{value:.4g}", float(value))
    return Value(str(value), style=f"verdict-{value}" if value in ("agrees", "differs") else "")

"""Papers' figures and claims beside ours: what `leakbench reproduce` wrote into results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from leakbench.board.reproduction import NO_FIGURE
from leakbench.site.data import Data, cell_page, slug, task_page
from leakbench.site.page import Page
from leakbench.site.pages.measured import behind
from leakbench.site.table import Column, Line, Table, Value

PATH = "reproductions.html"
"""Where they are."""

_FIGURES = ("setting", "attack", "defense", "metric", "reference", "ours", "low", "high", "n", "difference", "verdict")
_NUMBERS = frozenset(
    {"reference", "ours", "low", "high", "n", "difference", "more", "less", "agree", "differ", "undecided"}
)
_CLAIMS = ("claim", "verdict", "agree", "differ", "undecided", "source")
_COMPARED = ("setting", "claim", "quantity", "more", "less", "difference", "low", "high", "n", "verdict", "note")
_FILES = (
    ("reproduction", None, _FIGURES),
    ("claims", "claims", _CLAIMS),
    ("claims", "comparisons", _COMPARED),
)
_NAMED = ("setting", "claim", "attack", "defense", "metric", "quantity", "note")
"""What tells lines of a table apart."""
_CHOICES = frozenset({"verdict", "metric", "attack", "quantity"})
_LINKED = frozenset({"ours", "low", "high", "n", "difference", "more", "less"})


def pages(data: Data) -> Iterator[Page]:
    """Yield the page of reproductions."""
    cells = _cells(data)
    found = [part for folder in data.folders for part in _of_folder(folder, cells, data)]
    told = [part for part in found if isinstance(part, str)]
    tables = [part for part in found if not isinstance(part, str)]
    intro = [
        "A figure agrees where it differs from ours by no more than sampling explains (95%); a claim, where two thirds "
        "of its comparisons do. Figures lead to the rows of their setting, comparisons to the values measured there.",
        *told,
    ]
    empty = (
        "No figure to compare with."
        if told
        else "No paper was reproduced into these results; run, for instance: leakbench reproduce ilrg --quick"
    )
    yield Page(PATH, "Reproductions", context={"intro": intro, "tables": tables, "empty": empty})


def _cells(data: Data) -> dict[tuple[str, str, str], str]:
    """Return where the rows of a task, attack and defense are, by id and labels; of several cells the last."""
    columns = ["task", "attack_label", "defense_label", "id"]
    return {(t, a, d): cell_page(i) for t, a, d, i in data.board[columns].itertuples(index=False, name=None)}


def _of_folder(folder: Path, cells: dict[tuple[str, str, str], str], data: Data) -> Iterator[Table | str]:
    """Yield the tables of a folder, and a sentence on what cannot be compared.

    A file that cannot be read is left out, as if it were not there.
    """
    paper = folder.name.removesuffix("-quick")
    quick = " --quick" if paper != folder.name else " (or with --quick: fewer cells and trials)"
    command = f"Written by: leakbench reproduce {paper}{quick}"
    comparisons = f"{PATH}#{slug(f'comparisons-{folder.name}')}"
    for stem, key, columns in _FILES:
        try:
            found = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
            every = found if key is None else found[key]
            lines = [line for line in every if line.get("verdict") != NO_FIGURE]
            table = [_line(line, columns, cells, data, comparisons) for line in lines]
            counts = pd.Series([str(line.get("verdict")) for line in lines]).value_counts()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if left := len(every) - len(lines):
            figures = "1 figure" if left == 1 else f"{left:,} figures"
            yield f"{folder.name}: {figures} of the paper not at hand; our numbers are on the pages of the tasks."
        if not lines:
            continue
        caption = f"{folder.name}{'' if key is None else f', {key}'}: "
        yield Table(
            slug(f"{key or stem}-{folder.name}"),
            caption + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
            [Column(name, name in _NUMBERS, choose=name in _CHOICES) for name in columns],
            [Line(values, _key(line)) for line, values in zip(lines, table, strict=True)],
            [command],
            compare=True,
        )


def _key(line: dict[str, Any]) -> str:
    return slug(" ".join(str(line.get(key)) for key in _NAMED))


def _line(
    line: dict[str, Any], columns: tuple[str, ...], cells: dict[tuple[str, str, str], str], data: Data, comparisons: str
) -> list[Value]:
    ours = cells.get((str(line.get("task")), str(line.get("attack")), str(line.get("defense"))))
    links = dict.fromkeys(_LINKED, ours) | dict.fromkeys(("agree", "differ", "undecided"), comparisons)
    if "quantity" in line:
        more, less = compared(str(line.get("setting")), str(line["quantity"]), data)
        links |= dict.fromkeys(_LINKED, more) | {"less": less}
    return [_value(line.get(column), column, links.get(column)) for column in columns]


def compared(setting: str, quantity: str, data: Data) -> tuple[str | None, str | None]:
    """Return where the values of the two numbers of a comparison are; see `leakbench.board.claims`.

    Args:
        setting: ``TASK`` of two groups of layers, ``TASK: none against DEFENSE``, or ``TASK: AXIS A against B``.
        quantity: What is compared.
        data: The data.
    """
    task, _, sides = setting.partition(": ")
    first = task.partition(" ")[0]
    one, _, other = sides.partition(" against ")
    *axis, level = one.split(" ")
    if not sides:
        pairs: list[tuple[str, str | None]] = [(task, None), (task, None)]
    elif not axis:
        pairs = [(first, "none"), (first, other)]
    else:
        forms = {"batch_size": "-b{}-", "local_steps": "-delta{}-"}
        form = forms.get(" ".join(axis))
        second = first.replace(form.format(level), form.format(other)) if form else ""
        if axis == ["clients"]:
            second = first.replace("-gradient-", f"-gradient-k{other}-")
        pairs = [(first, "none"), (second, "none")]
    found = [_measured(name.partition(" ")[0], defense, quantity, data) for name, defense in pairs]
    return found[0], found[1]


def _measured(task: str, defense: str | None, quantity: str, data: Data) -> str | None:
    for table in data.measures.values():
        own = table[(table["task"] == task) & (table["quantity"] == quantity)]
        own = own if defense is None else own[own["defense_label"] == defense]
        if len(own):
            return behind(own.iloc[0])
    hashes = data.board.loc[data.board["task"] == task, "task_hash"]
    return task_page(task, str(hashes.iloc[0])) if len(hashes) else None


def _value(value: Any, column: str, href: str | None) -> Value:
    if value is None or value != value:
        return Value("–")
    if column in _NUMBERS:
        return Value(f"{value:.4g}", float(value), href)
    style = f"verdict-{value}" if value in ("agrees", "differs") else "wide" if column in ("setting", "claim") else ""
    return Value(str(value), href=href, style=style)

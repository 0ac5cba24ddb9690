"""A reproduction's table as text: terminal, Markdown and JSON. rich is imported by the terminal only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from leakbench.board.render import markdown_lines

if TYPE_CHECKING:
    from leakbench.reproduce import References

NO_FIGURE = "figure not at hand"
"""Verdict on a cell whose figure cannot be backed."""


def to_json(table: pd.DataFrame) -> str:
    """Return the table as a JSON list of lines; what is missing is null."""
    return json.dumps(json.loads(table.to_json(orient="records")), indent=2) + "\n"


def to_markdown(table: pd.DataFrame, references: References) -> str:
    """Return the table as Markdown, with the counts of the verdicts above it."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    keys = (
        "setting",
        "attack",
        "defense",
        "metric",
        "reference",
        "ours",
        "n",
        "chance",
        "difference",
        "verdict",
        "note",
    )
    rows = [keys, ["---"] * len(keys), *([line[key] for key in keys] for line in shown(table))]
    return "\n".join([references.paper, "", references.provenance, "", counts, "", *markdown_lines(rows)]) + "\n"


def shown(table: pd.DataFrame) -> list[dict[str, str]]:
    """Return the lines as texts by column; ``ours`` holds the interval, ``reference`` the tag."""

    def text(value: Any) -> str:
        return "" if value is None or pd.isna(value) else str(value)

    def number(value: Any, form: str) -> str:
        return "" if value is None or pd.isna(value) else format(value, form)

    result = []
    for line in table.to_dict(orient="records"):
        texts = {str(key): text(value) for key, value in line.items()}
        numbers = dict.fromkeys(("reference", "ours", "low", "high"), ".3f") | {"chance": ".2f", "difference": "+.3f"}
        texts |= {key: number(line[key], form) for key, form in numbers.items()}
        texts |= {key: number(line[key], ".0f") for key in ("n", "reference_n")}
        if texts["low"]:
            texts["ours"] += f" [{texts['low']}, {texts['high']}]"
        if texts["reference"]:
            texts["reference"] += f" {texts['tag']}"
        result.append(texts)
    return result


_SHORT = {"class_accuracy": "LeAcc", "count_accuracy": "LnAcc", "irec": "IRec", "instance_recall": "ASR"}
"""What papers call the metrics."""


def print_table(table: pd.DataFrame, references: References) -> None:
    """Print the table to the terminal, setting by setting, and the counts of the verdicts."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(references.paper, style="bold"), Text(references.provenance), "", sep="\n")
    colors = {"agrees": "green", "differs": "red"}
    notes: dict[str, int] = {}
    before = None
    form = "  {:<20.20} {:<5.5} {:>9} {:>20} {:>6} {:>6} "
    console.print(
        Text(form.format("attack", "", "reference", "ours [95%]", "chance", "diff") + "verdict", style="dim"),
        soft_wrap=True,
    )
    for line in shown(table):
        setting = line["setting"] + (f" vs {line['defense']}" if line["defense"] not in ("", "none") else "")
        if setting != before:
            before = setting
            console.print(Text(setting, style="bold"))
        verdict = "no figure" if line["verdict"] == NO_FIGURE else line["verdict"]
        if line["note"]:
            verdict += f" ({notes.setdefault(line['note'], len(notes) + 1)})"
        metric = _SHORT.get(line["metric"], line["metric"])
        columns = (line["attack"], metric, *(line[key] for key in ("reference", "ours", "chance", "difference")))
        style = colors.get(line["verdict"], "dim")
        console.print(Text(form.format(*columns)).append(verdict, style=style), soft_wrap=True)
    for note, number in notes.items():
        console.print(Text(f"({number}) {note}"))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    names = ", ".join(f"{short} is {name}" for name, short in _SHORT.items())
    console.print(Text(f"verdicts: {counts}\n{names}; an attack's name may be cut: see the written table"))

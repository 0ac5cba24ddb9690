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


def claims_markdown(summary: pd.DataFrame, table: pd.DataFrame, references: References) -> str:
    """Return the verdicts on a work's claims as Markdown, the comparisons behind them below."""
    parts = [references.paper, "", references.provenance, ""]
    for frame in (summary, table):
        texts = [[_cell(value) for value in line] for line in frame.itertuples(index=False)]
        parts += [*markdown_lines([list(frame.columns), ["---"] * len(frame.columns), *texts]), ""]
    return "\n".join(parts)


def _cell(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:.3f}" if isinstance(value, float) else str(value)


def print_claims(summary: pd.DataFrame, table: pd.DataFrame) -> None:
    """Print the verdict on every claim to the terminal, and the comparisons that are behind it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    colors = {"agrees": "green", "differs": "red"}
    for claim in summary.to_dict(orient="records"):
        console.print(
            Text(f"{claim['claim']}: ", style="bold").append(
                claim["verdict"], style=colors.get(claim["verdict"], "yellow")
            ),
            Text(f"  {claim['agree']} comparisons agree, {claim['differ']} differ, {claim['undecided']} are undecided"),
            sep="\n",
        )
        for line in table[table["claim"] == claim["claim"]].to_dict(orient="records"):
            numbers = f"{line['more']:9.3g} against {line['less']:9.3g}, {line['difference']:+9.3g} "
            numbers += f"[{line['low']:+.3g}, {line['high']:+.3g}] n={line['n']}"
            note = f"  ({line['note']})" if line["note"] else ""
            text = Text(f"  {line['quantity']:<24.24} {numbers} ").append(
                line["verdict"], style=colors.get(line["verdict"], "")
            )
            console.print(text.append(f"  {line['setting']}{note}", style="dim"), soft_wrap=True)


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

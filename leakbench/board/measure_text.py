"""Measures as text: terminal, Markdown, CSV and JSON, a table per kind and quantity. rich is for the terminal only."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from leakbench.board.correlations import CORRELATION_COLUMNS
from leakbench.board.measures import KINDS, MEASURE_KEYS, MISSING_COLUMNS, VALUE_COLUMNS, ordered, pattern, variants
from leakbench.board.render import markdown_lines
from leakbench.board.score import group_ids
from leakbench.board.stats import CONFIDENCE, RESAMPLES
from leakbench.errors import UserError
from leakbench.measures.catalogue import MEASURES, Quantity

if TYPE_CHECKING:
    from rich.console import Console

TABLES = (*KINDS, "correlations", "missing")
"""Every table, in the order of printing."""

HEADINGS = {
    "lower_bound": "Lower bounds: what attackers got, so that at least this leaks",
    "proxy": "Proxies: local numbers without an attacker, which bound nothing",
    "proved_bound": "Proved bounds: what no attacker can exceed, under the assumptions that each names",
    "correlations": "Do proxies tell how well attacks do? Spearman's rank correlation over trials, whole update",
    "missing": "Not measured",
}

WIDTH = 100
"""Columns of a terminal that tables fit."""

_LONGEST_LAYER = 30
_HEADING = 20  # longest line of a heading


@dataclass(frozen=True)
class Sheet:
    """One printed table.

    Args:
        table: Which of `TABLES` it belongs to.
        title: What it is about.
        header: Headings; the first column holds texts, the others numbers.
        lines: Texts, as many as headings.
        notes: What the reader has to know.
        texts: Whether the other columns hold texts too.
    """

    table: str
    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)
    texts: bool = False


def number(value: Any) -> str:
    """Return three significant digits, or ``-``."""
    return "-" if pd.isna(value) else f"{value:#.3g}".removesuffix(".") if abs(value) < 1000 else f"{value:.4g}"


def with_interval(value: Any, low: Any, high: Any) -> str:
    """Return the value with its interval, if it has one."""
    text = number(value)
    return text if pd.isna(low) or text == "-" else f"{text} [{number(low)}, {number(high)}]"


def sheets(tables: dict[str, pd.DataFrame]) -> Iterator[Sheet]:
    """Yield the printed tables: one per measure, quantity and net, a line per layer, a column per task and defense.

    Args:
        tables: By name of `TABLES`; what is left out is not printed.
    """
    for kind in KINDS:
        if kind not in tables:
            continue
        table = tables[kind].sort_values([*MEASURE_KEYS, "net"], kind="stable")
        for _, part in table.groupby(group_ids(table, MEASURE_KEYS)):
            for quantity in MEASURES.get(part["measure"].iloc[0]).quantities:
                own = [lines for _, lines in part[part["quantity"] == quantity.name].groupby("net", sort=False)]
                for i, lines in enumerate(own):
                    yield _layers(kind, lines, quantity, last=i == len(own) - 1)
    if "correlations" in tables:
        yield from _correlations(tables["correlations"])
    if "missing" in tables and len(tables["missing"]):
        yield _missing(tables["missing"])


def _layers(kind: str, part: pd.DataFrame, quantity: Quantity, *, last: bool) -> Sheet:
    first = part.iloc[0]
    part = part.assign(_variant=variants(part))
    columns = ordered(part, "_variant")
    depths = part.groupby("layer")["depth"].first()
    layers = sorted(depths.index, key=lambda layer: (not pd.isna(depths[layer]), depths[layer]))
    values = {
        (line["layer"], line["_variant"]): with_interval(line["value"], line["low"], line["high"])
        for line in part.to_dict("records")
    }
    unit = "" if quantity.unit == "1" else f" [{quantity.unit}]"
    way = {True: "more is more leakage", False: "less is more leakage", None: "no way is more leakage"}
    notes = [
        ("fitted, " if first["fitted"] else "means over trials, ")
        + (f"{CONFIDENCE:.0%} intervals, " if part["low"].notna().any() else "")
        + _count(part["n"])
        + f"; layers from input to output; {pattern(part)}"
    ]
    if last:
        notes.append(f"{quantity.name}: {quantity.description}; {way[quantity.more_leaks]}")
    return Sheet(
        table=kind,
        title=f"{quantity.name}{unit}  {first['net']}  ({first['measure_label']})",
        header=["layer", *columns],
        lines=[[_layer(layer), *(values.get((layer, column), "-") for column in columns)] for layer in layers],
        notes=notes,
    )


def _count(numbers: pd.Series[Any]) -> str:
    least, most = int(numbers.min()), int(numbers.max())
    return f"n {least}" if least == most else f"n {least} to {most}"


def _layer(name: str) -> str:
    return name if len(name) <= _LONGEST_LAYER else f"…{name[1 - _LONGEST_LAYER :]}"


def _correlations(table: pd.DataFrame) -> Iterator[Sheet]:
    # Proxies without a value for the whole update, and those that tell no more from less, stay in JSON and CSV.
    table = table[table["depth"].isna() & table["expected"].notna()]
    table = table.assign(
        _proxy=table["quantity"] + table["measure_label"].str.extract(r"(\(.*)", expand=False).fillna("")
    )
    for _, part in table.groupby(group_ids(table, ("net", "metric"))):
        first = part.iloc[0]
        names = part["attack"].where(
            part.groupby("attack")["attack_label"].transform("nunique") == 1, part["attack_label"]
        )
        part = part.assign(_variant=names + " " + variants(part))
        columns = list(dict.fromkeys(part["_variant"]))
        values = {(line["_proxy"], line["_variant"]): _rho(line) for line in part.to_dict("records")}
        proxies = list(dict.fromkeys(part["_proxy"]))
        yield Sheet(
            table="correlations",
            title=f"{first['metric']}  {first['net']}",
            header=["proxy", *columns],
            lines=[[proxy, *(values.get((proxy, column), "-") for column in columns)] for proxy in proxies],
            notes=[
                f"{CONFIDENCE:.0%} intervals; ✓: on the side of 0 where more leaks, ✗: on the other; of many one in "
                f"twenty is by chance; {_count(part['n'])}; layer by layer: --json, --csv"
            ],
        )


def _rho(line: dict[Any, Any]) -> str:
    if line["passes"] is None or pd.isna(line["low"]):
        return f"{line['spearman']:.2f}" if not pd.isna(line["spearman"]) else "-"
    wrong = line["high"] < 0 if line["expected"] > 0 else line["low"] > 0
    mark = "✓" if line["passes"] else "✗" if wrong else " "
    return f"{line['spearman']:.2f} [{line['low']:.2f}, {line['high']:.2f}] {mark}"


def _missing(table: pd.DataFrame) -> Sheet:
    lines = [
        [net, variant, line["measure_label"], line["status"], str(line["trials"]), line["error"] or ""]
        for net, variant, line in zip(table["net"], variants(table), table.to_dict("records"), strict=True)
    ]
    header = ["net", "task", "measure", "status", "trials", "reason"]
    return Sheet("missing", f"{len(lines)} combinations of task, defense and measure", header, lines, texts=True)


# --- forms ------------------------------------------------------------------------------------------------------------


def terminal(tables: dict[str, pd.DataFrame], console: Console | None = None) -> None:
    """Print the tables, whole update first; one that is wider than `WIDTH` goes on below.

    Args:
        tables: By name of `TABLES`; what is left out is not printed.
        console: Where to; standard output by default.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    before = None
    for sheet in sheets(tables):
        if sheet.table != before:
            before = sheet.table
            console.print()
            console.print(Text(HEADINGS[before], style="bold reverse"), soft_wrap=True)
        console.print()
        console.print(Text(sheet.title, style="bold"), soft_wrap=True)
        for lines in _lines(sheet):
            console.print(Text("\n".join(lines)), soft_wrap=True)
        for note in sheet.notes:
            console.print(Text("\n".join(textwrap.wrap(note, WIDTH)), style="dim"), soft_wrap=True)


def _lines(sheet: Sheet) -> Iterator[list[str]]:
    """Yield the lines of parts that fit `WIDTH`, each beginning with the first column."""
    if sheet.texts:
        yield [
            line
            for texts in sheet.lines
            for line in textwrap.wrap("  ".join(texts), WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        ]
        return
    cells = [[textwrap.wrap(heading, _HEADING) for heading in sheet.header]]
    cells += [[[text] for text in line] for line in sheet.lines]
    widths = [max(len(text) for row in cells for text in row[i]) for i in range(len(sheet.header))]
    parts: list[list[int]] = []
    for i, width in enumerate(widths[1:], 1):
        if not parts or widths[0] + sum(2 + widths[j] for j in parts[-1]) + 2 + width > WIDTH:
            parts.append([])
        parts[-1].append(i)
    for part in parts:
        lines = []
        for row in cells:
            height = max(len(row[i]) for i in (0, *part))
            filled = {i: [""] * (height - len(row[i])) + row[i] for i in (0, *part)}
            for texts in range(height):
                rest = "".join("  " + filled[i][texts].rjust(widths[i]) for i in part)
                lines.append((filled[0][texts].ljust(widths[0]) + rest).rstrip())
        yield lines


def markdown(tables: dict[str, pd.DataFrame]) -> str:
    """Return the tables as Markdown, a chapter per kind."""
    parts: list[str] = []
    before = None
    for sheet in sheets(tables):
        if sheet.table != before:
            before = sheet.table
            parts.append(f"## {HEADINGS[before]}")
        right = "---" if sheet.texts else "---:"
        rows = [sheet.header, ["---", *(right for _ in sheet.header[1:])], *sheet.lines]
        parts.append("\n".join([f"### {sheet.title}", "", *markdown_lines(rows)]))
        parts += [f"*{note}*" for note in sheet.notes]
    return "\n\n".join(parts) + "\n"


def to_json(tables: dict[str, pd.DataFrame]) -> str:
    """Return every column of every table as JSON; what is unknown is null.

    Returns:
        ``{"meta": ..., TABLE: [...], ...}``
    """
    meta = {
        "headings": HEADINGS,
        "columns": VALUE_COLUMNS,
        "correlation_columns": CORRELATION_COLUMNS,
        "missing_columns": MISSING_COLUMNS,
        "quantities": {
            quantity.name: {"kind": quantity.kind, "unit": quantity.unit, "description": quantity.description}
            for name in sorted(MEASURES.names())
            for quantity in MEASURES.get(name).quantities
        },
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }
    lines = {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}
    return json.dumps({"meta": meta, **lines}, indent=1)


def to_csv(tables: dict[str, pd.DataFrame]) -> str:
    """Return every column of the one table that has lines as CSV.

    Raises:
        UserError: Several have; kinds share no table.
    """
    filled = [name for name, table in tables.items() if len(table)]
    if len(filled) > 1:
        raise UserError(f"--csv: expected one table, got {', '.join(filled)}; choose with --table {filled[0]}")
    return str(tables[filled[0] if filled else next(iter(tables))].to_csv(index=False))

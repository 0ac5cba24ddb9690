"""What pages show tables with: plain values that a template turns into complete HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd


class Value(NamedTuple):
    """What stands in one place of a table.

    Args:
        text: As it is read.
        sort: What it is sorted by, if not by the text.
        href: Where it leads, from the root of the site.
        style: Class of the place.
        extra: Smaller text behind it.
        parts: What that text says, by name: columns of their own in a CSV.
    """

    text: str
    sort: float | str | None = None
    href: str | None = None
    style: str = ""
    extra: str = ""
    parts: Mapping[str, float | None] = MappingProxyType({})


class Column(NamedTuple):
    """One column.

    Args:
        title: Its heading.
        number: Whether it holds numbers.
        choose: Whether readers can keep the lines of one of its values.
        note: Unit and direction, as text.
    """

    title: str
    number: bool = False
    choose: bool = False
    note: str = ""


class Chart(NamedTuple):
    """A picture above a table.

    Args:
        svg: What `leakbench.site.charts` drew.
        caption: What it shows and how it is read.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class Line:
    """One line of a table; the first value is its heading.

    Args:
        values: One per column.
        key: Its name in permalinks.
        group: Rank group, for shading; 0: none.
    """

    values: Sequence[Value]
    key: str = ""
    group: int = 0


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        id: Name in the page and in permalinks.
        caption: What it shows.
        columns: Its columns.
        lines: Its lines.
        notes: What readers have to know.
        compare: Whether lines can be put side by side.
        pairs: Of compared lines, by key of both: difference with its interval, as text.
        charts: Pictures above it.
    """

    id: str
    caption: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    notes: Sequence[str] = ()
    compare: bool = False
    pairs: dict[str, str] = field(default_factory=dict)
    charts: Sequence[Chart] = ()


def digits(value: Any, places: int) -> str:
    """Return a number with so many decimals, or a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:z.{places}f}"


def places(target: str) -> int:
    """Return the decimals of a target's metrics: dB have one."""
    return 1 if target == "inputs" else 2


def number(value: Any, decimals: int, href: str | None = None) -> Value:
    """Return a number; those that are missing sort last."""
    return Value(digits(value, decimals), _order(value), href)


def interval(value: Any, low: Any, high: Any, decimals: int, href: str | None = None) -> Value:
    """Return a number with its interval behind it."""
    text = digits(value, decimals)
    extra = "" if text == "–" else f"[{digits(low, decimals)}, {digits(high, decimals)}]" if pd.notna(low) else "[?]"
    return Value(text, _order(value), href, extra=extra, parts={"low": _order(low), "high": _order(high)})


def whole(value: Any, href: str | None = None) -> Value:
    """Return a whole number."""
    return Value("–" if pd.isna(value) else f"{int(value):,}", _order(value), href)


def rank(line: Any, href: str | None = None) -> Value:
    """Return the rank group of a line of a board, with the interval of its rank."""
    if pd.isna(line["rank_group"]):
        return Value("–")
    low, high = line["rank_low"], line["rank_high"]
    ranks = "" if pd.isna(low) else f"rank {low:.0f}" if low == high else f"rank {low:.0f}–{high:.0f}"
    parts = {"low": _order(low), "high": _order(high)}
    return Value(f"{line['rank_group']:.0f}", float(line["rank_group"]), href, extra=ranks, parts=parts)


def _order(value: Any) -> float | None:
    return float(value) if pd.notna(value) and math.isfinite(value) else None


def of_frame(
    name: str, caption: str, frame: pd.DataFrame, titles: dict[str, str], show: Callable[[Any], str] | None = None
) -> Table:
    """Return a plain table of a frame's columns, numbers with three significant digits."""
    show = show or (lambda value: "–" if pd.isna(value) else f"{value:.3g}")
    numeric = {key: pd.api.types.is_numeric_dtype(frame[key]) and frame[key].dtype != bool for key in titles}

    def value(key: str, cell: Any) -> Value:
        if numeric[key]:
            return Value(show(cell), _order(cell))
        return Value("–" if cell is None or cell is pd.NA or cell != cell else str(cell))

    lines = [
        Line([value(key, cell) for key, cell in zip(titles, record, strict=True)], key=str(i))
        for i, record in enumerate(frame[list(titles)].itertuples(index=False, name=None))
    ]
    return Table(name, caption, [Column(title, numeric[key]) for key, title in titles.items()], lines)

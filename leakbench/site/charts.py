"""Charts as inline SVG: shapes and classes, colors from the stylesheet, text as text, a description in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

_WIDTH, _LINE, _LEFT, _RIGHT = 720, 22, 240, 20
_SHAPES = 6
MOST_SERIES = 8
"""Most series of a chart: as many as there are colors that color-blind people tell apart."""


class Interval(NamedTuple):
    """One line of `forest`: a value and its ends; NaN where there are none."""

    label: str
    value: float
    low: float
    high: float


class Point(NamedTuple):
    """One point of `curves`; one without a mark only bends the line."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    label: str = ""
    mark: bool = True


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _svg(name: str, width: float, height: float, title: str, text: str, parts: Sequence[str]) -> Markup:
    head = (
        f'<svg role="img" aria-labelledby="{escape(name)}-t {escape(name)}-d" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" xmlns="http://www.w3.org/2000/svg">'
    )
    told = f'<title id="{escape(name)}-t">{escape(title)}</title><desc id="{escape(name)}-d">{escape(text)}</desc>'
    return Markup(head + told + "".join(parts) + "</svg>")  # noqa: S704 (every text went through escape)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round values between two ends."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * k for k in (1, 2, 5, 10) if span / (step * k) <= most)
    return [round(step * i, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values between 10**low and 10**high: powers of ten, of a short axis also twice and five times."""
    powers = range(math.floor(low), math.floor(high) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**t for t in powers for factor in factors if low <= math.log10(factor) + t <= high]
        if len(found) > 2:
            break
    return found


def forest(name: str, title: str, axis: str, lines: Sequence[Interval], zero: str = "chance") -> Markup:
    """Return values with their intervals, one below the other, and a line at 0."""
    known = [v for line in lines for v in line[1:] if not math.isnan(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    low, high = low - 0.03 * (high - low or 1), high + 0.03 * (high - low or 1)
    top, bottom = 8, 8 + _LINE * len(lines)
    labels = [line.label if len(line.label) <= 32 else f"{line.label[:31]}…" for line in lines]
    left = min(_LEFT, 16 + 7 * max(map(len, labels), default=0))

    def place(value: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * (value - low) / (high - low)

    parts = [_line(place(t), top, place(t), bottom, "grid") for t in ticks(low, high)]
    parts += [_text(place(t), bottom + 15, f"{t:g}", "middle", "tick") for t in ticks(low, high)]
    parts.append(_line(place(0), top, place(0), bottom, "zero"))
    parts.append(_text(_WIDTH - _RIGHT, bottom + 32, f"{axis}; 0 is {zero}", "end", "tick"))
    for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
        y = top + _LINE * (i + 0.5)
        parts.append(_text(left - 8, y + 4, label, "end"))
        if not math.isnan(line.low):
            parts.append(_line(place(line.low), y, place(line.high), y, "bar s0"))
        if not math.isnan(line.value):
            parts.append(f'<circle cx="{place(line.value):.1f}" cy="{y:.1f}" r="4" class="dot s0"/>')
    words = " ".join(f"{line.label}: {line.value:.2f} [{line.low:.2f}, {line.high:.2f}]." for line in lines)
    return _svg(name, _WIDTH, bottom + 40, title, words.replace("[nan, nan]", ""), parts)


def _mark(x: float, y: float, series: int) -> str:
    style = f'class="dot s{series}"'
    r = 4.5
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {style}/>',
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>',
        f'<path d="M{x:.1f} {y - r:.1f}l{r} {2 * r}h-{2 * r}z" {style}/>',
        f'<path d="M{x:.1f} {y - r:.1f}l{r} {r}l-{r} {r}l-{r} -{r}z" {style}/>',
        f'<path d="M{x:.1f} {y + r:.1f}l{r} -{2 * r}h-{2 * r}z" {style}/>',
        f'<path d="M{x - r:.1f} {y:.1f}h{2 * r}M{x:.1f} {y - r:.1f}v{2 * r}" class="cross s{series}"/>',
    )
    return shapes[series % _SHAPES]


def curves(
    name: str,
    title: str,
    axes: tuple[str, str],
    series: Sequence[tuple[str, Sequence[Point]]],
    *,
    log: bool = False,
    least: float = 1.0,
    labels: Sequence[str] = (),
    join: bool = True,
    zero: bool = False,
    origin: bool = False,
    top: float | None = None,
) -> Markup:
    """Return points of several series, joined in their order.

    Args:
        name: Unique in the page.
        title: What it shows.
        axes: What is along x and y.
        series: Name and points of each, at most `MOST_SERIES`.
        log: Whether x is logarithmic.
        least: What is below it on a logarithmic axis stands there.
        labels: Names of x = 0, 1, ... instead of numbers.
        join: Whether points are joined.
        zero: Whether y = 0 is in sight, with a line.
        origin: Whether x = 0 is in sight; not of a logarithmic axis.
        top: Value of y that is in sight, too.
    """
    points = [p for _, own in series for p in own]
    xs = [math.log10(max(p.x, least)) if log else p.x for p in points] or [0.0]
    ys = [v for p in points for v in (p.y, p.low, p.high) if not math.isnan(v)] + ([0.0] if zero else [])
    ys += [] if top is None else [top]
    xs += [0.0] if origin else []
    x0, x1, y0, y1 = min(xs), max(xs), min(ys or [0.0]), max(ys or [1.0])
    x0, x1 = x0 - 0.04 * (x1 - x0 or 1), x1 + 0.04 * (x1 - x0 or 1)
    y0, y1 = y0 - 0.06 * (y1 - y0 or 1), y1 + 0.06 * (y1 - y0 or 1)
    slanted = 8 + 5.2 * max(map(len, labels), default=0) if labels else 22
    width = max(_WIDTH, 90 + 26 * len(labels))
    left, right, upper, bottom = 70, width - _RIGHT, 12, 272

    def across(x: float) -> float:
        return left + (right - left) * ((math.log10(max(x, least)) if log else x) - x0) / (x1 - x0)

    def up(y: float) -> float:
        return bottom - (bottom - upper) * (y - y0) / (y1 - y0)

    parts = [_line(left, up(t), right, up(t), "grid") for t in ticks(y0, y1)]
    parts += [_text(left - 8, up(t) + 4, f"{t:g}", "end", "tick") for t in ticks(y0, y1)]
    if zero:
        parts.append(_line(left, up(0), right, up(0), "zero"))
    if labels:
        for i, label in enumerate(labels):
            x, y = across(i), bottom + 12
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end" class="tick" '
                f'transform="rotate(-60 {x:.1f} {y:.1f})">{escape(label)}</text>'
            )
    else:
        marks = log_ticks(x0, x1) if log else ticks(x0, x1)
        parts += [_text(across(t), bottom + 16, f"{t:g}", "middle", "tick") for t in marks]
        parts += [_line(across(t), bottom, across(t), bottom + 4, "zero") for t in marks]
    parts.append(_line(left, bottom, right, bottom, "zero"))
    parts.append(_text(right, bottom + slanted + 18, axes[0], "end", "tick"))
    parts.append(_text(left, upper - 1, axes[1], "start", "tick"))
    for i, (_, own) in enumerate(series):
        if join and len(own) > 1:
            path = "L".join(f"{across(p.x):.1f} {up(p.y):.1f}" for p in own)
            parts.append(f'<path d="M{path}" class="curve s{i}"/>')
        for p in own:
            if not math.isnan(p.low):
                parts.append(_line(across(p.x), up(p.low), across(p.x), up(p.high), f"bar s{i}"))
            if not p.mark:
                continue
            parts.append(f"<g><title>{escape(p.label)}</title>{_mark(across(p.x), up(p.y), i)}</g>")
    height = bottom + slanted + 42
    for i, (label, _) in enumerate(series):
        at, below = left + (i % 2) * (width - left) / 2, height + 18 * (i // 2)
        parts += [_mark(at + 6, below - 4, i), _text(at + 18, below, label if len(label) <= 48 else f"{label[:47]}…")]
    tall = height + 18 * math.ceil(len(series) / 2) + 4
    words = " ".join(
        f"{label}: " + ", ".join(f"{p.label or format(p.x, 'g')} {p.y:.3g}" for p in own[:40] if p.mark) + "."
        for label, own in series
    )
    return _svg(name, width, tall, title, words, parts)

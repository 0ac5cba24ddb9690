"""The contact sheet: pictures of every cell, by rule, with what the attack saw of its own loss. Drawn with Pillow."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from leakbench.gallery import MOST_IMAGES, Entry

MOST_LINES = 50
"""Most cells on one sheet."""

COLORS = {"best": "#1b7837", "median": "#2166ac", "worst": "#b2182b"}
"""Of a rule's caption and curve."""

_FONT, _TITLE = ImageFont.load_default(13), ImageFont.load_default(16)
_PAD, _ROW, _LABEL, _PLOT, _LEAST_PANEL = 12, 18, 250, 210, 210  # pixels
_LABEL_LETTERS = 34
_DEPTH = 1e-6  # part of the highest loss below which a logarithmic scale ends
_INK, _FAINT = "#222222", "#888888"


def contact_sheet(cells: Sequence[Sequence[Entry]], title: str) -> Image.Image:
    """Draw one line per cell, by task: its name, true and recovered images for each rule, and the loss it reported.

    Args:
        cells: What `leakbench.gallery.read_gallery` returns, `MOST_LINES` of them at most.
        title: Text above.
    """
    strips = [[(_picture(e["true"]), _picture(e["recovered"])) for e in cell] for cell in cells]
    panel = max(_LEAST_PANEL, *(pair[0].width for line in strips for pair in line))
    heights = [max(2 * max(p.height for p, _ in line), 3 * _ROW) + _ROW + 2 * _PAD for line in strips]
    tasks = [cell[0]["task"] for cell in cells]
    opens = [number == 0 or tasks[number - 1] != task for number, task in enumerate(tasks)]
    width = _PAD + _LABEL + len(COLORS) * (panel + _PAD) + _PLOT + _PAD
    top = 4 * _ROW + _PAD
    sheet = Image.new("RGB", (width, top + sum(heights) + sum(opens) * 2 * _ROW), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_PAD, _PAD), title, _INK, _TITLE)
    legend = "above: true, below: recovered; trials of best, median and worst PSNR (in brackets their floor)"
    median = "median: the lower one; of several jobs, the lower median of theirs"
    draw.text((_PAD, _PAD + 1.4 * _ROW), f"{legend}; first {MOST_IMAGES} images", _FAINT, _FONT)
    draw.text((_PAD, _PAD + 2.3 * _ROW), median, _FAINT, _FONT)
    for cell, line, height, first in zip(cells, strips, heights, opens, strict=True):
        draw.line((_PAD, top, width - _PAD, top), _INK if first else "#dddddd")
        if first:
            draw.text((_PAD, top + _ROW / 2), cell[0]["task"], _INK, _TITLE)
            top += 2 * _ROW
        _label(draw, cell[0], top + _PAD)
        for number, (entry, (true, recovered)) in enumerate(zip(cell, line, strict=True)):
            left = _PAD + _LABEL + number * (panel + _PAD)
            caption = f"{entry['rule']}: {entry['psnr']:.1f} dB ({entry['psnr_floor']:.1f}), trial {entry['trial']}"
            draw.text((left, top + _PAD), caption, COLORS[entry["rule"]], _FONT)
            sheet.paste(true, (left, top + _PAD + _ROW))
            sheet.paste(recovered, (left, top + _PAD + _ROW + true.height + 3))
        _plot(draw, cell, (width - _PAD - _PLOT, top + _PAD, width - _PAD, top + height - _PAD + 3))
        top += height
    return sheet


def _picture(png: bytes) -> Image.Image:
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB")


def _label(draw: ImageDraw.ImageDraw, entry: Entry, top: int) -> None:
    attack = textwrap.wrap(entry["attack_label"], _LABEL_LETTERS)[:3]
    defense = textwrap.wrap(f"vs {entry['defense_label']}", _LABEL_LETTERS)[:2]
    count = f"{entry['images']} image{'s' if entry['images'] > 1 else ''} a trial"
    for number, line in enumerate([*attack, *defense, count]):
        draw.text((_PAD, top + number * _ROW), line, _FAINT if line == count else _INK, _FONT)


def _plot(draw: ImageDraw.ImageDraw, cell: Sequence[Entry], box: tuple[int, int, int, int]) -> None:
    """Draw the visible losses over the course of the attack; on a logarithmic scale unless some are negative."""
    traces = {entry["rule"]: entry["visible_loss_trace"] for entry in cell if entry["visible_loss_trace"]}
    left, top, right, bottom = box[0], box[1] + _ROW, box[2], box[3]
    if not traces:
        draw.text(box[:2], "no loss reported", _FAINT, _FONT)
        return
    values = [value for trace in traces.values() for value in trace]
    low, high = min(values), max(values)
    logarithmic = low > -_DEPTH * high  # rounding takes a loss of nothing below 0
    draw.text(box[:2], f"its loss: {high:.3g} to {low:.3g}{', log' if logarithmic else ''}", _FAINT, _FONT)
    draw.rectangle((left, top, right, bottom), outline="#cccccc")
    floor = max(low, _DEPTH * high) if logarithmic else low

    def height(value: float) -> float:
        a, b, c = (math.log(max(v, floor)) if logarithmic else v for v in (floor, high, value))
        return bottom - 2 - (bottom - top - 4) * ((c - a) / (b - a) if b > a else 0.5)

    for rule, trace in traces.items():
        step = (right - left - 4) / max(len(trace) - 1, 1)
        points = [(left + 2 + number * step, height(value)) for number, value in enumerate(trace)]
        if len(points) > 1:
            draw.line(points, COLORS[rule], 2)
        else:
            draw.ellipse((points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2), COLORS[rule])

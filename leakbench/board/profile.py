"""The layer profile as a picture: how much of the images, and of an attribute of theirs, is in which layer's update."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import pandas as pd

from leakbench.board.measures import ordered, pattern, variants
from leakbench.errors import UserError
from leakbench.measures.catalogue import MeasureKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8
"""Most tasks and defenses in a panel: as many as there are colours that color-blind people tell apart."""


@dataclass(frozen=True)
class Panel:
    """One row of the picture.

    Args:
        information: ``original`` (the images) or ``latent`` (an attribute of theirs).
        quantity: What is drawn, of `leakbench.measures.catalogue`.
        kind: Of the quantity; kinds share no axis.
        label: Of the y axis.
        share: Whether values are divided by their sum over the layers, negative ones counting as 0.
        neutral: Value that says nothing leaks, drawn as a line.
    """

    information: str
    quantity: str
    kind: MeasureKind
    label: str
    share: bool = False
    neutral: float | None = None


PANELS = (
    Panel("original", "sensitivity_share", "proxy", "share of squared\nsensitivity"),
    Panel("original", "v_information_original", "lower_bound", "share of V-information\nabout the images", share=True),
    Panel("latent", "v_information", "lower_bound", "bits about\nthe attribute", neutral=0),
    Panel("latent", "latent_specificity", "proxy", "latent specificity", neutral=1),
    Panel("latent", "subspace_z", "proxy", "subspace distance z", neutral=0),
)
"""What is drawn where there are such rows, from top to bottom."""

_KINDS = {"proxy": "proxy", "lower_bound": "lower bound", "proved_bound": "proved bound"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: Any = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)), (0, (1, 1)))
"""Of lines: Okabe and Ito's colors without the yellow, which is too pale; markers and dashes say the same."""
_LONGEST, _LETTERS = 24, 42  # letters of a layer's name, and of a line of a legend
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "leakbench",  # the same picture is the same file
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""Of every picture."""


def chosen(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the lines that are drawn: single layers of `PANELS`, undefended where there are such, with ``series``.

    Args:
        tables: What `leakbench.board.measures.tables` returns.

    Raises:
        UserError: There are none.
    """
    parts = []
    for panel in PANELS:
        lines = tables[panel.kind]
        lines = lines[(lines["quantity"] == panel.quantity) & lines["depth"].notna()]
        parts.append(lines.assign(panel=PANELS.index(panel)))
    drawn = pd.concat(parts, ignore_index=True)
    if drawn.empty:
        names = ", ".join(panel.quantity for panel in PANELS)
        raise UserError(f"--profile: expected rows of {names}, got none; measure sensitivity or v_information")
    if (drawn["defense"] == "none").any():
        drawn = drawn[drawn["defense"] == "none"].reset_index(drop=True)
    series = pd.concat([variants(own) for _, own in drawn.groupby("net")])
    measure = drawn["measure_label"] + " v" + drawn["measure_version"].astype(str)
    several = measure.groupby([drawn["net"], drawn["quantity"]]).transform("nunique") > 1
    return drawn.assign(series=series.mask(several, series + " " + measure))


def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Return the picture: a column per dataset and architecture, a row per quantity that there is, layers along x.

    Args:
        tables: What `leakbench.board.measures.tables` returns.

    Raises:
        UserError: There is nothing to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lines = chosen(tables)
    nets, panels = list(dict.fromkeys(lines["net"])), [PANELS[i] for i in sorted(set(lines["panel"]))]
    counts = [int(lines.loc[lines["net"] == net, "depth"].nunique()) for net in nets]
    widths = [max(3.4, 0.24 * count + 1) for count in counts]
    rows = max(len(_series(lines[lines["net"] == net])) for net in nets)
    heights = [*[1.9] * len(panels), 0.2 * rows + 0.5]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(sum(widths) + 0.6, sum(heights) + 2), layout="constrained")
        grid = figure.subplots(
            len(heights), len(nets), squeeze=False, sharex="col", width_ratios=widths, height_ratios=heights
        )
        for column, net in enumerate(nets):
            own = lines[lines["net"] == net]
            series, layers = _series(own), own.groupby("depth")["layer"].first()
            for axes, panel in zip(grid[:-1, column], panels, strict=True):
                _panel(axes, own[own["panel"] == PANELS.index(panel)], panel, series)
                axes.set_xticks(list(layers.index), list(map(_short, layers)), rotation=90)
                axes.set_xlim(layers.index.min() - 0.5, layers.index.max() + 0.5)
                axes.tick_params(labelbottom=panel == panels[-1])
                axes.set_title(f"{panel.information} information, {_KINDS[panel.kind]}", loc="left", fontsize=9)
                if column == 0:
                    axes.set_ylabel(panel.label)
            grid[len(panels) - 1, column].set_xlabel("layers from input to output")
            grid[-1, column].axis("off")
            _legend(grid[-1, column], series, own)
            # Two lines: a wide legend below another column leaves this one little room.
            grid[0, column].set_title("\n".join((*net.split("-", 1), "")), fontsize=10, fontweight="bold")
        figure.supxlabel("bands: 95% intervals; gray: what no leakage gives", fontsize=8, color="#555555")
        return figure


def _short(layer: str) -> str:
    return layer if len(layer) <= _LONGEST else f"…{layer[1 - _LONGEST :]}"


def _series(own: pd.DataFrame) -> list[str]:
    """Return what is drawn of a net, by stage and batch size; of too many the first, the last and some between."""
    names = ordered(own, "series")
    if len(names) <= MOST_LINES:
        return names
    return [names[round(i * (len(names) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]


def _panel(axes: Axes, part: pd.DataFrame, panel: Panel, series: Sequence[str]) -> None:
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    if panel.neutral is not None:
        axes.axhline(panel.neutral, color="#777777", linewidth=0.8)
    for number, name in enumerate(series):
        line = part[part["series"] == name].sort_values("depth")
        if line.empty:
            continue
        depth = line["depth"].to_numpy(np.float64)
        value, low, high = (line[key].to_numpy(np.float64) for key in ("value", "low", "high"))
        if panel.share:
            whole = value.clip(min=0).sum()
            value, low, high = (ends.clip(min=0) / whole if whole > 0 else ends * 0 for ends in (value, low, high))
        style: Any = {"color": COLORS[number], "linestyle": DASHES[number], "marker": MARKERS[number]}
        axes.plot(depth, value, markersize=4, linewidth=1.2, **style)
        axes.fill_between(depth, low, high, color=COLORS[number], alpha=0.15, linewidth=0)
    if panel.neutral is None:
        axes.set_ylim(bottom=0)  # a share
    if part.empty:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#777777")
        axes.set_yticks([])


def _legend(axes: Axes, series: Sequence[str], own: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=4, linewidth=1.2)
        for i in range(len(series))
    ]
    tasks = textwrap.fill(pattern(own).removeprefix(f"{own['net'].iloc[0]}-"), _LETTERS)
    left_out = int(own["series"].nunique()) - len(series)
    notes = [tasks] * (tasks != "*") + [f"{left_out} more are left out: --csv"] * (left_out > 0)
    axes.legend(
        handles, series, loc="upper center", frameon=False, title="\n".join(notes), title_fontsize=8, handlelength=3.5
    )


def render(tables: dict[str, pd.DataFrame], form: str) -> bytes:
    """Return the picture as a file: the same tables give the same bytes.

    Args:
        tables: What `leakbench.board.measures.tables` returns.
        form: ``svg`` or ``png``.
    """
    return saved(draw(tables), form, "Layer profile of leakage", describe(tables))


def saved(figure: Figure, form: str, title: str, text: str) -> bytes:
    """Return a picture as a file: the same one gives the same bytes.

    Args:
        figure: The picture.
        form: ``svg`` or ``png``.
        title: For those who do not see it.
        text: What it shows in words.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        if form == "png":
            figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _described(_numbered(buffer.getvalue().decode()), title, text).encode()


def _numbered(svg: str) -> str:
    """Name clipping paths in their order: matplotlib names some by their place in memory."""
    found = dict.fromkeys(re.findall(r"\bp[0-9a-f]{10}\b", svg))
    for number, name in enumerate(found):
        svg = svg.replace(name, f"clip{number}")
    return svg


def describe(tables: dict[str, pd.DataFrame]) -> str:
    """Return what the picture shows in words, for those who do not see it."""
    lines = chosen(tables)
    greatest = lines.loc[lines.groupby(["net", "panel", "series"], sort=False)["value"].idxmax()]
    return " ".join(
        f"{line['net']}, {line['series']}: {line['quantity']} is greatest in {line['layer']}, {line['value']:.3g}."
        for line in greatest.to_dict("records")
    )


def _described(svg: str, title: str, text: str) -> str:
    """Put title and description in front, where screen readers look for them."""
    start = svg.index("<svg")
    end = svg.index(">", start)
    head = f'<title id="title">{escape(title)}</title>'
    names = ' role="img" aria-labelledby="title description"'
    return f'{svg[:end]}{names}>\n {head}\n <desc id="description">{escape(text)}</desc>{svg[end + 1 :]}'

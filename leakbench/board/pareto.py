"""Defenses as a picture: what is left of the leakage against the accuracy lost, a line per defense over strengths."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.curves import CURVE_KEYS
from leakbench.board.defenses import TABLE_KEYS
from leakbench.board.profile import COLORS, DASHES, MARKERS, STYLE, saved
from leakbench.board.score import group_ids
from leakbench.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = len(COLORS)
"""Most defenses in a panel: as many as there are colors that color-blind people tell apart."""

CAPTION = (
    "filled: all attacks; hollow: those that the defense does not name, as a share of what they reach undefended; "
    "whiskers: 95% intervals, cut off at the frame; dashed: what is had without the update"
)
"""What stands below the picture."""

_LETTERS = 34  # of a line of a legend
_CAPTION_LETTERS = 95  # of a line of the caption, per panel side by side


def chosen(settings: pd.DataFrame) -> pd.DataFrame:
    """Return the settings that are drawn: defenses whose privacy and accuracy are known, with ``panel`` and ``line``.

    Args:
        settings: The table of `leakbench.board.curves.settings_frame`.

    Raises:
        UserError: There are none.
    """
    drawn = settings[(settings["role"] == "defense") & settings["privacy"].notna() & settings["drop"].notna()]
    if drawn.empty:
        raise UserError(
            "--pareto: expected defenses that were attacked and trained, got none with both; train them with: "
            "leakbench utility SUITE --out OUT"
        )
    drawn = drawn.assign(panel=group_ids(drawn, TABLE_KEYS), line=group_ids(drawn, (*TABLE_KEYS, *CURVE_KEYS, "curve")))
    return drawn.reset_index(drop=True)


def draw(settings: pd.DataFrame) -> Figure:
    """Return the picture: a panel per lane, target and dataset.

    Args:
        settings: See `chosen`.

    Raises:
        UserError: There is nothing to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = chosen(settings)
    panels = [part for _, part in drawn.groupby("panel", sort=True)]
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.8 * across, 4.2 * down + 0.4), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, part in zip(grid, panels, strict=False):
            _panel(axes, part)
        for axes in grid[len(panels) :]:
            axes.axis("off")
        text = "\n".join(textwrap.wrap(CAPTION, _CAPTION_LETTERS * across))
        figure.supxlabel(text, fontsize=8, color="#555555")
        return figure


def _across(axes: Axes, drop: NDArray[np.float64]) -> None:
    """Let the points say what is seen: an interval from three seeds may be many times as wide."""
    low, high = min(0.0, float(drop.min())), max(1.0, float(drop.max()))
    margin = 0.08 * (high - low)
    axes.set_xlim(low - margin, high + margin)


def _panel(axes: Axes, part: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    first = part.iloc[0]
    lane = "no lane" if pd.isna(first["lane"]) else first["lane"]
    axes.set_title(f"{lane}, {first['target']}, {first['dataset']}", fontsize=10, fontweight="bold", loc="left")
    axes.axhline(0, color="#555555", linestyle="--", linewidth=1)
    axes.plot([0], [1], marker="P", color="#000000", markersize=9, linestyle="")
    handles, labels = [Line2D([], [], color="#000000", marker="P", linestyle="")], ["undefended"]
    lines = list(part.groupby("line", sort=True))
    for number, (_, own) in enumerate(lines[:MOST_LINES]):
        style: Any = {"color": COLORS[number], "marker": MARKERS[number], "markersize": 6}
        x, left, value = own["drop"].to_numpy(float), 1 - own["privacy"].to_numpy(float), own["privacy"]
        ends = [own[key].to_numpy(float) for key in ("privacy_low", "privacy_high", "drop_low", "drop_high")]
        axes.plot(x, left, linestyle=DASHES[number], linewidth=1.2, **style)
        axes.errorbar(
            x,
            left,
            yerr=np.nan_to_num(np.clip([ends[1] - value, value - ends[0]], 0, None)),
            xerr=np.nan_to_num(np.clip([x - ends[2], ends[3] - x], 0, None)),
            fmt="none",
            ecolor=COLORS[number],
            elinewidth=0.8,
            alpha=0.6,
        )
        axes.plot(
            x,
            1 - own["privacy_static"].to_numpy(float),
            **style | {"markersize": 10},
            markerfacecolor="none",
            linestyle="",
        )
        ranked = (own["unranked_because"].isna() & own["no_utility_because"].isna()).any()
        labels.append(textwrap.fill(str(own["curve"].iloc[0]) + ("" if ranked else " (not ranked)"), _LETTERS))
        handles.append(Line2D([], [], linestyle=DASHES[number], linewidth=1.2, **style))
    if len(lines) > MOST_LINES:
        labels.append(f"{len(lines) - MOST_LINES} more are left out: --csv")
        handles.append(Line2D([], [], linestyle=""))
    axes.set_xlabel("points of accuracy lost")
    axes.set_ylabel("share of the undefended leakage left")
    axes.set_ylim(-0.04, 1.1)
    _across(axes, part["drop"].to_numpy(float))
    said = "; ".join(dict.fromkeys(part["training"].dropna()))
    if said:
        axes.annotate(f"accuracy of {said}", (0.01, 0.985), xycoords="axes fraction", va="top", fontsize=7)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, handlelength=3)


def describe(settings: pd.DataFrame) -> str:
    """Return what the picture shows in words, for those who do not see it.

    Args:
        settings: See `chosen`.
    """
    return " ".join(
        f"{line['lane']}, {line['dataset']}, {line['target']}: {line['defense_label']} leaves "
        f"{1 - line['privacy']:.2f} of the leakage at {line['drop']:.1f} points lost."
        for line in chosen(settings).to_dict("records")
    )


def render(settings: pd.DataFrame, form: str) -> bytes:
    """Return the picture as a file: the same table gives the same bytes.

    Args:
        settings: See `chosen`.
        form: ``svg`` or ``png``.
    """
    return saved(draw(settings), form, "Leakage left by defenses against accuracy lost", describe(settings))

"""The best of every lane between two markers of a Markdown file, so that a README shows real rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from leakbench.board import render
from leakbench.board.lanes import LANE_KEYS
from leakbench.board.score import cells, group_ids
from leakbench.errors import UserError

BEGIN, END = "<!-- leakbench board: begin -->", "<!-- leakbench board: end -->"
"""What stands around the tables."""

FIRST = 5
"""Attacks of a table."""


def write_into(path: Path, rows: pd.DataFrame, ranked: pd.DataFrame) -> None:
    """Replace what is between the markers of a file by the first lines of every lane.

    Args:
        path: A Markdown file that holds both markers once, in order.
        rows: Result rows.
        ranked: What `leakbench.board.lanes.lanes` makes of them.

    Raises:
        UserError: The file cannot be read or written, or lacks the markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--into {path}: cannot be read ({error.strerror}); give a Markdown file") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise UserError(f"--into {path}: expected the lines {BEGIN} and {END} once, in this order; add them")
    top = ranked.groupby(group_ids(ranked, LANE_KEYS), sort=False).head(FIRST)
    tables = render.markdown(cells(rows.iloc[:0]), top).strip("\n")
    try:
        path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--into {path}: cannot be written ({error.strerror}); give another file") from None

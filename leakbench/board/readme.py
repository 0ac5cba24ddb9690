"""Tables between two markers of a Markdown file, so that a README shows real rows and no number is typed by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from leakbench.board import render
from leakbench.board.lanes import LANE_KEYS
from leakbench.board.score import group_ids
from leakbench.errors import UserError
from leakbench.keys import DEVELOPMENT

FIRST = 5
"""Attacks of a table."""


def best_of_lanes(ranked: pd.DataFrame) -> str:
    """Return the first lines of every lane as Markdown, without the lanes of demonstrations where there are others.

    Args:
        ranked: What `leakbench.board.lanes.lanes` returns.
    """
    shown = ranked if ranked["demonstration"].all() else ranked[~ranked["demonstration"].astype(bool)]
    top = shown.groupby(group_ids(shown, LANE_KEYS), sort=False).head(FIRST)
    parts, captions = [], dict[str, None]()
    for table in render.lane_tables(top):
        rule = ["---", *("---:" for _ in table.header)]
        lines = [["attack", *table.header], rule, *([attack, *texts] for attack, texts in table.lines)]
        parts.append("\n".join([f"### {table.title}", "", *render.markdown_lines(lines)]))
        captions.setdefault(table.caption)
    if DEVELOPMENT.name in set(shown["season"]):
        captions.setdefault(f"season {DEVELOPMENT.name}: a public key, for development; no records")
    return "\n\n".join([*parts, *(f"*{caption}*" for caption in captions)])


def write_into(path: Path, name: str, text: str) -> None:
    """Replace what is between the markers of a file: ``<!-- leakbench NAME: begin -->`` and ``... end -->``.

    Args:
        path: A Markdown file that holds both markers once, in order.
        name: The command whose output is kept there.
        text: What comes between them.

    Raises:
        UserError: The file cannot be read or written, or lacks the markers.
    """
    begin, end = f"<!-- leakbench {name}: begin -->", f"<!-- leakbench {name}: end -->"
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--into {path}: cannot be read ({error.strerror}); give a Markdown file") from None
    before, opened, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed or begin in after or end in before + after:
        raise UserError(f"--into {path}: expected the lines {begin} and {end} once, in this order; add them")
    stripped = text.strip("\n")
    try:
        path.write_text(f"{before}{begin}\n\n{stripped}\n\n{end}{after}", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--into {path}: cannot be written ({error.strerror}); give another file") from None

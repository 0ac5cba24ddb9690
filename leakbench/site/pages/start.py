"""The start page: what this is, the best attacks of every lane, how to submit."""

from __future__ import annotations

from collections.abc import Iterator

from leakbench.site.data import Data
from leakbench.site.page import Page
from leakbench.site.pages.boards import BOARDS, lane_id, lane_table, of_board

FIRST = 5
"""Attacks of a headline board."""

MOST = 24
"""Most headline tables; the boards have all."""


def pages(data: Data) -> Iterator[Page]:
    """Yield the start page."""
    boards = []
    left = MOST
    for board in BOARDS:
        found = of_board(data, board)[:left]
        left -= len(found)
        tables = [lane_table(data, table, lane_id(table), FIRST) for table in found]
        boards.append({"path": board.path, "title": board.title, "text": board.text, "tables": tables})
    badges = data.board["badge"].value_counts()
    counts = {
        "badges": ", ".join(f"{count:,} {badge}" for badge, count in badges.items()),
        "rows": len(data.rows),
        "tasks": data.rows["task_hash"].nunique(),
        "attacks": data.board["attack"].nunique(),
        "defenses": data.board.loc[data.board["defense"] != "none", "defense"].nunique(),
    }
    yield Page("index.html", "leakbench", "start.html", {"boards": boards, "counts": counts})

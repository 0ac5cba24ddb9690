"""The part of a README that boards write."""

from __future__ import annotations

import pandas as pd
import pytest
from board_rows import LABELS, frame, make

from leakbench.board.lanes import lanes
from leakbench.board.readme import FIRST, best_of_lanes, write_into
from leakbench.errors import UserError

BEGIN, END = "<!-- leakbench board: begin -->", "<!-- leakbench board: end -->"


@pytest.fixture(scope="module")
def rows():
    parts = [make([i / 10] * 8, f"attack{i}", attack_source_sha256=str(i)) for i in range(FIRST + 2)]
    return frame(*parts)


def test_the_best_stand_between_the_markers_and_nothing_else_changes(rows, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nSTALE\n{END}\nafter\n")
    write_into(path, "board", best_of_lanes(lanes(rows)))
    text = path.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "STALE" not in text
    assert [i for i in range(FIRST + 2) if f"| attack{i} |" in text] == list(range(2, FIRST + 2))
    write_into(path, "board", best_of_lanes(lanes(rows)))
    assert path.read_text() == text


def test_demonstrations_are_left_out_where_there_is_more(rows):
    shown = frame(make([0.9] * 8, "shown_off", task=LABELS.model_copy(update={"dataset": "digits"})))
    assert "shown_off" in best_of_lanes(lanes(shown))
    both = best_of_lanes(lanes(pd.concat([rows, shown], ignore_index=True)))
    assert "attack3" in both
    assert "shown_off" not in both


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_file_without_its_markers_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match="once, in this order"):
        write_into(path, "board", "new")
    assert path.read_text() == text

"""The rows under results/, and the texts that are made from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from leakbench.board.lanes import lanes
from leakbench.board.origins import markdown, origins
from leakbench.board.readme import best_of_lanes, write_into
from leakbench.results import load_rows
from leakbench.schema import BENCHMARK_VERSION
from leakbench.store import result_folders
from leakbench.submitting.seal import SEAL, broken_seal
from leakbench.submitting.verify import verify

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
RUNS = result_folders([RESULTS])


def test_every_published_run_is_sealed_and_as_it_was_sealed():
    assert len(RUNS) > 1
    for run in RUNS:
        assert (run / SEAL).is_file(), run
        assert list(broken_seal(run)) == []


def test_published_rows_are_of_this_version_and_verify_refuses_none():
    found = verify([RESULTS / "quick"])
    assert found.rows > 1000
    assert found.problems == []


def test_how_published_rows_were_made_is_told_as_it_is(tmp_path):
    lines = origins([RESULTS])
    assert set(lines["benchmark_version"]) == {BENCHMARK_VERSION}
    unchanged(RESULTS / "README.md", "provenance", markdown(lines), tmp_path)


@pytest.mark.slow
def test_the_board_of_the_readme_is_that_of_the_published_rows(tmp_path):
    shown = [RESULTS / name for name in ("labels", "images_quick", "breaking_sa")]
    unchanged(ROOT / "README.md", "board", best_of_lanes(lanes(load_rows(shown))), tmp_path)


def unchanged(path, name, text, folder):
    """Assert that what is between the markers of a file is what would be written there now."""
    copy = folder / path.name
    copy.write_text(path.read_text())
    write_into(copy, name, text)
    assert copy.read_text() == path.read_text(), "its command is in the Makefile, target results"

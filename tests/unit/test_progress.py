"""What a run shows."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest

from leakbench.runner.progress import BarDisplay, PlainDisplay, describe_report, make_display, shown_log

JOB = SimpleNamespace(label="digits / llg[0:64]")


def outcome(status="ok", error=None):
    return SimpleNamespace(job=JOB, statuses={status: 64}, error=error)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_one_plain_line_per_job():
    file = io.StringIO()
    display = make_display(file, 2)
    assert isinstance(display, PlainDisplay)
    with display:
        display.report(JOB, {"done": 1, "total": 2})
        display.finished(outcome())
        display.finished(outcome("timeout", "attack: ran past 10 s"))
    assert file.getvalue().splitlines() == [
        "[1/2] digits / llg[0:64]: 64 ok",
        "[2/2] digits / llg[0:64]: 64 timeout: attack: ran past 10 s",
    ]


def test_a_terminal_gets_a_bar_with_counts_and_failures(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    file = Terminal()
    display = make_display(file, 3)
    assert isinstance(display, BarDisplay)
    with display:
        display.finished(outcome())
        display.finished(outcome("error", "[bold]not markup[/bold]"))
        display.report(JOB, {"done": 5, "total": 10, "loss": 0.25})
    text = file.getvalue()
    assert "2 done, 1 failed, 1 left" in text
    assert "failed: digits / llg[0:64]: [bold]not markup[/bold]" in text
    assert "digits / llg[0:64] step 5/10, objective 0.25" in text


def test_what_is_logged_is_shown_while_the_run_lasts():
    file = io.StringIO()
    with shown_log(make_display(file, 1)):
        logging.getLogger("leakbench.models.recipe").info("step %d of %d", 1, 2)
    logging.getLogger("leakbench.models.recipe").info("later")
    assert file.getvalue() == "step 1 of 2\n"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, ""),
        ({"done": 3, "total": 10}, " step 3/10"),
        ({"done": 3, "total": 10, "loss": 1e-7}, " step 3/10, objective 1e-07"),
        ({"done": 3, "total": 10, "loss": 0.5, "rate": 2.0}, " step 3/10, objective 0.5, 2 it/s, 4 s left"),
        ({"done": 3, "total": 10, "rate": 0.0}, " step 3/10"),
        ({"done": "x" * 99, "total": 10, "loss": float("nan")}, ""),
        ({"done": [1], "total": None, "loss": "\x1b[2J"}, ""),
    ],
)
def test_a_report_of_an_entry_shows_finite_numbers_only(values, text):
    assert describe_report(values) == text

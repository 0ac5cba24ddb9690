"""What the terminal, Markdown, JSON and CSV say of a board."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest
from board_rows import INPUTS, frame, make
from rich.console import Console

from leakbench.board import render
from leakbench.board.columns import COLUMNS, entry_label, entry_parameters
from leakbench.board.lanes import lanes
from leakbench.board.score import cells


def test_every_column_of_a_full_image_table_fits_the_terminal():
    params = {"attack_params": '{"iterations": 24000, "total_variation": 0.0001}'}
    both = [
        make([118.21, 119.6, 120], task=INPUTS, reference=11.0, defense=d, **params) for d in ("none", "null_update")
    ]
    out = io.StringIO()
    render.terminal(cells(frame(*both)), console=Console(file=out, width=80))
    heading = next(line for line in out.getvalue().splitlines() if line.startswith("attack"))
    assert heading.split() == ["attack", "psnr", "[dB]", "floor", "empty", "gain", "group", "trials", "ms"]


def demonstration():
    rows = [
        make([0.8, 0.9, 0.7, 0.88], "llg", season="development", dataset="digits"),
        make([0.2, 0.3, None, 0.1], "random_labels", season="development", dataset="digits"),
        make([None] * 4, "imprint", season="development", dataset="digits", statuses=["not_applicable"] * 4),
        make([12.0, 14.0, 13.0, 12.5], "ig", task=INPUTS, reference=11.0, season="development", dataset="digits"),
    ]
    return cells(frame(*rows))


def test_the_terminal_says_what_the_numbers_are_for_and_shows_interval_and_chance():
    out = io.StringIO()
    render.terminal(demonstration(), console=Console(file=out, width=80))
    text = out.getvalue()
    assert "season development" in text
    assert "no records" in text
    assert "digits is a demonstration lane" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    line = next(line for line in text.splitlines() if line.startswith("llg "))
    assert "0.82 [0.68, 0.95]" in line
    assert " 0.20 " in line
    assert text.index("\nllg ") < text.index("\nrandom_labels ")
    assert "n/a" in next(line for line in text.splitlines() if "imprint" in line)


def test_markdown_has_one_table_per_task_with_whole_lines():
    text = render.markdown(demonstration())
    assert text.count("### ") == 2
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    # With the defense, without the columns that nothing is known of.
    hidden = {"empty", "AUC", "TPR@1%", "bits", "{exact}", "detected", "D-SNR", "refused"}
    assert widths == {2 + len({column.title for column in render.VIEW} - hidden)}
    assert "> digits is a demonstration lane" in text


def test_recovery_and_stealth_stand_side_by_side_where_something_was_planted():
    shown = {"lane": "malicious_server", "refused": 0.5}
    planted = make([0.9] * 4, attack="bn", count_exact_match=1.0, detected=0.75, d_snr=12.3, **shown)
    rows = frame(planted, make([0.5] * 4, count_exact_match=0.25, **shown))
    text = render.markdown(cells(rows), lanes(rows))
    ranked, compared = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        for part in text.split("### ")[1:]
    )
    for table, expected in ((ranked, ["1.00", "0.75"]), (compared, ["1.00", "0.75", "12", "0.50"])):
        first = table[0].index("exact")
        assert table[0][first : first + len(expected)] == ["exact", "detected", "D-SNR", "refused"][: len(expected)]
        told = {row[0] if table is ranked else row[1]: row[first : first + len(expected)] for row in table[2:]}
        assert told == {"bn": expected, "llg": ["0.25", "-", "-", "0.50"][: len(expected)]}
    assert "exact" not in render.markdown(cells(frame(make([0.5] * 4))))


def test_a_defense_that_overstates_protection_is_said_to_do_so_wherever_it_is_shown():
    hidden = make([0.2] * 4, defense="hide", model_shown="defended", lane=None)
    board = cells(frame(make([0.9] * 4), make([0.5] * 4, defense="topk"), hidden))
    out = io.StringIO()
    render.terminal(board, console=Console(file=out, width=80))
    assert "vs hide (overstates protection)\n" in out.getvalue()
    assert "vs topk\n" in out.getvalue()
    text = render.markdown(board)
    assert "| hide (overstates protection) |" in text
    assert "| topk |" in text
    assert "> A defense that overstates protection changes what" in text
    told = {cell["defense"]: cell["defense_note"] for cell in json.loads(render.to_json(board))["cells"]}
    assert told == {"none": None, "topk": None, "hide": "overstates protection"}
    assert "overstates" not in render.markdown(board[board["defense"] != "hide"])


def test_json_and_csv_hold_every_cell_and_explain_every_column():
    board = demonstration()
    document = json.loads(render.to_json(board))
    assert len(document["cells"]) == len(board)
    assert set(document["cells"][0]) == set(document["meta"]["columns"]) == set(board.columns)
    llg = next(c for c in document["cells"] if c["attack"] == "llg")
    assert llg["mean"] == pytest.approx(0.82)
    assert llg["psnr"] is None
    back = pd.read_csv(io.StringIO(render.to_csv(board)))
    assert back["mean"].tolist() == pytest.approx(board["mean"].tolist(), nan_ok=True)


def test_long_labels_keep_the_parameters_that_differ():
    def params(strength):
        return json.dumps({"iterations": 24000, "step_size": 0.1, "total_variation": strength})

    board = cells(frame(*(make([0.5] * 4, "inverting", attack_params=params(s)) for s in (0.1, 0.2))))
    labels = [texts[0] for _, texts in next(render.tables(board)).lines]
    assert sorted(labels) == [
        "inverting(total_variation=0.1)",
        "inverting(total_variation=0.2)",
    ]


@pytest.mark.parametrize(
    ("name", "params", "label"),
    [
        ("llg", "{}", "llg"),
        ("topk", '{"keep": 0.1}', "topk(keep=0.1)"),
        ("clip+topk", '[{"norm": 1}, {"keep": 0.1}]', "clip(norm=1)+topk(keep=0.1)"),
        ("clip+none", '[{"norm": 1}, {}]', "clip(norm=1)+none"),
    ],
)
def test_labels_name_every_part_of_an_entry(name, params, label):
    assert entry_label(name, entry_parameters(params)) == label


def test_a_long_chain_keeps_the_parameters_that_differ():
    chains = [json.dumps([{"norm": 1.0, "per_example": True}, {"keep": k, "layerwise": True}]) for k in (0.1, 0.2)]
    board = cells(frame(*(make([0.5] * 4, defense="clip+topk", defense_params=c) for c in chains)))
    labels = [defense for defense, _ in next(render.tables(board)).lines]
    assert labels == ["clip+topk(keep=0.1)", "clip+topk(keep=0.2)"]


def test_entries_of_the_same_name_from_other_sources_are_told_apart():
    board = cells(frame(*(make([0.5] * 4, attack_source_sha256=s * 64) for s in "ab")))
    assert sorted(texts[0] for _, texts in next(render.tables(board)).lines) == ["llg @aaaaaaa", "llg @bbbbbbb"]


def test_column_keys_are_unique_and_explained():
    keys = [column.key for column in COLUMNS]
    assert len(keys) == len(set(keys))
    assert all(column.label for column in COLUMNS)

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from board_rows import INPUTS, frame, make, only
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from leakbench.board import render
from leakbench.board.defenses import defenses
from leakbench.board.score import TABLE_COLUMNS, cells
from leakbench.board.stats import MIN_PAIRS, bootstrap, rank_groups, widening
from leakbench.metrics import METRICS
from leakbench.results import load_rows, write_job


def test_a_failed_trial_counts_as_chance():
    cell = only(cells(frame(make([1.0, 0.6, None, None], reference=0.2))))
    assert (cell["n"], cell["ok"], cell["error"], cell["coverage"]) == (4, 2, 2, 0.5)
    assert cell["mean"] == pytest.approx((1.0 + 0.6 + 0.2 + 0.2) / 4)
    assert cell["instance_recall"] == cell["mean"]
    assert cell["reference"] == pytest.approx(0.2)
    assert cell["advantage"] == pytest.approx((0.5 - 0.2) / 0.8)
    assert cell["advantage_low"] == pytest.approx((cell["ci_low"] - 0.2) / 0.8)
    assert cell["failure"] == "error happened"
    assert np.isnan(cell["gain"])
    assert np.isnan(cell["psnr"])


def test_a_failed_image_counts_as_the_floor_of_its_trial():
    cell = only(cells(frame(make([20.0, None, 12.0], task=INPUTS, reference=[10.0, 8.0, 11.0]))))
    assert cell["metric"] == "psnr"
    assert cell["mean"] == pytest.approx((20 + 8 + 12) / 3)
    assert cell["gain"] == pytest.approx((10 + 0 + 1) / 3)
    assert np.isnan(cell["advantage"])


def test_a_value_that_a_failed_row_carries_is_not_believed():
    statuses = ["ok", "timeout", "oom", "invalid"]
    cell = only(cells(frame(make([1.0] * 4, statuses=statuses, reference=0.0))))
    assert cell["mean"] == 0.25
    assert [cell[s] for s in statuses] == [1, 1, 1, 1]


def test_an_attack_that_always_fails_scores_chance_with_no_advantage():
    cell = only(cells(frame(make([None] * 8, reference=0.3))))
    assert (cell["n"], cell["ok"], cell["coverage"]) == (8, 0, 0)
    assert cell["mean"] == pytest.approx(0.3)
    assert cell["advantage"] == pytest.approx(0)


def test_a_failed_row_without_a_reference_takes_that_of_its_cell():
    cell = only(cells(frame(make([1.0, None], reference=[0.4, None]))))
    assert cell["mean"] == pytest.approx((1 + 0.4) / 2)
    assert np.isnan(only(cells(frame(make([None, None], reference=[None, None]))))["mean"])


@pytest.mark.parametrize("status", ["not_applicable", "unavailable"])
def test_cells_that_could_not_be_tried_are_listed_without_numbers(status):
    cell = only(cells(frame(make([None] * 3, statuses=[status] * 3, dataset_fingerprint=None))))
    assert (cell["n"], cell[status]) == (0, 3)
    assert cell[["mean", "ci_low", "ci_high", "coverage", "advantage", "rank_group", "seconds"]].isna().all()
    assert cell[list(METRICS)].isna().all()


def test_a_trial_that_an_attack_declined_counts_as_the_floor_where_it_tried_others():
    statuses = ["ok", "not_applicable", "not_applicable", "unavailable"]
    cell = only(
        cells(frame(make([20.0, None, None, None], task=INPUTS, reference=[9.0, 8.0, 10.0, 5.0], statuses=statuses)))
    )
    assert (cell["n"], cell["ok"], cell["not_applicable"]) == (3, 1, 2)
    assert cell["coverage"] == pytest.approx(1 / 3)
    assert cell["mean"] == cell["psnr"] == pytest.approx((20 + 8 + 10) / 3)
    assert cell["gain"] == pytest.approx(11 / 3)


def test_a_trial_that_an_attack_declined_counts_as_the_floor_where_it_failed_on_others():
    cell = only(cells(frame(make([None] * 3, reference=0.2, statuses=["timeout", "not_applicable", "not_applicable"]))))
    assert (cell["n"], cell["mean"]) == (3, pytest.approx(0.2))


def test_a_cell_of_which_nothing_was_tried_is_left_out():
    cell = only(cells(frame(make([None] * 3, statuses=["unavailable", "not_applicable", "not_applicable"]))))
    assert cell["n"] == 0
    assert np.isnan(cell["mean"])


def test_an_image_cell_says_what_the_attack_makes_of_an_update_that_carries_nothing():
    rows = frame(
        make([20.0] * 3, "a", task=INPUTS, reference=11.0),
        make([12.0, None, 10.0], "a", task=INPUTS, reference=11.0, defense="null_update"),
        make([21.0] * 3, "b", task=INPUTS, reference=11.0),
        make([0.5] * 3, "a"),
        make([0.2] * 3, "a", defense="null_update"),
    )
    board = cells(rows).set_index(["target", "attack", "defense"])["empty"]
    assert board["inputs", "a", "none"] == board["inputs", "a", "null_update"] == pytest.approx(11)
    assert np.isnan(board["inputs", "b", "none"])
    assert board["labels"].isna().all()
    labels, inputs = sorted(render.tables(cells(rows)), key=lambda table: "empty" in table.header)
    assert "empty" not in labels.header + labels.caption.split()
    assert [texts[inputs.header.index("empty")] for _, texts in inputs.lines] == ["-", "11.0", "11.0"]
    assert "empty:" in inputs.caption


def test_trials_whose_distance_could_not_be_had_do_not_move_its_mean():
    rows = make([20.0, 20.0, 20.0, None], task=INPUTS, reference=11.0)
    rows[0] |= {"lpips": 0.2, "lpips_floor": 0.9}
    rows[1] |= {"lpips": 0.4, "lpips_floor": 0.7}
    assert only(cells(frame(rows)))["lpips"] == pytest.approx((0.2 + 0.4 + 0.8) / 3)  # the failed one is at the floor
    assert np.isnan(only(cells(frame(rows[2:])))["lpips"])


def test_lower_is_better_metrics_are_averaged_as_they_are():
    rows = make([0.5, None], reference=0.1)
    rows[0]["l1_count_error"] = 1.0
    for row in rows:
        row["l1_count_error_chance"] = 1.8
    assert only(cells(frame(rows)))["l1_count_error"] == pytest.approx((1.0 + 1.8) / 2)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        interval = bootstrap(rng.exponential(size=50), range(50))
        hits.append(interval.low <= 1 <= interval.high)
    assert 0.88 < np.mean(hits) < 0.98


def test_the_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(values, range(400))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_rows_of_one_cluster_are_drawn_together():
    values = np.random.default_rng(2).normal(size=40)
    copied = bootstrap(np.repeat(values, 5), np.repeat(range(40), 5).tolist())
    assert copied == pytest.approx(bootstrap(values, range(40)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_an_interval_holds_the_mean_and_is_no_wider_than_the_values_allow(values):
    mean, low, high = bootstrap(np.array(values), range(len(values)))
    wider = widening(len(values))
    assert mean - wider * (mean - min(values)) - 1e-9 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= mean + wider * (max(values) - mean) + 1e-9


def test_one_trial_has_no_interval():
    cell = only(cells(frame(make([0.7]))))
    assert cell["mean"] == 0.7
    assert cell[["ci_low", "ci_high", "advantage_low"]].isna().all()


def test_scores_do_not_depend_on_row_order_or_other_cells():
    rng = np.random.default_rng(3)
    rows = frame(*(make(list(rng.random(12)), name) for name in ("a", "b", "c")))
    whole = cells(rows)
    shuffled = cells(rows.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(whole, shuffled)
    alone = cells(rows[rows["attack"] == "b"]).drop(columns=list(TABLE_COLUMNS))
    among = whole[whole["attack"] == "b"].drop(columns=list(TABLE_COLUMNS)).reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, among, check_dtype=False)


def test_scores_do_not_depend_on_how_pandas_holds_other_rows():
    rows = make([0.1, 0.9, 0.4, 0.6], "a", budget_model_evaluations=100)
    alone = only(cells(frame(rows)))
    among = cells(frame(rows, make([0.5] * 4, "b"))).set_index("attack").loc["a"]
    assert (alone["ci_low"], alone["ci_high"]) == (among["ci_low"], among["ci_high"])


def test_attacks_that_cannot_be_told_apart_share_a_rank_group():
    noise = np.random.default_rng(4).normal(0, 0.02, size=(4, 32))
    victim = np.random.default_rng(5).normal(0, 0.2, size=32)  # common to all attacks, so pairing removes it
    levels = {"best": 0.60, "same": 0.60, "worse": 0.55, "worst": 0.40}
    rows = frame(*(make(list(m + victim + e), name) for (name, m), e in zip(levels.items(), noise, strict=True)))
    board = cells(rows).set_index("attack")
    assert board["rank_group"].to_dict() == {"best": 1, "same": 1, "worse": 2, "worst": 3}
    assert board["detectable"].nunique() == 1
    assert 0.005 < board["detectable"].iloc[0] < 0.03
    assert board.loc["worse", "ci_high"] > board.loc["best", "ci_low"]  # unpaired intervals could not tell them apart


def test_few_trials_separate_nobody():
    few = cells(frame(make([1.0] * (MIN_PAIRS - 1), "a"), make([0.0] * (MIN_PAIRS - 1), "b")))
    enough = cells(frame(make([1.0] * MIN_PAIRS, "a"), make([0.0] * MIN_PAIRS, "b")))
    assert few["rank_group"].isna().all()
    assert enough["rank_group"].tolist() == [1, 2]


def test_a_group_is_led_by_its_first_entry():
    shifts = [0.0, -0.006, -0.012, -0.018]
    noise = np.random.default_rng(6).normal(0, 0.01, size=(4, 20))
    entries = [pd.Series(1 + s + e - e.mean()) for s, e in zip(shifts, noise, strict=True)]
    groups = rank_groups(entries)
    assert groups[0] == 1
    assert groups == sorted(groups)
    assert max(groups) > 1


def test_defenses_and_tasks_are_ranked_apart():
    board = cells(frame(make([0.9] * 8), make([0.1] * 8, defense="topk"), make([9.0] * 8, task=INPUTS)))
    assert board["rank_group"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"season": "2027"},
        {"benchmark_version": "0.9"},
        {"task_hash": "other"},
        {"dataset_fingerprint": "other"},
        {"checkpoint_origin": "official"},
        {"attack_params": '{"rounds": 3}'},
        {"attack_source_sha256": "other"},
        {"model_draws": "per_trial"},
    ],
)
def test_rows_that_must_not_be_compared_are_different_cells(change):
    assert len(cells(frame(make([0.5] * 4), make([0.5] * 4, **change)))) == 2


def test_local_checkpoints_are_compared_only_with_the_same_weights():
    def local(attack, shas):
        rows = make([0.5] * 6, attack, checkpoint_origin="local")
        for row in rows:
            row |= {"draw": row["trial"] % 3, "checkpoint_sha256": shas[row["trial"] % 3]}
        return rows

    mine, theirs = ["a", "b", "c"], ["a", "b", "x"]
    same = cells(frame(local("one", mine), local("two", mine)))
    assert same["checkpoint"].nunique() == 1
    assert cells(frame(local("one", mine), local("two", theirs)))["checkpoint"].nunique() == 2
    assert len(cells(frame(local("one", mine), local("one", theirs)))) == 4


def test_trials_that_failed_before_the_model_was_built_stay_in_their_cell():
    failed = make([None, None], checkpoint_origin=None, dataset_fingerprint=None)
    for row in failed:
        row["trial"] += 2
    assert only(cells(frame(make([1.0, 1.0]), failed)))["n"] == 4


def test_a_frame_without_attacks_is_an_empty_board():
    board = cells(frame(make([0.5]))[:0])
    assert board.empty
    assert [*board.columns] == [*cells(frame(make([0.5]))).columns]
    assert cells(frame(make([0.5], attack=None))).empty
    assert json.loads(render.to_json(board))["cells"] == []
    render.terminal(board, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("change", "ranked"),
    [
        ({}, True),
        ({"season": "development"}, False),
        ({"dataset": "digits"}, False),
        ({"isolation": "none"}, False),
        ({"lane": None}, False),
    ],
)
def test_only_official_rows_of_a_lane_behind_the_boundary_are_records(change, ranked):
    assert only(cells(frame(make([0.5] * 4, **change))))["ranked"] == ranked


def test_a_defense_that_changes_what_is_seen_of_the_model_has_no_lane_even_where_it_did_so_in_some_trials_only():
    rows = make([0.2] * 4, defense="hide")
    for row in rows[:2]:
        row |= {"model_shown": "defended", "lane": None}
    everything = frame(make([0.9] * 4), make([0.5] * 4, defense="topk"), rows)
    board = cells(everything).set_index("defense")
    assert board["n"].to_dict() == {"none": 4, "topk": 4, "hide": 4}
    assert board["ranked"].to_dict() == {"none": True, "topk": True, "hide": False}
    assert pd.isna(board.loc["hide", "lane"])
    assert board["defense_note"].fillna("").to_dict() == {"none": "", "topk": "", "hide": "overstates protection"}
    worst = defenses(everything).set_index("defense")
    assert "overstates protection" in worst.loc["hide", "unranked_because"]
    assert worst.loc["topk", "privacy"] == pytest.approx(0.4 / 0.7)


def test_rows_from_the_store_make_the_same_board(tmp_path):
    rows = make([0.8, 0.9, None, 0.7], job_id="ab12")
    write_job(tmp_path, "ab12", "2026", rows)
    pd.testing.assert_frame_equal(cells(load_rows(tmp_path)), cells(frame(rows)), check_dtype=False)


def test_the_board_does_not_import_torch():
    code = (
        "import sys, leakbench.board.score, leakbench.board.render, leakbench.board.defense_view as r; "
        "assert not {'torch', 'rich'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attacks_of_unlike_chances_are_ranked_by_what_they_add_to_chance():
    # One claims the union of all clients, of which .9 can be guessed; the other each client's own labels.
    union = make([0.92, 0.93, 0.91, 0.92, 0.93, 0.91], "union", reference=0.9)
    own = make([0.6, 0.61, 0.59, 0.6, 0.61, 0.59], "own", reference=0.2)
    board = cells(frame(union, own))
    assert board["attack"].tolist() == ["own", "union"]
    assert board["rank_group"].tolist() == [1, 2]
    assert board["mean"].tolist() == pytest.approx([0.6, 0.92])

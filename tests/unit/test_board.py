from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from leakbench.board import render
from leakbench.board.columns import COLUMNS, entry_label, entry_parameters
from leakbench.board.score import TABLE_COLUMNS, cells, defense_worst_case
from leakbench.board.stats import MIN_PAIRS, bootstrap, rank_groups
from leakbench.metrics import METRICS
from leakbench.results import ROW_FIELDS, blank_row, load_rows, task_columns, write_job
from leakbench.tasks import Architecture, Task

LABELS = Task(dataset="mnist", architecture=Architecture(name="mlp"))
INPUTS = LABELS.model_copy(update={"target": "inputs"})
DEFAULTS = {pa.string(): "", pa.int64(): 1, pa.float64(): 0.0, pa.bool_(): False}


def make(values, attack="llg", *, task=LABELS, reference=0.2, statuses=None, **changes):
    """Rows of one attack: the ranking metric per trial; None where the trial failed."""
    metric = "instance_recall" if task.target == "labels" else "psnr"
    base = {f.name: DEFAULTS.get(f.type, datetime(2026, 1, 1, tzinfo=UTC)) for f in ROW_FIELDS if not f.nullable}
    base |= blank_row() | task_columns(task)
    base |= {"season": "2026", "dataset_fingerprint": "f", "checkpoint_origin": "init", "isolation": "process"}
    base |= {"attack": attack, "attack_params": "{}", "defense": "none", "defense_params": "{}", "wall_seconds": 0.5}
    base |= {"draw": 0, METRICS[metric].reference: reference}
    references = reference if isinstance(reference, list) else [reference] * len(values)
    rows = []
    for trial, (value, known) in enumerate(zip(values, references, strict=True)):
        status = statuses[trial] if statuses else "ok" if value is not None else "error"
        error = None if status == "ok" else f"{status} happened"
        own = {"trial": trial, metric: value, METRICS[metric].reference: known, "status": status, "error": error}
        row = base | own | changes
        labels = {
            f"{k}_label": entry_label(str(row[k]), entry_parameters(row[f"{k}_params"])) for k in ("attack", "defense")
        }
        rows.append(row | labels)
    return rows


def frame(*parts):
    return pd.DataFrame([row for part in parts for row in part])


def only(board):
    assert len(board) == 1
    return board.iloc[0]


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


def test_every_column_of_a_full_image_table_fits_the_terminal():
    params = {"attack_params": '{"iterations": 24000, "total_variation": 0.0001}'}
    both = [
        make([118.21, 119.6, 120], task=INPUTS, reference=11.0, defense=d, **params) for d in ("none", "null_update")
    ]
    out = io.StringIO()
    render.terminal(cells(frame(*both)), console=Console(file=out, width=80))
    heading = next(line for line in out.getvalue().splitlines() if line.startswith("attack"))
    assert heading.split() == ["attack", "psnr", "[dB]", "floor", "empty", "gain", "group", "trials", "ms"]


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
    for i in range(300):
        interval = bootstrap(rng.exponential(size=50), range(50), i)
        hits.append(interval.low <= 1 <= interval.high)
    assert 0.88 < np.mean(hits) < 0.98


def test_the_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(values, range(400), "x")
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_rows_of_one_cluster_are_drawn_together():
    values = np.random.default_rng(2).normal(size=40)
    copied = bootstrap(np.repeat(values, 5), np.repeat(range(40), 5).tolist(), "x")
    assert copied == pytest.approx(bootstrap(values, range(40), "x"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_an_interval_holds_the_mean_and_stays_among_the_values(values):
    low, high = bootstrap(np.array(values), range(len(values)), "x")[1:]
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


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
    assert few["rank_group"].tolist() == [1, 1]
    assert enough["rank_group"].tolist() == [1, 2]


def test_a_group_is_led_by_its_first_entry():
    shifts = [0.0, -0.006, -0.012, -0.018]
    noise = np.random.default_rng(6).normal(0, 0.01, size=(4, 20))
    entries = [(str(i), pd.Series(1 + s + e - e.mean())) for i, (s, e) in enumerate(zip(shifts, noise, strict=True))]
    groups = rank_groups(entries, "table")
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
    assert defense_worst_case(board).empty
    assert json.loads(render.to_json(board))["cells"] == []
    render.terminal(board, console=Console(file=io.StringIO()))


def test_the_worst_attack_decides_the_privacy_of_a_defense():
    weak, strong = "weak", "strong"
    board = cells(
        frame(
            make([0.5] * 4, weak),
            make([1.0] * 4, strong),
            make([0.3] * 4, weak, defense="noise"),
            make([0.6] * 4, strong, defense="noise"),
        )
    )
    table = defense_worst_case(board).set_index("defense")
    noise = table.loc["noise"]
    assert (noise["worst_attack"], noise["attacks"]) == (strong, 2)
    assert noise["worst"] == pytest.approx(0.6)
    assert noise["undefended"] == 1
    assert noise["privacy"] == pytest.approx((1.0 - 0.6) / (1.0 - 0.2))
    assert table.loc["none", "privacy"] == 0
    assert table["unranked_because"].isna().all()


def test_a_defense_is_unranked_where_an_attack_failed_or_was_not_run():
    board = cells(
        frame(
            make([1.0] * 4, "a"),
            make([1.0] * 4, "b"),
            make([0.3, 0.3, 0.3, None], "a", defense="crashes"),
            make([0.3] * 4, "b", defense="crashes"),
            make([0.3] * 4, "a", defense="untested"),
            make([0.3] * 4, "a", defense="fine"),
            make([None] * 4, "b", defense="fine", statuses=["not_applicable"] * 4),
        )
    )
    reasons = defense_worst_case(board).set_index("defense")["unranked_because"]
    assert reasons["crashes"] == "failed: a"
    assert reasons["untested"] == "not run: b"
    assert pd.isna(reasons["fine"])


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
    assert "0.82 [0.7" in line
    assert " 0.20 " in line
    assert text.index("\nllg ") < text.index("\nrandom_labels ")
    assert "n/a" in next(line for line in text.splitlines() if "imprint" in line)


def test_markdown_has_one_table_per_task_with_whole_lines():
    text = render.markdown(demonstration())
    assert text.count("### ") == 2
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(render.VIEW) + 1}  # with the defense, without a column that nothing is known of
    assert "> digits is a demonstration lane" in text


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


def test_rows_from_the_store_make_the_same_board(tmp_path):
    rows = make([0.8, 0.9, None, 0.7], job_id="ab12")
    write_job(tmp_path, "ab12", "2026", rows)
    pd.testing.assert_frame_equal(cells(load_rows(tmp_path)), cells(frame(rows)), check_dtype=False)


def test_the_board_does_not_import_torch():
    code = (
        "import sys, leakbench.board.score, leakbench.board.render as r; assert not {'torch', 'rich'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

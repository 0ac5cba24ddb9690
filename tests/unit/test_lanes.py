"""The board of a lane, against cases worked out by hand."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from board_rows import INPUTS, LABELS, frame, make
from rich.console import Console

from leakbench.board import render
from leakbench.board.lanes import LANE_COLUMNS, lane_tables, lanes
from leakbench.board.ranks import replicates
from leakbench.board.score import cells
from leakbench.board.stats import RESAMPLES, ends
from leakbench.tasks import Architecture, BatchSpec

EIGHT = LABELS.model_copy(update={"batch": BatchSpec(size=8)})
OTHER_NET = LABELS.model_copy(update={"architecture": Architecture(name="lenet5")})
DEEP = LABELS.model_copy(update={"stage": "converged"})


def by_attack(table):
    return {line["attack"]: line for line in table.to_dict("records")}


def test_tasks_weigh_the_same_however_many_trials_they_have():
    parts = [make([1.0] * 8, reference=0.5), make([0.6, 0.6], task=EIGHT, reference=0.2)]
    line = by_attack(lanes(frame(*parts)))["llg"]
    assert line["edge"] == pytest.approx((1.0 + 0.5) / 2)
    assert (line["tasks"], line["covered"]) == (2, 2)
    assert line["mean"] == pytest.approx(0.8)
    assert line["reference"] == pytest.approx(0.35)


def test_a_task_on_which_an_attack_did_not_run_counts_as_chance():
    skipped = make([None] * 8, "rlu", task=EIGHT, statuses=["not_applicable"] * 8)
    ran = [make([1.0] * 8, "rlu"), make([0.6] * 8, "llg"), make([0.6] * 8, "llg", task=EIGHT)]
    for parts in ([*ran, skipped], ran):  # not applicable, or never planned
        table = by_attack(lanes(frame(*parts)))
        assert (table["rlu"]["edge"], table["rlu"]["covered"], table["rlu"]["tasks"]) == (pytest.approx(0.5), 1, 2)
        assert table["llg"]["edge"] == pytest.approx(0.5)


def test_a_failed_trial_counts_as_chance():
    line = by_attack(lanes(frame(make([1.0, None], reference=0.2))))["llg"]
    assert line["edge"] == pytest.approx(0.5)


def test_a_trial_that_an_attack_declined_counts_as_chance_where_it_tried_others():
    statuses = ["ok", "not_applicable", "not_applicable", "not_applicable"]
    line = by_attack(lanes(frame(make([1.0, None, None, None], reference=0.2, statuses=statuses))))["llg"]
    assert line["edge"] == pytest.approx(0.25)
    assert line["mean"] == pytest.approx((1.0 + 3 * 0.2) / 4)


def test_no_task_weighs_more_than_another_by_its_chance():
    parts = [make([0.9] * 4, reference=0.2), make([0.1] * 4, task=EIGHT, reference=0.9)]
    assert by_attack(lanes(frame(*parts)))["llg"]["edge"] == pytest.approx((0.875 - 1) / 2)


def test_a_task_that_guessing_solves_is_no_task_of_the_lane():
    parts = [make([0.6] * 4, reference=0.2), make([0.5] * 4, task=EIGHT, reference=1.0)]
    line = by_attack(lanes(frame(*parts)))["llg"]
    assert (line["edge"], line["tasks"]) == (pytest.approx(0.5), 1)
    assert lanes(frame(parts[1])).empty


def test_an_attack_that_ran_nowhere_has_no_rank():
    never = make([None] * 8, "rlu", statuses=["not_applicable"] * 8)
    table = lanes(frame(never, make([0.3] * 8, "random_labels")))
    assert table["attack"].tolist() == ["random_labels", "rlu"]
    assert table["rank_group"].tolist()[0] == 1
    assert np.isnan(table["rank_group"].tolist()[1])
    assert np.isnan(table["edge"].tolist()[1])


def test_a_task_whose_data_nobody_has_is_no_task_of_the_lane():
    missing = [make([None] * 4, a, task=EIGHT, statuses=["unavailable"] * 4) for a in ("llg", "rlu")]
    table = by_attack(lanes(frame(make([0.6] * 4, "llg"), make([0.7] * 4, "rlu"), *missing)))
    assert {line["tasks"] for line in table.values()} == {1}


def test_stages_lanes_and_demonstrations_are_tables_of_their_own_and_defended_rows_are_none():
    digits = LABELS.model_copy(update={"dataset": "digits"})
    parts = [make([0.5] * 3), make([0.5] * 3, task=DEEP), make([0.5] * 3, task=digits), make([9.0] * 3, task=INPUTS)]
    table = lanes(frame(*parts, make([1.0] * 3, defense="topk", defense_params='{"p":0.9}')))
    assert len(table) == 4
    assert sorted(zip(table["lane"], table["stage"], table["demonstration"], strict=True)) == [
        ("passive_images", "untrained", False),
        ("passive_labels", "converged", False),
        ("passive_labels", "untrained", False),
        ("passive_labels", "untrained", True),
    ]


def test_attacks_that_differ_on_every_victim_are_in_different_groups_and_equal_ones_share_theirs():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.6, 40)
    parts = [
        make(list(base + 0.2), "best"),
        make(list(base), "middle"),
        make(list(base + rng.normal(0, 1e-3, 40)), "as_good"),
        make(list(base - 0.2), "worst"),
    ]
    groups = {name: line["rank_group"] for name, line in by_attack(lanes(frame(*parts))).items()}
    assert groups == {"best": 1, "middle": 2, "as_good": 2, "worst": 3}


def test_the_interval_covers_the_mean_over_tasks_like_these_at_its_level():
    rng = np.random.default_rng(1)
    tasks, victims = np.repeat(np.arange(15), 8), np.tile(np.arange(8), 15)
    hits = 0
    for _ in range(100):
        values = rng.normal(2, 1, 15)[tasks] + rng.normal(0, 1, len(tasks))
        low, high = ends(replicates(values[:, None], tasks.tolist(), victims.tolist(), tasks.tolist())[:, 0])
        hits += low <= 2 <= high
    assert 0.86 < hits / 100 < 0.99
    assert RESAMPLES >= 1000


def test_lanes_are_printed_above_the_cells_and_are_in_the_json():
    rows = frame(make([0.5, 0.6, 0.7]), make([0.5, 0.4, 0.7], "rlu", task=DEEP))
    table, board = lanes(rows), cells(rows)
    out = io.StringIO()
    render.terminal(board, table, Console(file=out, width=80))
    text = out.getvalue()
    assert text.index("lane passive_labels, untrained") < text.index("lane passive_labels, converged")
    assert text.index("lane passive_labels, converged") < text.index("mnist-mlp-untrained")
    assert max(map(len, text.splitlines())) <= 80
    assert "| llg |" in render.markdown(board, table)
    document = json.loads(render.to_json(board, table))
    assert len(document["lanes"]) == 2
    assert set(document["meta"]["lane_columns"]) == set(LANE_COLUMNS) <= set(document["lanes"][0])


def test_of_many_stages_some_are_shown_and_the_rest_is_said_to_be_left_out():
    stages = [LABELS.model_copy(update={"stage": f"sgd(steps={n})"}) for n in range(100, 1100, 100)]
    table = lanes(frame(*(make([0.5, 0.6], task=task) for task in stages)))
    shown = list(render.lane_tables(table))
    assert [lane.title.split(",")[1].split("  ")[0].strip() for lane in shown] == [
        "sgd(steps=100)", "sgd(steps=400)", "sgd(steps=700)", "sgd(steps=1000)"
    ]  # fmt: skip
    assert "6 stages are left out" in shown[0].caption


def test_no_rows_make_an_empty_table():
    assert lanes(frame(make([0.5])).iloc[:0]).empty


def test_an_attack_is_compared_within_its_suite_and_loses_nothing_by_what_another_suite_runs():
    other = LABELS.model_copy(update={"batch": BatchSpec(size=4)})
    named = [make([0.9] * 8, "a", suite="one"), make([0.5] * 8, "b", suite="one")]
    elsewhere = [make([0.6] * 8, "a", task=other, suite="two"), make([0.5] * 8, "c", task=other, suite="two")]
    board = lanes(frame(*named, *elsewhere)).set_index(["suite", "attack"])
    assert board["tasks"].tolist() == board["covered"].tolist() == [1] * 4
    assert board["mean"].to_dict() == {("one", "a"): 0.9, ("one", "b"): 0.5, ("two", "a"): 0.6, ("two", "c"): 0.5}


def test_rows_that_two_suites_share_count_for_both():
    other = LABELS.model_copy(update={"batch": BatchSpec(size=4)})
    one = [make([0.9] * 8, "a", suite="one"), make([0.5] * 8, "b", suite="one")]
    # On the first task, `a` was measured by suite one already, so suite two has no row of its own there.
    two = [make([0.4] * 8, "c", suite="two"), *(make([0.7] * 8, n, task=other, suite="two") for n in "ac")]
    board = lanes(frame(*one, *two)).set_index(["suite", "attack"])
    assert board.loc[("two", "a"), ["tasks", "covered", "mean"]].tolist() == [2, 2, pytest.approx(0.8)]
    assert ("two", "b") not in board.index
    assert board.loc[("one", "b"), "tasks"] == 1


def test_edges_are_means_over_tasks_also_where_these_share_only_some_victims():
    # Both tasks draw the same victims; one has 32 of them, the other 16.
    parts = [
        make([0.9] * 32, "a"),
        make([0.3] * 16, "a", task=OTHER_NET),
    ]
    parts += [
        make([0.2] * 32, "b"),
        make([0.2] * 16, "b", task=OTHER_NET),
    ]
    board = by_attack(lanes(frame(*parts)))
    assert board["a"]["tasks"] == 2
    assert board["a"]["edge"] == pytest.approx((0.7 + 0.1) / 2 / 0.8)


def test_trials_of_one_attack_alone_move_no_other():
    parts = [make([0.6] * 8, "a"), make([0.5] * 8, "b"), make([0.2] * 8, "c")]
    plain = by_attack(lanes(frame(*parts)))
    more = by_attack(lanes(frame(*parts[:2], make([0.2] * 64, "c"))))
    fewer = by_attack(lanes(frame(*parts[:2], make([0.2] * 2, "c"))))
    for name in "ab":
        assert plain[name]["edge"] == more[name]["edge"] == fewer[name]["edge"]
        assert plain[name]["rank_group"] == more[name]["rank_group"] == fewer[name]["rank_group"]


def test_who_fails_or_declines_most_tasks_is_not_ranked_for_it():
    parts = [make([0.1] * 8, "a"), make([0.1] * 8, "a", task=EIGHT)]
    crashed = [make([None] * 8, "crashes"), make([None] * 8, "crashes", task=EIGHT)]
    third = LABELS.model_copy(update={"batch": BatchSpec(size=4)})
    board = lanes(frame(*parts, make([0.1] * 8, "a", task=third), *crashed, make([0.9] * 8, "picks")))
    assert board["attack"].tolist() == ["a", "picks", "crashes"]
    lines = by_attack(board)
    assert lines["a"]["rank_group"] == 1
    assert [lines[name]["covered"] for name in ("picks", "crashes")] == [1, 0]
    assert np.isnan([lines[name]["rank_group"] for name in ("picks", "crashes")]).all()
    assert np.isnan(lines["crashes"]["edge"])
    assert lines["picks"]["edge"] == pytest.approx(0.7 / 0.8 / 3)


def test_fewer_victims_than_any_test_needs_give_no_rank():
    few = by_attack(lanes(frame(make([1.0] * 5, "a"), make([0.0] * 5, "b"))))
    assert np.isnan([few["a"][key] for key in ("rank_group", "rank_low", "detectable")]).all()
    enough = by_attack(lanes(frame(make([1.0] * 6, "a"), make([0.0] * 6, "b"))))
    assert (enough["a"]["rank_group"], enough["b"]["rank_group"]) == (1, 2)


def test_a_table_agrees_with_itself():
    rng = np.random.default_rng(3)
    parts = [
        make(list(rng.uniform(0.2, 0.4 + 0.05 * i, 16)), f"a{i}", task=task)
        for i in range(6)
        for task in (LABELS, EIGHT, LABELS.model_copy(update={"batch": BatchSpec(size=4)}))
    ]
    (table,) = lane_tables(frame(*parts))
    leader = 0
    for i, line in enumerate(table.lines):
        assert line["edge_low"] <= line["edge"] <= line["edge_high"]
        opens = bool(table.low[leader, i] > 0)  # what the comparison of two attacks shows
        assert line["rank_group"] == table.lines[leader]["rank_group"] + opens
        leader = i if opens else leader
    assert len({line["rank_group"] for line in table.lines}) > 1

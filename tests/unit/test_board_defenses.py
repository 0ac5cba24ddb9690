"""Privacy of defenses, and their ranking, on cases worked out by hand."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from board_rows import INPUTS, LABELS, frame, make
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from leakbench.board import defense_text, pareto
from leakbench.board.costs import JOINED
from leakbench.board.curves import board, hypervolume
from leakbench.board.defenses import curve_of, defenses
from leakbench.errors import UserError
from leakbench.tasks import Protocol
from leakbench.utility.summary import SETTING

RECOVERS = {"knows": ("labels",), "images": ("inputs",)}
SWEPT = {"defense_strength": '[["std", "higher"]]', "defense_adaptive": '[["knows", "images"]]'}


def defended(values, attack, std=0.1, name="noise", **changes):
    own = {"defense": name, "defense_params": json.dumps({"std": std})}
    return make(values, attack, **{**own, **SWEPT, **changes})


def by_label(table):
    return table.set_index("defense_label")


def test_privacy_is_what_the_worst_attack_leaves_between_floor_and_undefended():
    rows = frame(
        make([0.9, 1.0] * 4, "plain"),
        make([0.5] * 8, "knows"),
        defended([0.3] * 8, "plain"),
        defended([0.5, 0.7] * 4, "knows"),
    )
    lines = by_label(defenses(rows, RECOVERS))
    noise = lines.loc["noise(std=0.1)"]
    # worst .6 by "knows", undefended .95 by "plain", floor .2
    assert noise[["worst_attack", "undefended_attack"]].tolist() == ["knows", "plain"]
    assert noise["floor_source"] == "reference, no control run"
    assert noise["privacy"] == pytest.approx((0.95 - 0.6) / 0.75)
    assert noise["privacy_low"] < noise["privacy"] < noise["privacy_high"]
    assert noise["privacy_static"] == pytest.approx((0.95 - 0.3) / 0.75)
    assert noise["privacy_adaptive"] == pytest.approx(noise["privacy"])
    assert noise["gap"] == pytest.approx(0.3 / 0.75)
    assert noise["gap_low"] > 0
    assert noise["unranked_because"] is None
    assert lines.loc["none", ["role", "privacy"]].tolist() == ["none", 0]


def test_a_defense_that_changes_nothing_has_no_gap_though_the_attacks_that_it_names_are_the_stronger():
    level = [make([0.9, 1.0] * 4, "knows"), make([0.5, 0.7] * 4, "plain")]
    same = [defended([0.9, 1.0] * 4, "knows"), defended([0.5, 0.7] * 4, "plain")]
    noise = by_label(defenses(frame(*level, *same), RECOVERS)).loc["noise(std=0.1)"]
    assert noise[["privacy", "privacy_static", "gap", "gap_low", "gap_high"]].tolist() == [0] * 5
    # static: (.6 - .3) / (.6 - .2) under "plain"; all: (.95 - .8) / .75
    half = [defended([0.8] * 8, "knows"), defended([0.3] * 8, "plain")]
    noise = by_label(defenses(frame(*level, *half), RECOVERS)).loc["noise(std=0.1)"]
    assert noise[["privacy", "privacy_static", "gap"]].tolist() == pytest.approx([0.2, 0.75, 0.55])


def test_static_privacy_is_unknown_where_attacks_that_do_not_know_the_defense_reach_nothing_undefended():
    parts = [make([1.0] * 8, "knows"), make([0.22] * 8, "plain")]
    parts += [defended([0.6] * 8, "knows"), defended([0.2] * 8, "plain")]
    noise = by_label(defenses(frame(*parts), RECOVERS)).loc["noise(std=0.1)"]
    assert noise["privacy"] == pytest.approx(0.5)
    assert noise[["privacy_static", "gap"]].isna().all()
    assert noise["static_attack"] == "plain"


def test_the_interval_is_paired_a_defense_that_shifts_every_trial_alike_has_a_certain_privacy():
    values = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.75, 0.65])
    rows = frame(make(list(values), "knows", reference=0), defended(list(values / 2), "knows", reference=0))
    noise = by_label(defenses(rows)).loc["noise(std=0.1)"]
    assert noise[["privacy", "privacy_low", "privacy_high"]].tolist() == pytest.approx([0.5] * 3)


def test_the_floor_is_what_an_attack_reaches_where_nothing_is_sent_if_that_is_more_than_chance():
    parts = [make([1.0] * 8, "knows"), defended([0.7] * 8, "knows")]
    low, high = (make([value] * 8, "knows", defense="null_update") for value in (0.1, 0.4))
    privacy = [by_label(defenses(frame(*parts, nothing))).loc["noise(std=0.1)"] for nothing in (low, high)]
    assert privacy[0]["privacy"] == pytest.approx(0.3 / 0.8)
    assert privacy[1]["privacy"] == pytest.approx(0.3 / 0.6)
    assert (privacy[0]["floor_source"], privacy[1]["floor_source"]) == ("reference", "knows")
    control = by_label(defenses(frame(*parts, high))).loc["null_update"]
    assert (control["role"], control["privacy"]) == ("control", 1)


def test_a_task_on_which_no_attack_works_undefended_tells_nothing_and_is_left_out():
    easy = [make([1.0] * 8, "knows"), defended([0.6] * 8, "knows")]
    hard = LABELS.model_copy(update={"stage": "converged"})
    weak = [make([0.22] * 8, "knows", task=hard), defended([0.2] * 8, "knows", task=hard)]
    tables = board(frame(*easy, *weak), recovers=RECOVERS)
    assert tables["tasks"].groupby("task")["informative"].first().tolist() == [False, True]
    line = by_label(tables["settings"]).loc["noise(std=0.1)"]
    assert (line["tasks"], line["of_tasks"], line["dropped"]) == (1, 1, 1)
    assert line["privacy"] == pytest.approx(0.5)
    assert "1 tasks left out" in defense_text.markdown(tables)


def test_privacy_of_a_lane_is_the_mean_over_its_tasks_and_the_worst_task_is_named():
    other = LABELS.model_copy(update={"stage": "converged"})
    parts = [make([1.0] * 8, "knows", task=task) for task in (LABELS, other)]
    parts += [defended([0.2] * 8, "knows"), defended([0.6] * 8, "knows", task=other)]
    line = by_label(board(frame(*parts), recovers=RECOVERS)["settings"]).loc["noise(std=0.1)"]
    assert (line["privacy"], line["tasks"]) == (pytest.approx(0.75), 2)
    assert (line["worst_task"], line["worst_task_privacy"]) == (other.id, pytest.approx(0.5))
    missing = by_label(board(frame(*parts[:3]), recovers=RECOVERS)["settings"]).loc["noise(std=0.1)"]
    assert missing["unranked_because"] == "run on 1 of 2 informative tasks"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([defended([0.3] * 8, "knows"), defended([0.3] * 8, "plain")], None),
        ([defended([0.3] * 8, "plain")], "not run: knows"),
        ([defended([0.3] * 8, "knows")], "not run: plain"),
        ([defended([0.3] * 7 + [None], "knows"), defended([0.3] * 8, "plain")], "failed: knows"),
        (
            [defended([None] * 8, "knows", statuses=["not_applicable"] * 8), defended([0.3] * 8, "plain")],
            "not applicable: knows",
        ),
        (
            [defended([0.3] * 8, a, defense_adaptive='[["images"]]') for a in ("knows", "plain")],
            "names no attack on labels that knows it",
        ),
        (
            [defended([0.3] * 8, a, model_shown="defended", lane=None) for a in ("knows", "plain")],
            "overstates protection",
        ),
    ],
)
def test_a_defense_without_the_attacks_that_know_it_is_listed_and_not_ranked(parts, reason):
    rows = frame(make([1.0] * 8, "knows"), make([1.0] * 8, "plain"), *parts)
    line = by_label(defenses(rows, RECOVERS)).loc["noise(std=0.1)"]
    assert line["unranked_because"] == reason
    assert line["lane"] == "passive_labels"
    assert not np.isnan(line["privacy"])


def test_an_attack_that_the_task_does_not_admit_is_not_asked_for_as_long_as_another_knows_the_defense():
    declined = {"statuses": ["not_applicable"] * 8}
    named = {"defense_adaptive": '[["knows", "special"]]'}
    rows = [make([1.0] * 8, "knows"), make([None] * 8, "special", **declined)]
    rows += [defended([0.3] * 8, "knows", **named), defended([None] * 8, "special", **declined, **named)]
    for kept in (rows, [rows[0], *rows[2:]]):  # nobody runs a special attack against others than who names it
        assert by_label(defenses(frame(*kept), RECOVERS)).loc["noise(std=0.1)", "unranked_because"] is None
    failing = frame(*rows[:3], defended([None] * 8, "special", **named))
    assert by_label(defenses(failing, RECOVERS)).loc["noise(std=0.1)", "unranked_because"] == "failed: special"
    alone = [rows[0], rows[1], defended([None] * 8, "special", **declined, defense_adaptive='[["special"]]')]
    alone.append(defended([0.3] * 8, "knows", defense_adaptive='[["special"]]'))
    reason = by_label(defenses(frame(*alone), RECOVERS)).loc["noise(std=0.1)", "unranked_because"]
    assert reason == "not applicable: special"


def test_an_attack_that_is_neither_installed_nor_run_is_asked_for():
    rows = frame(make([1.0] * 8, "knows"), defended([0.3] * 8, "knows", defense_adaptive='[["knows"], ["gone"]]'))
    assert by_label(defenses(rows, RECOVERS)).loc["noise(std=0.1)", "unranked_because"] == "not run: gone"


def test_leakage_that_grows_with_strength_is_a_warning_where_it_is_certain():
    weak = [0.3, 0.4] * 4
    rows = [make([1.0] * 8, "knows"), defended(weak, "knows", 0.1), defended([0.5, 0.6] * 4, "knows", 1.0)]
    rows.append(defended([0.3, 0.4, 0.3, 0.4, 0.3, 0.4, 0.3, 0.5], "knows", 10.0))
    lines = by_label(defenses(frame(*rows), RECOVERS))["warnings"]
    assert lines["noise(std=1.0)"].endswith("leaks more than noise(std=0.1) (masking?)")
    assert "masking" not in lines["noise(std=0.1)"]
    assert "masking" not in lines["noise(std=10.0)"]
    lower = {"defense_strength": '[["std", "lower"]]'}
    rows = [rows[0], defended(weak, "knows", 0.1, **lower), defended([0.5, 0.6] * 4, "knows", 1.0, **lower)]
    assert not by_label(defenses(frame(*rows), RECOVERS))["warnings"].str.contains("masking").fillna(False).any()


def test_one_family_of_attacks_is_a_warning_and_floors_are_none():
    rows = [make([1.0] * 8, name) for name in ("llg", "random_labels", "rlu")]
    one = [defended([0.3] * 8, name) for name in ("llg", "random_labels")]
    line = by_label(defenses(frame(*rows, *one))).loc["noise(std=0.1)"]
    assert line["warnings"] == "one attack family only: counting"
    two = by_label(defenses(frame(*rows, *one, defended([0.3] * 8, "rlu")))).loc["noise(std=0.1)"]
    assert two["warnings"] is None


def test_a_change_of_the_model_is_compared_on_task_and_victims_though_its_weights_are_its_own():
    own = {"checkpoint_origin": "local", "checkpoint_sha256": "b" * 64}
    plain = make([1.0] * 8, "knows", checkpoint_origin="local", checkpoint_sha256="a" * 64)
    lines = by_label(defenses(frame(plain, defended([0.6] * 8, "knows", **own)), RECOVERS))
    assert lines.loc["noise(std=0.1)", "privacy"] == pytest.approx(0.5)
    assert lines["checkpoint"].nunique() == 1


@pytest.mark.parametrize(
    ("label", "params", "strength", "expected"),
    [
        ("topk(p=0.9)", {"p": 0.9, "scope": "layer"}, [["p", "higher"]], ((0.9,), "topk")),
        ("clip(bound=0.5, per_layer=True)", {"bound": 0.5}, [["bound", "lower"]], ((-0.5,), "clip(per_layer=True)")),
        ("sign", {}, [None], (None, "sign")),
        (
            "clip(bound=1.0)+noise(std=0.1, relative=True)",
            [{"bound": 1.0}, {"std": 0.1, "relative": True}],
            [["bound", "lower"], ["std", "higher"]],
            ((-1.0, 0.1), "clip+noise(relative=True)"),
        ),
    ],
)
def test_a_curve_is_a_defense_without_its_strength(label, params, strength, expected):
    said = {"defense": "d", "defense_version": 1, "defense_source_sha256": None, "defense_label": label}
    said |= {"defense_params": json.dumps(params), "defense_strength": json.dumps(strength)}
    key, strengths, shown = curve_of(said)
    assert (strengths, shown) == expected
    for name in ("bound", "std", '"p"'):
        assert name not in key[-1]


# --- utility and ranking ----------------------------------------------------------------------------------------------


SEEN = make([1.0])[0]


def trained(name, drops, std=0.1, dataset="cifar10", status="ok", **changes):
    """Federated trainings of one defense, one a seed, beside an undefended accuracy of .8 and a chance of .1."""
    params = "{}" if name == "none" else json.dumps({"std": std})
    base = {"defense": name, "defense_version": 1, "defense_params": params, "defense_source_sha256": None}
    base |= dict.fromkeys(SETTING, "x") | {"dataset": dataset, "partition": "iid", "status": status}
    base |= {name: SEEN[name] for name in JOINED if name != "dataset"} | {
        "architecture_params": "{}",
        "utility_note": None,
    }
    return [
        base | {"seed": seed, "accuracy": 0.8 - drop / 100, "drop": drop, "utility": (0.7 - drop / 100) / 0.7} | changes
        for seed, drop in enumerate(drops)
    ]


CIFAR = LABELS.model_copy(update={"dataset": "cifar10"})


def attacked(name, level, std=0.1):
    """Rows of a defense whose privacy is 1 - level: undefended 1, chance 0."""
    spread = np.array([-0.02, 0.02] * 5)
    return defended(list(level + spread), "knows", std, name, task=CIFAR, reference=0.0)


def ranked(attacks, trainings):
    rows = frame(make([1.0] * 10, "knows", task=CIFAR, reference=0.0), *attacks)
    utility = pd.DataFrame([line for part in (trained("none", [0, 0, 0]), *trainings) for line in part])
    tables = board(rows, utility, RECOVERS)
    return tables["ranking"].set_index("defense"), by_label(tables["settings"]), tables


def test_defenses_are_ranked_by_the_best_privacy_that_an_accuracy_buys():
    attacks = [attacked("a", 0.9, 0.1), attacked("a", 0.5, 1.0), attacked("a", 0.1, 10.0), attacked("b", 0.3)]
    costs = [trained("a", [0.9, 1.0, 1.1], 0.1), trained("a", [3, 4, 5], 1.0), trained("a", [20, 21, 22], 10.0)]
    ranking, lines, _ = ranked(attacks, [*costs, trained("b", [1.0, 1.5, 2.0])])
    a, b = ranking.loc["a"], ranking.loc["b"]
    assert (a["privacy_at_1"], a["privacy_at_2"], a["privacy_at_5"]) == pytest.approx((0.1, 0.1, 0.5))
    assert a[["setting_at_1", "setting_at_5"]].tolist() == ["a(std=0.1)", "a(std=1.0)"]
    assert np.isnan(b["privacy_at_1"])
    assert (b["privacy_at_2"], b["privacy_at_5"]) == pytest.approx((0.7, 0.7))
    assert (a["rank_at_1"], a["rank_at_2"], b["rank_at_2"], a["rank_at_5"], b["rank_at_5"]) == (1, 2, 1, 2, 1)
    assert list(ranking.index) == ["b", "a"]
    # rectangles of (utility, privacy): (.69/.7, .1), (.66/.7, .5), (.49/.7, .9)
    u = np.array([0.69, 0.66, 0.49]) / 0.7
    assert a["hypervolume"] == pytest.approx(u[2] * 0.9 + (u[1] - u[2]) * 0.5 + (u[0] - u[1]) * 0.1)
    assert lines.loc["a(std=1.0)", "drop"] == pytest.approx(4)
    assert lines.loc["a(std=1.0)", "drop_low"] == pytest.approx(4 - 4.302653 / np.sqrt(3))


def test_the_class_of_one_point_asks_for_a_narrow_interval_and_for_a_dataset_that_is_fine_enough():
    ranking, *_ = ranked([attacked("a", 0.4), attacked("b", 0.4)], [trained("a", [0.5] * 3), trained("b", [0, 0.5, 1])])
    assert ranking.loc["a", "privacy_at_1"] == pytest.approx(0.6)
    assert np.isnan(ranking.loc["b", "privacy_at_1"])
    assert ranking.loc["b", "privacy_at_2"] == pytest.approx(0.6)
    rows = frame(make([1.0] * 8, "knows"), defended([0.6] * 8, "knows"))
    costs = pd.DataFrame([*trained("none", [0] * 3, dataset="mnist"), *trained("noise", [0.5] * 3, dataset="mnist")])
    mnist = board(rows, costs, RECOVERS)["ranking"].iloc[0]
    assert np.isnan(mnist["privacy_at_1"])
    assert mnist["privacy_at_2"] == pytest.approx(0.5)


def test_defenses_that_cannot_be_told_apart_share_a_rank_group():
    ranking, *_ = ranked(
        [attacked("a", 0.4), attacked("b", 0.4), attacked("c", 0.6)], [trained(name, [0.5] * 3) for name in "abc"]
    )
    assert ranking["rank_at_2"].to_dict() == {"a": 1, "b": 1, "c": 2}


def test_a_failed_training_is_of_no_use_and_an_untrained_defense_has_no_rank():
    failed = trained("a", [70, 70, 70], status="error", utility=0.0)
    ranking, lines, _ = ranked([attacked("a", 0.0), attacked("b", 0.0)], [failed])
    assert lines.loc["a(std=0.1)", ["utility", "failed_trainings"]].tolist() == [0, 3]
    assert ranking.loc["a", "hypervolume"] == 0
    assert np.isnan(ranking.loc["a", "privacy_at_5"])
    assert ranking.loc["b", "unranked_because"] == "no federated training with it on this dataset"
    _, part, _ = ranked([attacked("a", 0.0)], [trained("a", [1, 1])])
    assert part.loc["a(std=0.1)", "seeds"] == 2
    assert part.loc["a(std=0.1)", "no_utility_because"] == "1 of 3 federated trainings with it are missing"


def test_a_setting_that_failed_to_train_is_in_no_class_however_small_its_mean_drop():
    # one of three failed: drops .9, .9 and of chance 70 * 0 here, so that the mean of .6 would be in every class
    costs = [*trained("a", [0.9, 0.9]), *trained("a", [0, 0, 0], status="error", utility=0.0)[2:]]
    ranking, lines, tables = ranked([attacked("a", 0.4)], [costs])
    assert lines.loc["a(std=0.1)", "drop"] == pytest.approx(0.6)
    assert ranking.loc["a", [f"privacy_at_{points}" for points in (1, 2, 5)]].isna().all()
    assert ranking.loc["a", "no_class_because"] == "a(std=0.1): 1 of 3 federated trainings with it failed"
    assert ranking.loc["a", "unranked_because"] is None
    assert "in no class: a(std=0.1): 1 of 3 federated trainings with it failed" in defense_text.markdown(tables)


def test_a_share_of_nothing_is_no_utility():
    note = "without a defense 12.0% is not clearly above chance, 10.0%"
    lost = {"utility": np.nan, "drop": np.nan, "utility_note": note}
    costs = [*trained("a", [0.5] * 2), *trained("a", [0.5] * 3, **lost)[2:]]
    ranking, lines, tables = ranked([attacked("a", 0.4)], [costs])
    why = f"accuracy lost is not known in 1 of 3 federated trainings, e.g. {note}"
    assert ranking.loc["a", "unranked_because"] == why
    assert lines.loc["a(std=0.1)", ["drop", "utility"]].isna().all()
    assert f"not ranked, {why}: a" in defense_text.markdown(tables)


def test_less_than_three_seeds_are_listed_and_not_ranked_and_a_drop_that_may_be_outside_is_marked():
    rows = frame(make([1.0] * 10, "knows", task=CIFAR, reference=0.0), attacked("a", 0.4))
    two = pd.DataFrame([*trained("none", [0, 0]), *trained("a", [0.5, 0.5])])
    tables = board(rows, two, RECOVERS)
    assert tables["ranking"].iloc[0]["unranked_because"] == "fewer than 3 seeds"
    assert by_label(tables["settings"]).loc["a(std=0.1)", "drop"] == pytest.approx(0.5)
    # 1, 1.5, 2: half width 4.3027 * .5 / sqrt(3) = 1.24, up to 2.74: within 5 points, not surely within 2
    ranking, _, tables = ranked([attacked("a", 0.4)], [trained("a", [1.0, 1.5, 2.0])])
    assert ranking.loc["a", ["sure_at_2", "sure_at_5", "sure_at_1"]].tolist() == [False, True, None]
    shown = defense_text.markdown(tables)
    assert "#1? (std=0.1)" in shown
    assert "#1 (std=0.1)" in shown


@pytest.mark.parametrize("column", JOINED)
def test_accuracy_of_another_season_version_or_copy_of_the_data_is_not_joined(column):
    other = trained("a", [0.5] * 3, **{column: "other"}) + trained("none", [0] * 3, **{column: "other"})
    rows = frame(make([1.0] * 10, "knows", task=CIFAR, reference=0.0), attacked("a", 0.4))
    ranking = board(rows, pd.DataFrame(other), RECOVERS)["ranking"].iloc[0]
    text = "no federated training with it on this dataset"
    if column != "dataset":
        text += " in this season and version"
    assert ranking["unranked_because"] == text


def test_of_several_trainings_the_one_most_like_what_was_attacked_counts_and_is_named():
    small = {"architecture": "mlp", "sends": "gradient", "clients": 10, "rounds": 60, "batch_size": 32}
    deep = small | {"architecture": "resnet20"}
    costs = [trained(name, [drop] * 3, **own) for own, drop in ((small, 0.5), (deep, 4)) for name in ("a", "none")]
    costs = [*costs, trained("none", [0] * 4, architecture="lenet5")]
    rows = frame(make([1.0] * 10, "knows", task=CIFAR, reference=0.0), attacked("a", 0.4))
    tables = board(rows, pd.DataFrame([line for part in costs for line in part]), RECOVERS)
    line = by_label(tables["settings"]).loc["a(std=0.1)"]
    assert line[["drop", "trainings", "other_trainings"]].tolist() == [pytest.approx(0.5), 3, 2]
    assert line["training"] == "mlp, gradient, B=32, 10 clients, 60 rounds"
    said = "accuracy of mlp, gradient, B=32, 10 clients, 60 rounds; iid; 2 other settings of training are less like"
    assert said in defense_text.markdown(tables)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_hypervolume_counts_the_covered_squares_of_a_grid(points):
    covered = {(x, y) for u, p in points for x in range(u) for y in range(p)}
    u, p = np.array(points, dtype=float).T / 20
    assert float(hypervolume(u, p)) == pytest.approx(len(covered) / 400)


# --- secure aggregation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "expected"), [(LABELS, 1 - 0.25 / 0.75), (INPUTS, 1 - 2 / 10)])
def test_a_cohort_is_a_defense_of_the_same_task_with_one_client(task, expected):
    many = task.model_copy(update={"protocol": Protocol(clients=4, secure_aggregation=True)})
    labels = task.target == "labels"
    # labels: of what is between chance and all, 3/4 with one client and 1/4 with four; inputs: gains of 10 and 2 dB
    alone = make([0.8 if labels else 20.0] * 8, "a", task=task, reference=0.2 if labels else 10.0)
    sums = make([0.7 if labels else 13.0] * 8, "a", task=many, reference=0.6 if labels else 11.0)
    tables = board(frame(alone, sums))
    line = by_label(tables["settings"]).loc["secure_aggregation(clients=4)"]
    assert line["privacy"] == pytest.approx(expected)
    assert line[["drop", "utility", "unranked_because"]].tolist() == [0, 1, None]
    assert line["lane"] == task.lane
    assert "secure_aggregation(clients=4)" not in set(by_label(board(frame(sums))["settings"]).index)


# --- text and picture -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables():
    attacks = [attacked("a|b", 0.9, 0.1), attacked("a|b", 0.5, 1.0), attacked("c", 0.3), attacked("dear", 0.1)]
    costs = [trained("a|b", [0.9, 1.0, 1.1], 0.1), trained("a|b", [3.8, 4, 4.2], 1.0), trained("dear", [30] * 3)]
    return ranked(attacks, costs)[2]


def test_every_form_says_who_leads_and_why_another_has_no_rank(tables):
    stream = io.StringIO()
    defense_text.terminal(tables, Console(file=stream, width=140))
    for text in (stream.getvalue(), defense_text.markdown(tables).replace("\\|", "|")):
        assert "0.50 [" in text
        assert "nan" not in text.lower()
        assert "#1 (std=1.0)" in text
        assert "not ranked, no federated training with it on this dataset: c" in text
    found = json.loads(defense_text.to_json(tables))
    assert set(found) == {"meta", *defense_text.COLUMNS}
    for name, lines in found.items():
        assert name == "meta" or all(set(found["meta"]["columns"][name]) <= set(line) for line in lines)
    read = pd.read_csv(io.StringIO(defense_text.to_csv({"settings": tables["settings"]})))
    assert read["privacy"].tolist() == tables["settings"]["privacy"].tolist()


def test_the_picture_holds_what_was_attacked_and_trained_and_is_the_same_file_every_time(tables):
    picture = pareto.render(tables["settings"], "svg").decode()
    assert picture == pareto.render(tables["settings"], "svg").decode()
    assert "a|b(std=1.0) leaves 0.50 of the leakage at 4.0 points lost." in picture
    assert "c(std=0.1)" not in picture
    axes = pareto.draw(tables["settings"]).axes[0]
    filled = next(line for line in axes.lines if list(line.get_xdata()) == pytest.approx([1.0, 4.0]))
    assert list(filled.get_ydata()) == pytest.approx([0.9, 0.5])
    # a(std=.1) lost 1 point, a(std=1) 4, dear 30; whiskers of seeds do not widen the frame
    assert axes.get_xlim() == pytest.approx((-2.4, 32.4))
    with pytest.raises(UserError, match="leakbench utility"):
        pareto.render(tables["settings"].assign(drop=np.nan), "svg")


def test_the_caption_of_a_picture_of_one_panel_lies_inside_and_wide_whiskers_end_at_the_frame():
    _, _, tables = ranked([attacked("a", 0.4)], [trained("a", [-40, 1, 42])])
    figure = pareto.draw(tables["settings"])
    FigureCanvasAgg(figure).draw()
    (caption,) = figure.texts
    box, page = caption.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert " ".join(caption.get_text().split()) == pareto.CAPTION
    (axes,) = figure.axes
    (whisker,) = [lines for lines in axes.collections if np.ptp(lines.get_segments()[0][:, 0]) > 0]
    assert np.ptp(whisker.get_segments()[0][:, 0]) > 100
    assert np.ptp(axes.get_xlim()) < 2


def test_a_board_without_rows_has_every_table_and_no_line():
    empty = board(frame(make([1.0]))[:0])
    assert all(table.empty for table in empty.values())
    assert defense_text.markdown(empty).strip() == ""

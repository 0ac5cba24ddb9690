"""Verdicts on claims, with frames whose differences are known by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from leakbench.board.claims import Claim, summary, verdicts

LAYERS = [("a", 0, "convolution"), ("b", 1, "convolution"), ("c", 2, "linear")]
TASK = {
    "status": "ok",
    "task": "t",
    "task_hash": "h",
    "dataset": "d",
    "architecture": "n",
    "batch_size": 1,
    "local_steps": 1,
    "sends": "gradient",
    "defense": "none",
    "defense_label": "none",
    "measure": "m",
    "measure_params": "{}",
}


def fitted(values, *, half=0.1, **task):
    """Return fitted rows: value by layer, all with the same half interval."""
    known = {name: (depth, kind) for name, depth, kind in LAYERS}
    return pd.DataFrame(
        [
            TASK
            | {"quantity": "v_information", "layer": layer, "depth": known.get(layer, (None, None))[0]}
            | {"layer_kind": known.get(layer, (None, None))[1], "value": value, "trial": None, "n": 50}
            | {"low": value - half, "high": value + half}
            | task
            for layer, value in values.items()
        ]
    )


def per_trial(values, *, spread=0.0, trials=20, **task):
    """Return rows per trial: value by layer, plus a spread that all layers of a trial share."""
    noise = np.random.default_rng(0).normal(size=trials)
    one = fitted(values, **task)
    rows = [
        row | {"trial": t, "value": row["value"] + spread * noise[t]}
        for t in range(trials)
        for row in one.to_dict("records")
    ]
    return pd.DataFrame(rows)


def claim(**fields):
    return Claim(name="c", source="s", **{"quantities": ["v_information"], **fields})


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"a": 1.0, "b": 0.2, "c": 0.3}, "agrees"),
        ({"a": 0.1, "b": 0.2, "c": 0.9}, "differs"),
        ({"a": 0.5, "b": 0.4, "c": 0.55}, "undecided"),
    ],
)
def test_the_means_of_the_groups_decide(values, verdict):
    (line,) = verdicts([claim(layers=["first_third", "later"])], fitted(values), pd.DataFrame()).to_dict("records")
    assert line["verdict"] == verdict
    assert line["more"] == values["a"]
    np.testing.assert_allclose(line["less"], (values["b"] + values["c"]) / 2)
    width = np.hypot(0.1, 0.1)
    np.testing.assert_allclose([line["high"] - line["difference"], line["difference"] - line["low"]], width)


def test_a_group_of_more_layers_is_not_favored():
    """Twenty layers against one, all alike but for noise: the greatest of twenty would win."""
    names = [f"l{i}" for i in range(21)]
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(40):
        values = rng.normal(1, 0.1, size=(30, 21))
        rows = pd.concat(
            fitted(dict.fromkeys(names, 0.0)).assign(
                value=own, trial=t, depth=range(21), layer_kind=["linear"] + ["convolution"] * 20
            )
            for t, own in enumerate(values)
        )
        (line,) = verdicts([claim(layers=["dense", "not_dense"])], rows, pd.DataFrame()).to_dict("records")
        wrong += line["verdict"] != "undecided"
    assert wrong <= 7  # 2 expected


def test_what_has_no_interval_is_not_counted():
    rows = fitted({"a": 1.0, "b": 0.2, "c": 0.3}).assign(low=np.nan, high=np.nan)
    assert verdicts([claim(layers=["first_third", "later"])], rows, pd.DataFrame()).empty


def test_dense_layers_are_those_that_are_linear_and_a_net_without_others_says_nothing():
    rows = fitted({"a": 0.1, "b": 0.2, "c": 0.9})
    (line,) = verdicts([claim(layers=["dense", "not_dense"])], rows, pd.DataFrame()).to_dict("records")
    np.testing.assert_allclose([line["more"], line["less"]], [0.9, 0.15])
    assert line["note"] == "1 layers against 2 layers"
    assert verdicts([claim(layers=["dense", "not_dense"])], rows[rows["layer"] == "c"], pd.DataFrame()).empty


def test_trials_are_compared_with_themselves():
    """What all layers of a trial share cancels: the interval is that of the difference, here of width zero."""
    rows = per_trial({"a": 1.0, "b": 0.9, "c": 0.8}, spread=50.0)
    (line,) = verdicts([claim(layers=["first_third", "later"])], rows, pd.DataFrame()).to_dict("records")
    assert line["verdict"] == "agrees"
    assert line["high"] - line["low"] < 1e-9
    assert line["n"] == 20


def test_an_axis_is_compared_from_its_smallest_value_within_what_else_is_equal():
    rows = pd.concat(
        [fitted({"all": 1.0 / size}, half=0.01, batch_size=size, stage=stage) for size in (4, 1, 16) for stage in "xy"]
    )
    table = verdicts([claim(axis="batch_size")], rows, pd.DataFrame())
    assert sorted(table["setting"]) == [f"t: batch_size 1 against {size}" for size in (16, 16, 4, 4)]
    assert set(table["verdict"]) == {"agrees"}
    other = pd.concat([rows, fitted({"all": -9.0}, half=0.01, batch_size=4, stage="x", momentum=0.9)])
    assert len(verdicts([claim(axis="batch_size")], other, pd.DataFrame())) == 4  # another client is another series
    alone = fitted({"all": 1.0}, batch_size=1)
    assert verdicts([claim(axis="batch_size")], alone, pd.DataFrame()).empty


def test_one_client_is_compared_with_a_cohort_behind_a_sum():
    rows = pd.concat(
        [
            fitted({"all": 0.9}, clients=1, secure_aggregation=False),
            fitted({"all": 0.2}, clients=4, secure_aggregation=True),
        ]
    )
    (line,) = verdicts([claim(axis="clients")], rows, pd.DataFrame()).to_dict("records")
    assert line["verdict"] == "agrees"


def attacked(quality, *, defense="none", trials=12):
    return pd.DataFrame(
        [
            TASK
            | {"attack_label": name, "defense_label": defense, "trial": t, "psnr": value + t / 100, "mse": -value}
            | {"psnr_floor": 8.0, "mse_floor": -8.0}
            for name, value in quality.items()
            for t in range(trials)
        ]
    )


@pytest.mark.parametrize("metric", ["psnr", "mse"])
def test_protection_is_judged_by_the_best_attack_on_each_side(metric):
    """The attack that is best without the defense may not be the best one with it."""
    rows = pd.concat(
        [
            attacked({"p": 30.0, "q": 20.0}),
            attacked({"p": 5.0, "q": 19.0}, defense="w"),
            attacked({"p": 1.0}, defense="x"),
        ]
    )
    table = verdicts([claim(quantities=[metric], withheld=["w"])], pd.DataFrame(), rows)
    (line,) = table.to_dict("records")
    assert line["note"] == "p against q"
    np.testing.assert_allclose(line["difference"], 11.0)
    assert line["verdict"] == "agrees"


def test_an_attack_that_failed_protects_nothing():
    before = attacked({"p": 30.0, "q": 20.0})
    after = attacked({"p": np.nan, "q": 19.0}, defense="w")
    after.loc[after["attack_label"] == "p", "status"] = "timeout"
    for rows in (pd.concat([before, after]), pd.concat([before, after[after["attack_label"] == "q"]])):
        (line,) = verdicts([claim(quantities=["psnr"], withheld=["w"])], pd.DataFrame(), rows).to_dict("records")
        assert line["verdict"] == "undecided"
        assert line["note"] == "failed or not run against the defense: p"


def test_an_attack_that_failed_in_most_trials_is_not_the_best_undefended_one():
    """Two lucky trials of twelve: the others count as the floor."""
    before = attacked({"p": 30.0, "q": 20.0})
    failed = (before["attack_label"] == "p") & (before["trial"] > 1)
    before.loc[failed, ["status", "psnr"]] = ["error", np.nan]
    rows = pd.concat([before, attacked({"p": 5.0, "q": 19.0}, defense="w")])
    (line,) = verdicts([claim(quantities=["psnr"], withheld=["w"])], pd.DataFrame(), rows).to_dict("records")
    assert line["note"] == "q against q"
    np.testing.assert_allclose(line["difference"], 1.0)


def test_what_is_left_in_the_update_is_judged_like_attacks():
    rows = pd.concat([fitted({"all": 0.9, "a": 0.5}), fitted({"all": 0.95, "a": 0.5}, defense_label="w")])
    (line,) = verdicts([claim(withheld=["w", "absent"])], rows, pd.DataFrame()).to_dict("records")
    assert (line["more"], line["less"], line["verdict"]) == (0.9, 0.95, "undecided")


def test_a_claim_needs_two_thirds_of_its_comparisons():
    one = claim(layers=["first_third", "later"])
    for found, expected in {
        ("agrees", "agrees", "differs"): "agrees",
        ("agrees", "undecided", "differs"): "undecided",
        ("differs", "differs", "undecided"): "differs",
        (): "undecided",
    }.items():
        for order in itertools.permutations(found):
            table = pd.DataFrame([{"claim": "c", "verdict": v} for v in order], columns=["claim", "verdict"])
            (line,) = summary([one], table).to_dict("records")
            assert line["verdict"] == expected


def test_rows_that_failed_or_are_of_another_setting_do_not_count():
    rows = fitted({"a": 1.0, "b": 0.2, "c": 0.3})
    assert verdicts([claim(layers=["first_third", "later"])], rows.assign(status="oom"), pd.DataFrame()).empty
    other = claim(layers=["first_third", "later"], where={"dataset": "e"})
    assert verdicts([other], rows, pd.DataFrame()).empty

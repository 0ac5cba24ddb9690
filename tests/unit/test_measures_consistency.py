"""The check that no attack exceeds a proved bound: finds what does, and cries wolf no oftener than stated."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from leakbench import LeakbenchError
from leakbench.measures.consistency import check, violations

SHARED = {
    "benchmark_version": "1.0",
    "task": "digits-membership",
    "task_hash": "a1",
    "defense": "dp_sgd",
    "defense_label": "dp_sgd(noise_multiplier=4.0)",
    "defense_version": 1,
    "defense_params": "{}",
    "defense_source_sha256": None,
    "status": "ok",
}


def attacked(values, **fields):
    own = {"attack": "a", "attack_label": "a(k=1)", "attack_version": 1, "attack_params": "{}"}
    own |= {"attack_source_sha256": None, "target": "membership"}
    return pd.DataFrame([SHARED | own | {"inference_accuracy": v} | fields for v in values])


def measured(quantity="membership_accuracy_bound", value=0.6, *, kind="proved_bound", delta=1e-5, trials=2, **fields):
    own = {"measure_label": "m", "measure_params": json.dumps({"delta": delta}), "kind": kind, "layer": "all", "n": 50}
    return pd.DataFrame([SHARED | own | {"quantity": quantity, "value": value} | fields] * trials)


def test_it_says_which_attack_exceeds_what_by_how_much():
    (found,) = violations(attacked([1] * 45 + [0] * 5), measured())
    assert (found.value, found.n, found.bound) == (0.9, 50, 0.6)
    # One-sided at 5%: the end of a two-sided 90% interval.
    assert found.low == pytest.approx(binomtest(45, 50).proportion_ci(0.9, method="exact").low)
    assert str(found) == (
        "digits-membership / dp_sgd(noise_multiplier=4.0): a(k=1) has inference_accuracy 0.900 (at least 0.801, n=50), "
        "above membership_accuracy_bound 0.600"
    )
    with pytest.raises(LeakbenchError, match=r"a\(k=1\) has inference_accuracy 0\.900"):
        check(attacked([1] * 45 + [0] * 5), measured())


def test_what_is_within_its_interval_passes():
    check(attacked([1] * 33 + [0] * 17), measured())
    check(attacked([1] * 3), measured())  # three of three is no proof of more than .6


@pytest.mark.parametrize(
    "fields",
    [{"target": "attribute"}, {"task_hash": "b2"}, {"defense_params": '{"z":1}'}, {"benchmark_version": "2.0"}],
)
def test_a_bound_holds_for_its_own_task_target_and_defense(fields):
    assert violations(attacked([1] * 50, **fields), measured()) == []


def test_nulls_in_a_key_agree_with_nulls_only():
    assert len(violations(attacked([1] * 50), measured())) == 1
    assert violations(attacked([1] * 50, defense_source_sha256="f0"), measured()) == []


def test_an_attack_that_fails_where_it_is_unsure_gains_nothing():
    rows = pd.concat([attacked([1] * 30), attacked([np.nan] * 20, status="error")])
    assert violations(rows, measured()) == []
    rows = pd.concat([attacked([1] * 30), attacked([np.nan] * 20, status="unavailable")])
    assert len(violations(rows, measured())) == 1


def test_bounds_that_were_not_computed_and_layers_bound_nothing():
    rows = attacked([1] * 50)
    assert violations(rows, measured(status="error")) == []
    assert violations(rows, measured(layer="0")) == []
    assert violations(rows, measured("rero_gamma_example")) == []
    assert violations(rows.iloc[:0], measured()) == []
    assert violations(rows, measured().iloc[:0]) == []


def test_attacks_are_counted_one_by_one_and_share_the_level():
    rows = [attacked([1] * 38 + [0] * 12, attack_params=f'{{"k":{k}}}') for k in range(40)]
    assert len(violations(rows[0], measured(value=0.6))) == 1
    assert violations(pd.concat(rows), measured(value=0.6)) == []


def test_an_audit_above_the_proved_epsilon_is_found():
    proved = measured("epsilon", 2.0)
    above = measured("one_run_epsilon", 2.5, kind="lower_bound", trials=1, measure_label="empirical_epsilon")
    (found,) = violations(attacked([]).reindex(columns=attacked([1]).columns), pd.concat([proved, above]))
    assert str(found).endswith(
        "empirical_epsilon has one_run_epsilon 2.500 (at least 2.500, n=50), above epsilon 2.000"
    )
    none = attacked([1]).iloc[:0]
    assert violations(none, pd.concat([proved, above.assign(value=1.9)])) == []
    other_delta = measured("one_run_epsilon", 2.5, kind="lower_bound", trials=1, delta=1e-3)
    assert violations(none, pd.concat([proved, other_delta])) == []


def test_an_attack_at_the_bound_is_accused_at_most_as_often_as_stated():
    rng = np.random.default_rng(0)
    runs = [attacked(rng.random(60) < 0.6, task_hash=str(k)).astype({"inference_accuracy": float}) for k in range(100)]
    alone = sum(bool(violations(run, measured(task_hash=str(k)))) for k, run in enumerate(runs))
    assert 0 < alone <= 100 * 0.05 + 3 * (100 * 0.05 * 0.95) ** 0.5
    bounds = pd.concat([measured(task_hash=str(k)) for k in range(100)])
    assert violations(pd.concat(runs), bounds) == []

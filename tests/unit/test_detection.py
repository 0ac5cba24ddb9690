"""Statistics over trials against scikit-learn, and how boards count them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from board_rows import LABELS, frame, make, only
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from leakbench.board import render
from leakbench.board.detection import _of_counts, statistics
from leakbench.board.lanes import lanes
from leakbench.board.score import cells
from leakbench.tasks import AttributeSpec

ATTRIBUTE = LABELS.model_copy(update={"target": "attribute", "attribute": AttributeSpec(name="ge5")})
LEVELS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 1.0])


def by_sklearn(truth, scores):
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    sides = [balanced_accuracy_score(truth, claim) for claim in (scores > 0.5, scores >= 0.5)]
    return {
        "auc": roc_auc_score(truth, scores),
        "balanced_accuracy": sum(sides) / 2,
        "tpr_at_1pct_fpr": max(true[false <= 0.01]),
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), LEVELS, st.integers(1, 3)), min_size=2, max_size=40))
def test_every_statistic_is_scikit_learns_on_rows_that_are_repeated(rows):
    truth, scores, times = (np.array(column) for column in zip(*rows, strict=True))
    if len(set(truth)) < 2:
        return
    levels, position = np.unique(scores, return_inverse=True)
    found = _of_counts(times[None].astype(float), truth, levels, position)
    expected = by_sklearn(np.repeat(truth, times), np.repeat(scores, times))
    assert {name: value[0] for name, value in found.items()} == pytest.approx(expected)


def test_a_hundred_negatives_allow_one_false_positive():
    truth = np.array([0] * 100 + [1] * 4)
    scores = np.concatenate([np.linspace(0, 0.4, 99), [0.9, 0.95, 0.6, 0.5, 0.2]])
    found = statistics(truth, scores, range(104))["tpr_at_1pct_fpr"].mean
    assert found == 0.75
    assert statistics(truth[1:], scores[1:], range(103))["tpr_at_1pct_fpr"].mean == 0.25


def test_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 60)
    scores = np.clip(rng.normal(0.5 + 0.15 * (2 * truth - 1), 0.2), 0, 1)
    found = statistics(truth, scores, range(60))
    drawn = [rng.integers(0, 60, 60) for _ in range(400)]
    plain = [by_sklearn(truth[rows], scores[rows]) for rows in drawn]
    for name in ("auc", "balanced_accuracy"):
        ends = np.quantile([each[name] for each in plain], [0.025, 0.975])
        assert found[name].mean == pytest.approx(by_sklearn(truth, scores)[name])
        assert found[name][1:] == pytest.approx(tuple(ends), abs=0.03)


def test_rows_of_one_victim_are_drawn_together():
    truth, scores = np.array([0, 1] * 10), np.linspace(0.2, 0.8, 20)
    own, shared = (statistics(truth, scores, [i // n for i in range(20)])["auc"] for n in (1, 10))
    assert own.mean == shared.mean
    assert shared.high - shared.low != own.high - own.low


def test_one_truth_tells_nothing():
    found = statistics(np.ones(5, np.int64), np.linspace(0, 1, 5), range(5))
    assert np.isnan([value for interval in found.values() for value in interval]).all()


def claims(scores, truths, **changes):
    accuracy = [
        None if s is None else 0.5 if s == 0.5 else float((s > 0.5) == t) for s, t in zip(scores, truths, strict=True)
    ]
    rows = make(accuracy, "property_inference", task=ATTRIBUTE, reference=0.5, **changes)
    return [
        row | {"inference_score": score, "inference_truth": truth}
        for row, score, truth in zip(rows, scores, truths, strict=True)
    ]


def test_a_trial_without_a_claim_counts_as_one_of_a_half():
    board = only(cells(frame(claims([0.9, None, 0.2, None], [1, 1, 0, 0]))))
    said = only(cells(frame(claims([0.9, 0.5, 0.2, 0.5], [1, 1, 0, 0]))))
    names = ["mean", "auc", "balanced_accuracy", "tpr_at_1pct_fpr"]
    assert board[names].tolist() == said[names].tolist() == [0.75, 0.875, 0.75, 0.5]
    assert (board["coverage"], said["coverage"]) == (0.5, 1)


def test_other_targets_have_no_such_statistics():
    assert np.isnan(only(cells(frame(make([0.5] * 4))))["auc"])


def test_a_board_of_claims_fits_a_terminal_and_shows_the_statistics():
    rows = frame(claims([0.9, 0.1, 0.2, 0.8] * 4, [1, 0, 0, 1] * 4))
    out = io.StringIO()
    render.terminal(cells(rows), lanes(rows), Console(file=out, width=80))
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "inference of attribute" in text
    heading = next(line for line in text.splitlines() if "AUC" in line)
    assert heading.split() == ["attack", "inference", "accuracy", "chance", "AUC", "TPR@1%", "bits", "trials"]
    assert only(lanes(rows))["edge"] == 1

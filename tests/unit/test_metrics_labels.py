from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from leakbench.errors import InvalidOutput
from leakbench.metrics import METRICS, headline
from leakbench.metrics.labels import LABEL_METRICS, score_labels

# true counts, claimed counts, and every metric worked out by hand from labels.md section 4
CASES = [
    (
        [4, 2, 1, 1],
        [3, 3, 0, 2],
        {
            "instance_recall": 6 / 8,
            "instance_precision": 6 / 8,
            "irec": 6 / 8,
            "count_exact_match": 0,
            "presence_precision": 1,
            "presence_recall": 3 / 4,
            "presence_f1": 6 / 7,
            "set_exact_match": 0,
            "class_accuracy": 3 / 4,
            "count_accuracy": 0,
            "count_accuracy_present": 0,
            "l1_count_error": 4 / 8,
            "total_variation": 2 / 8,
        },
    ),
    (
        [2, 0, 2, 0],
        [1, 0, 0, 1],
        {
            "instance_recall": 1 / 4,
            "instance_precision": 1 / 2,
            "irec": 1 / 4,
            "count_exact_match": 0,
            "presence_precision": 1 / 2,
            "presence_recall": 1 / 2,
            "presence_f1": 1 / 2,
            "set_exact_match": 0,
            "class_accuracy": 2 / 4,
            "count_accuracy": 1 / 4,
            "count_accuracy_present": 0,
            "l1_count_error": 4 / 4,
            "total_variation": 1 / 2,
        },
    ),
    (
        [1, 3, 0, 0],
        [0, 0, 0, 0],
        dict.fromkeys(LABEL_METRICS, 0)
        | {"class_accuracy": 1 / 2, "count_accuracy": 1 / 2, "l1_count_error": 1, "total_variation": 1},
    ),
    (
        [1, 3, 0, 0],
        [2, 6, 0, 0],
        dict.fromkeys(LABEL_METRICS, 1)
        | {
            "instance_recall": 4 / 8,
            "instance_precision": 4 / 8,
            "count_exact_match": 0,
            "count_accuracy": 2 / 4,
            "count_accuracy_present": 0,
            "total_variation": 0,
        },
    ),
]


def counts(*trials):
    return torch.tensor(trials, dtype=torch.int64).reshape(len(trials), 1, -1)


@pytest.mark.parametrize(("true", "claimed", "expected"), CASES)
def test_metrics_agree_with_hand_worked_cases(true, claimed, expected):
    scores = score_labels(counts(true), counts(claimed))
    assert {name: value.item() for name, value in scores.items()} == pytest.approx(expected)


def test_every_registered_label_metric_is_computed_in_float64_per_trial():
    scores = score_labels(counts([1, 2], [3, 0]), counts([2, 1], [3, 0]))
    assert list(scores) == [name for name, spec in METRICS.items() if spec.target == "labels"]
    assert all(value.shape == (2,) and value.dtype == torch.float64 for value in scores.values())
    assert headline("labels").name == "instance_recall"


label_lists = st.integers(2, 6).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        *(st.lists(st.integers(0, classes - 1), min_size=1, max_size=12) for _ in range(2)),
    )
)


@settings(max_examples=40, deadline=None)
@given(label_lists)
def test_metrics_agree_with_multisets_and_scikit_learn(case):
    classes, true, claimed = case
    n, m = Counter(true), Counter(claimed)
    scores = score_labels(
        *(counts([labels.count(c) for c in range(classes)]) for labels in (true, claimed)),
    )
    common = sum((n & m).values())
    present, said = ([c in labels for c in range(classes)] for labels in (n, m))
    expected = {
        "instance_recall": common / max(len(true), len(claimed)),
        "instance_precision": common / len(claimed),
        "irec": common / len(true),
        "count_exact_match": float(n == m),
        "presence_precision": precision_score(present, said, zero_division=0),
        "presence_recall": recall_score(present, said),
        "presence_f1": f1_score(present, said, zero_division=0),
        "set_exact_match": float(set(n) == set(m)),
        "l1_count_error": (sum((n - m).values()) + sum((m - n).values())) / len(true),
    }
    assert {name: scores[name].item() for name in expected} == pytest.approx(expected)
    if len(true) == len(claimed):
        assert scores["instance_recall"].item() == pytest.approx(1 - scores["l1_count_error"].item() / 2)


def test_claiming_more_labels_than_there_are_gains_nothing():
    true = counts([4, 4, 0, 0])
    honest, flood = score_labels(true, counts([4, 4, 0, 0])), score_labels(true, counts([8, 8, 8, 8]))
    assert honest["instance_recall"].item() == 1
    assert flood["instance_recall"].item() == 8 / 32


def test_clients_are_scored_apart_and_averaged():
    true = torch.tensor([[[2, 0], [0, 2]]])
    claimed = torch.tensor([[[2, 0], [1, 1]]])
    assert score_labels(true, claimed)["instance_recall"].item() == pytest.approx((1 + 0.5) / 2)


def test_a_claim_about_the_union_is_scored_on_the_union():
    true = torch.tensor([[[2, 0], [0, 2]]])
    assert score_labels(true, torch.tensor([[[2, 2]]]))["count_exact_match"].item() == 1
    assert score_labels(true, torch.tensor([[[4, 0]]]))["instance_recall"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("claimed", [torch.zeros(1, 3, 2), torch.zeros(1, 1, 3), torch.zeros(2, 1, 2)])
def test_a_claim_of_another_shape_is_invalid(claimed):
    with pytest.raises(InvalidOutput, match="expected shape"):
        score_labels(torch.ones(1, 1, 2, dtype=torch.int64), claimed.long())


def test_a_negative_count_is_invalid():
    with pytest.raises(InvalidOutput, match="negative"):
        score_labels(counts([1, 1]), counts([3, -1]))

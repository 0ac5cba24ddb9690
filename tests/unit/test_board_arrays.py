"""The board is computed from arrays and products of matrices; here from frames and draws, as it is defined."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from board_rows import INPUTS, LABELS, frame, make

from leakbench.board.lanes import lanes
from leakbench.board.score import cells
from leakbench.board.stats import RESAMPLES, widening
from leakbench.keys import PUBLIC_KEY, seed
from leakbench.metrics import headline
from leakbench.schema import FAILURES, STATUSES


@pytest.fixture(scope="module")
def rows():
    """Rows of two targets and three attacks where much went wrong, in no order."""
    rng = np.random.default_rng(3)
    parts = []
    for task in (LABELS, INPUTS):
        for attack in ("llg", "idlg", "ebi"):
            values, floors = 0.4 + 0.2 * rng.random(17), rng.random(17)
            for draw in range(2):
                statuses = rng.choice([*["ok"] * 12, *STATUSES], 17).tolist()
                known = [v if s == "ok" else None for v, s in zip(values, statuses, strict=True)]
                given = [None if rng.random() < 0.1 and s != "ok" else f for f, s in zip(floors, statuses, strict=True)]
                changes = {"lane": f"passive_{'images' if task is INPUTS else 'labels'}", "draw": draw}
                parts.append(make(known, attack, task=task, reference=given, statuses=statuses, **changes))
    return frame(*parts).sample(frac=1, random_state=1).reset_index(drop=True)


def plain_interval(values, pairs):
    codes = pd.factorize(pd.MultiIndex.from_tuples(pairs))[0]
    sums, sizes = np.bincount(codes, weights=values), np.bincount(codes).astype(float)
    rng = np.random.default_rng(seed(PUBLIC_KEY, "bootstrap"))
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    ends = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [(1 - 0.95) / 2, (1 + 0.95) / 2])
    mean, wider = values.mean(), widening(len(sums))
    return pytest.approx(tuple(mean + wider * (end - mean) for end in ends), rel=1e-12)


def test_cells_are_what_frames_give(rows):
    board = cells(rows)
    assert len(board) == 6
    for _, line in board.iterrows():
        own = rows[(rows["attack"] == line["attack"]) & (rows["target"] == line["target"])]
        own = own.sort_values(["draw", "trial"], kind="stable")
        for status in STATUSES:
            assert line[status] == (own["status"] == status).sum()
        tried = own[own["status"].isin(["ok", *FAILURES, "not_applicable"])]
        spec = headline(line["target"])
        reference = tried[spec.reference].to_numpy(float)
        reference = np.where(np.isnan(reference), reference[~np.isnan(reference)].mean(), reference)
        values = np.where(tried["status"] == "ok", tried[spec.name].to_numpy(float), reference)
        pairs = list(zip(tried["draw"].tolist(), tried["trial"].tolist(), strict=True))
        assert (line["n"], line["mean"]) == (len(tried), values.mean())
        assert (line["ci_low"], line["ci_high"]) == plain_interval(values, pairs)
        assert line["reference"] == reference.mean()
        errors = own.loc[own["status"] != "ok", "error"].dropna()
        assert line["failure"] == errors.value_counts().index[0]
        if line["target"] == "inputs":
            assert line["gain"] == (values - reference).mean()
            assert (line["gain_low"], line["gain_high"]) == plain_interval(values - reference, pairs)


def test_the_edge_of_a_lane_of_one_task_is_the_mean_over_victims_of_value_minus_floor(rows):
    board, ranked = cells(rows), lanes(rows)
    assert len(ranked) == 6
    for _, line in ranked[ranked["target"] == "inputs"].iterrows():
        cell = board[(board["attack"] == line["attack"]) & (board["target"] == "inputs")].iloc[0]
        own = rows[(rows["attack"] == line["attack"]) & (rows["target"] == "inputs")]
        tried = own[own["status"] != "unavailable"]
        known = tried["psnr_floor"].mean()
        floors = tried["psnr_floor"].fillna(known)
        gaps = tried["psnr"].where(tried["status"] == "ok").fillna(floors) - cell["reference"]
        by_victim = gaps.groupby([tried["trial"], tried["draw"]]).mean().unstack().reindex(columns=[0, 1])
        everyone = own.drop_duplicates(["draw", "trial"])
        missing = by_victim.reindex(sorted(everyone["trial"].unique())).fillna(0.0)  # not tried: no edge
        assert line["edge"] == pytest.approx(missing.mean(axis=1).mean(), abs=1e-12)


def test_the_order_of_rows_does_not_matter(rows):
    again = rows.sample(frac=1, random_state=2).reset_index(drop=True)
    pd.testing.assert_frame_equal(cells(rows), cells(again), check_exact=True)
    by_name = [board.sort_values(["lane", "attack"], ignore_index=True) for board in (lanes(rows), lanes(again))]
    pd.testing.assert_frame_equal(*by_name, check_exact=True)

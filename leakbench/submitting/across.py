"""What rows of different jobs have in common: the same trial its numbers, a dataset and a model its hash. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from leakbench.metrics import METRICS
from leakbench.stage import IN_TRAINING
from leakbench.submitting.rerun import ATOL, RTOL

_TRIAL = (
    *("season_commitment", "benchmark_version", "task_hash", "model_draws", "trial"),
    *("defense", "defense_version", "defense_params", "defense_source_sha256"),
    *("attack", "attack_version", "attack_params", "attack_source_sha256"),
    *("budget_model_evaluations", "budget_wall_seconds"),
)
"""By which a row is of the same trial as another, whatever its job, block and threads: of them boards show one."""
_VALUES = tuple(name for name, spec in METRICS.items() if spec.target != "stealth")
_MODEL = ("season_commitment", "task_hash", "draw", "checkpoint_origin")
_MACHINE = ("host_kind", "torch")
_ONE = (
    (("season_commitment",), "season", "the key of its season has another name in other jobs"),
    (
        ("season_commitment", "dataset"),
        "dataset_fingerprint",
        "forged, or other data: dataset_fingerprint is not that of other jobs on this dataset",
    ),
    (
        (*_MODEL, *_MACHINE),
        "checkpoint_sha256",
        "forged: checkpoint_sha256 is not that of the same model in other jobs of the same kind of machine",
    ),
)
"""What has one value: per what, which column, and what is wrong where it has several."""

COLUMNS = tuple(
    dict.fromkeys(
        (
            *(*_TRIAL, *_VALUES, "status", "stage", *_MODEL, *_MACHINE),
            *(name for key, one, _ in _ONE for name in (*key, one)),
        )
    )
)
"""Columns of rows that `contradictions` and `remarks` read, besides ``_where``."""


def contradictions(rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of jobs whose rows cannot be right together.

    Args:
        rows: Rows of attacks with `COLUMNS`, and ``_where`` they are.
    """
    for key, name, text in _ONE:
        # What was kept in trainings is of as many models as there were rounds and defenses.
        own = rows[rows["stage"] != IN_TRAINING] if name == "checkpoint_sha256" else rows
        for where in _odd(own, key, name):
            yield where, text
    few, trial = _again(rows[rows["status"] == "ok"])
    for name in _VALUES:
        values = few[name].groupby(trial)
        low, high = values.transform("min"), values.transform("max")
        for where in few.loc[(high - low) > ATOL + RTOL * high.abs(), "_where"].drop_duplicates():
            yield where, f"duplicate: its trials have another {name} in another job of the same attack on the same task"


def remarks(rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of jobs that are worth a look; see `contradictions`."""
    trained = (rows["checkpoint_origin"] != "init") & (rows["stage"] != IN_TRAINING)
    for where in _odd(rows[trained], _MODEL, "checkpoint_sha256"):
        yield where, "checkpoint_sha256 is not that of the same model in other jobs: it was trained more than once"
    few, _ = _again(rows)
    for where in few["_where"].drop_duplicates():
        yield where, "its trials are in another job of the same attack on the same task, too: one row of each is shown"


def _odd(rows: pd.DataFrame, key: Sequence[str], name: str) -> Iterator[str]:
    """Yield where a column has not its most frequent value per key."""
    known = rows.loc[rows[name].notna(), [*key, name, "_where"]]
    several = known[known.groupby(list(key), sort=False)[name].transform("nunique") > 1]
    if len(several):
        usual = several.groupby(list(key), sort=False)[name].transform(lambda values: values.value_counts().idxmax())
        yield from several.loc[several[name] != usual, "_where"].drop_duplicates()


def _again(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series[int]]:
    """Return the rows whose trial has several, and a number of each one's trial."""
    few = rows[rows.duplicated(list(_TRIAL), keep=False)]
    return few, few.groupby(list(_TRIAL), dropna=False, sort=False).ngroup()

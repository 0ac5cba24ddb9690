"""No attack may exceed what is proved: where one does, the proof, the defense's declaration or the harness is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from scipy.stats import beta

from leakbench.board.columns import ATTACK_KEYS, DEFENSE_KEYS
from leakbench.errors import LeakbenchError
from leakbench.measures.catalogue import ALL, MEASURES, Quantity

SIGNIFICANCE = 0.05
"""Probability that anything is reported where nothing is wrong, shared by all comparisons."""

_CELL = ("benchmark_version", "task_hash", *DEFENSE_KEYS)


@dataclass(frozen=True)
class Violation:
    """A number that is greater than its proved bound.

    Args:
        task: Readable task id.
        defense: Label of the defense.
        who: Label of the attack or measure.
        what: Metric or quantity.
        value: Its mean over trials.
        low: Lower end of its interval.
        n: Trials behind it.
        quantity: The bound's name.
        bound: Its value.
    """

    task: str
    defense: str
    who: str
    what: str
    value: float
    low: float
    n: int
    quantity: str
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.task} / {self.defense}: {self.who} has {self.what} {self.value:.3f} (at least {self.low:.3f}, "
            f"n={self.n}), above {self.quantity} {self.bound:.3f}"
        )


def violations(results: pd.DataFrame, measures: pd.DataFrame) -> list[Violation]:
    """Return every cell in which an attack, or an audit, exceeds a proved bound beyond its interval.

    Trials are independent and none succeeds with a greater probability than the bound, so that their number is tested
    against a binomial one. Trials in which an attack failed count as no success: it may have picked its trials. The
    level of the intervals is Bonferroni's for all comparisons made. Lower bounds of measures are confidence limits
    already.

    Args:
        results: Rows of attacks, with metrics in [0, 1].
        measures: Rows of measures.
    """
    # Of several files, whose rows are numbered alike.
    results = results[results["status"] != "unavailable"].reset_index(drop=True)
    measured = measures[(measures["status"] == "ok") & (measures["layer"] == ALL)].reset_index(drop=True)
    attacked = dict(list(results.groupby(_keys(results, _CELL))))
    attacks = _keys(results, ATTACK_KEYS)
    known = dict(list(measured.groupby(_keys(measured, _CELL))))
    found, compared = [], []
    for cell, rows in known.items():
        for quantity in _bounding():
            proved = rows[rows["quantity"] == quantity.name]
            if proved.empty:
                continue
            if quantity.bounds in results.columns:
                own = attacked.get(cell, results.iloc[:0])
                own = own[own["target"].isin([quantity.target] if quantity.target else own["target"])]
                compared += [(quantity, proved, each) for _, each in own.groupby(attacks.loc[own.index])]
            else:
                found += _audited(quantity, proved, rows[rows["quantity"] == quantity.bounds])
    for quantity, proved, own in compared:
        successes = own[str(quantity.bounds)].astype("float64").where(own["status"] == "ok").fillna(0.0)
        low = _lower(float(successes.sum()), len(own), SIGNIFICANCE / len(compared))
        if low > proved["value"].max():
            who = own["attack_label"].iloc[0]
            found.append(_violation(quantity, proved, who, float(successes.mean()), low, len(own)))
    return found


def check(results: pd.DataFrame, measures: pd.DataFrame) -> None:
    """Raise where a proved bound is exceeded; see `violations`.

    Raises:
        LeakbenchError: One line for each.
    """
    if found := violations(results, measures):
        raise LeakbenchError("proved bounds are exceeded:\n" + "\n".join(map(str, found)))


def _lower(successes: float, trials: int, significance: float) -> float:
    """Return the one-sided lower limit of a rate (Clopper, Pearson 1934); halves of successes do not count."""
    whole = int(successes)
    return float(beta.ppf(significance, whole, trials - whole + 1)) if whole else 0.0


def _audited(quantity: Quantity, proved: pd.DataFrame, lower: pd.DataFrame) -> list[Violation]:
    """Return the lower bounds, confidence limits already, that are above what was proved for the same delta."""
    found = []
    for _, row in lower.iterrows():
        same = proved[proved["measure_params"].map(_delta) == _delta(row["measure_params"])]
        if len(same) and row["value"] > same["value"].max():
            value = float(row["value"])
            found.append(_violation(quantity, same, row["measure_label"], value, value, int(row["n"])))
    return found


def _violation(quantity: Quantity, proved: pd.DataFrame, who: str, value: float, low: float, trials: int) -> Violation:
    return Violation(
        task=proved["task"].iloc[0],
        defense=proved["defense_label"].iloc[0],
        who=who,
        what=str(quantity.bounds),
        value=value,
        low=low,
        n=trials,
        quantity=quantity.name,
        bound=float(proved["value"].max()),
    )


def _bounding() -> list[Quantity]:
    """Return the quantities that bound something."""
    specs = (MEASURES.get(name) for name in MEASURES.names())
    return [quantity for spec in specs for quantity in spec.quantities if quantity.bounds is not None]


def _keys(frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series[str]:
    """Return one text per row that tells its values of ``columns``, nulls too."""
    texts = frame[list(columns)].astype("string").fillna("")
    key = texts[columns[0]]
    for column in columns[1:]:
        key = key + "\n" + texts[column]
    return key


def _delta(params: str) -> object:
    return json.loads(params).get("delta")

"""Verdicts on what a work says of layers, batches and protection: each claim against what was measured. No torch here.

A claim is a list of comparisons of two numbers, the one that it says is greater minus the other one, with an interval.
A comparison agrees if the interval lies above zero, differs if it lies below, and is undecided otherwise; a claim
agrees or differs if at least `SHARE` of its comparisons do. No claim is assumed: a claim without comparisons is
undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from leakbench.board.stats import bootstrap
from leakbench.measures.catalogue import ALL
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.metrics import METRICS, MetricSpec
from leakbench.parts import Part

SHARE = 2 / 3
"""Share of its comparisons that have to agree, or differ, for a claim to do so."""

Where = dict[str, str | int | float | bool | None]
Group = Literal["first_third", "later", "dense", "not_dense"]

COLUMNS = {
    "claim": "name of the claim",
    "setting": "task and defense that both numbers are of, or the two that are compared",
    "quantity": "what is compared: quantity of a measure, or metric of attacks",
    "more": "what the claim says is greater",
    "less": "what it says is smaller",
    "difference": "the former minus the latter",
    "low": "lower end of the 95% interval of the difference",
    "high": "upper end",
    "n": "trials behind it",
    "verdict": "agrees, differs or undecided",
    "note": "which layers or attacks",
}
"""The columns of the table."""


class Claim(Part):
    """One statement, and how it is tested.

    Exactly one of ``layers``, ``axis`` and ``withheld`` says what is compared.
    """

    name: str
    """The statement in a few words."""
    source: str
    """Where it was read."""
    quantities: Annotated[list[str], Field(min_length=1)]
    """Quantities of measures; with ``withheld`` also metrics of attacks. Each gives comparisons of its own."""
    where: Where = Field(default_factory=dict)
    """Rows that it is about, by column."""
    layers: Annotated[list[Group], Field(min_length=2, max_length=2)] | None = None
    """Two groups of layers of one update, whose means are compared; ``first_third`` is at least one layer."""
    axis: str | None = None
    """A column: the smallest value, where the claim says most leaks, against every greater one."""
    withheld: Annotated[list[str], Field(min_length=1)] | None = None
    """Labels of defenses: without a defense against each of them; of attacks, the best one each time."""


def verdicts(claims: Sequence[Claim], measured: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per comparison of every claim.

    Args:
        claims: The claims.
        measured: Rows of measures, as `leakbench.results.load_measures` gives them.
        rows: Result rows of attacks; may be empty.

    Returns:
        `COLUMNS`, claim by claim.
    """
    lines = [line for claim in claims for line in _comparisons(claim, measured, rows)]
    return pd.DataFrame(lines, columns=list(COLUMNS))


def summary(claims: Sequence[Claim], table: pd.DataFrame) -> pd.DataFrame:
    """Return one line per claim: its verdict, how many comparisons agree, differ and are undecided, and its source."""
    lines = []
    for claim in claims:
        counts = table.loc[table["claim"] == claim.name, "verdict"].value_counts()
        agree, differ, open_ = (int(counts.get(verdict, 0)) for verdict in ("agrees", "differs", "undecided"))
        total = agree + differ + open_
        verdict = "undecided"
        if total and agree >= SHARE * total:
            verdict = "agrees"
        elif total and differ >= SHARE * total:
            verdict = "differs"
        lines.append(
            {
                "claim": claim.name,
                "verdict": verdict,
                "agree": agree,
                "differ": differ,
                "undecided": open_,
                "source": claim.source,
            }
        )
    return pd.DataFrame(lines)


def _comparisons(claim: Claim, measured: pd.DataFrame, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for quantity in claim.quantities:
        find: Callable[[str, pd.DataFrame], Iterator[dict[str, Any]]]
        source = measured
        if claim.layers is not None:
            find = partial(_within, claim.layers)
        elif claim.axis is not None:
            find = partial(_along, claim.axis)
        elif quantity in METRICS:
            find, source = partial(_attacked, claim.withheld or ()), rows
        else:
            find = partial(_residual, claim.withheld or ())
        for column, value in claim.where.items():
            if len(source):
                source = source[source[column].isna() if value is None else source[column] == value]
        if len(source) and quantity not in METRICS:
            source = source[source["status"] == "ok"]
        for line in find(quantity, source) if len(source) else ():
            if not np.isnan([line["low"], line["high"]]).any():  # else it could never be decided
                verdict = _verdict(line["low"], line["high"])
                yield {"claim": claim.name, "quantity": quantity, **line, "verdict": verdict}


def _verdict(low: float, high: float) -> str:
    return "agrees" if low > 0 else "differs" if high < 0 else "undecided"


# --- layers of one update ---------------------------------------------------------------------------------------------

_MEASURED = ("task", "task_hash", "defense_label", "measure", "measure_params", "quantity")


def _within(layers: Sequence[Group], quantity: str, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Compare the means over two groups of layers.

    A mean, because the greatest layer of a group would be picked by the same noise that it is tested with, in favor of
    the larger group. Layers of normalisation are left out.
    """
    rows = rows[(rows["quantity"] == quantity) & rows["layer_kind"].isin(["linear", "convolution"])]
    for _, part in rows.groupby(list(_MEASURED), sort=True):
        groups = [part[_in_group(part, group)] for group in layers]
        if any(not len(group) for group in groups):
            continue  # a net without such layers
        if part["trial"].isna().all():
            line = _independent(_of_layers(groups[0]), _of_layers(groups[1]), int(part["n"].iloc[0]))
        else:
            means = [group.groupby("trial")["value"].mean() for group in groups]
            line = _of_pairs(means[0], means[1])
        note = " against ".join(f"{group['layer'].nunique()} layers" for group in groups)
        yield {"setting": _setting(part), "more": line.pop("a"), "less": line.pop("b"), **line, "note": note}


def _in_group(part: pd.DataFrame, group: Group) -> NDArray[np.bool_]:
    dense = (part["layer_kind"] == "linear").to_numpy()
    place = part["depth"].rank(method="dense").to_numpy(float)
    first = place <= max(1, place.max() // 3)
    chosen = {"dense": dense, "not_dense": ~dense, "first_third": first, "later": ~first}
    return np.asarray(chosen[group])


def _of_layers(group: pd.DataFrame) -> tuple[float, float, float]:
    """Return the mean of fitted values with an interval as wide as theirs: layers of one update err together."""
    value, low, high = (float(group[end].mean()) for end in ("value", "low", "high"))
    return value, low, high


# --- one number along an axis -----------------------------------------------------------------------------------------

_FOLLOWS = {"local_steps": ("batches_per_epoch",), "clients": ("secure_aggregation",)}
"""Columns that change along with an axis."""
_NAMES = [field.name for field in MEASURE_FIELDS]
_SAME = (
    *("season_commitment", "benchmark_version", "dataset_fingerprint", "model_draws"),
    *_NAMES[_NAMES.index("target") : _NAMES.index("dataset_fingerprint")],
    *_NAMES[_NAMES.index("normalise") : _NAMES.index("checkpoint_sha256")],
    *_NAMES[_NAMES.index("batch_size") : _NAMES.index("measure")],
    *("measure", "measure_params", "defense_label", "quantity"),
)
"""What rows must agree on, but for the axis: everything about task, client and threat model."""


def _along(axis: str, quantity: str, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    rows = rows[(rows["quantity"] == quantity) & (rows["layer"] == ALL)]
    same = [key for key in _SAME if key not in (axis, *_FOLLOWS.get(axis, ())) and key in rows]
    for _, part in rows.groupby(same, sort=True, dropna=False):
        levels = sorted(part[axis].unique())
        for level in levels[1:]:
            more, less = (part[part[axis] == value] for value in (levels[0], level))
            if more["trial"].isna().all():
                line = _of_intervals(more.iloc[0], less.iloc[0])
            else:
                line = _of_samples(more["value"].to_numpy(float), less["value"].to_numpy(float))
            setting = f"{_setting(more)}: {axis} {levels[0]} against {level}"
            yield {"setting": setting, "more": line.pop("a"), "less": line.pop("b"), **line, "note": ""}


# --- protection -------------------------------------------------------------------------------------------------------


def _residual(withheld: Sequence[str], quantity: str, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    rows = rows[(rows["quantity"] == quantity) & (rows["layer"] == ALL)]
    for _, part in rows.groupby(["task_hash", "measure_params"], sort=True):
        before = part[part["defense_label"] == "none"]
        for label in withheld if len(before) else ():
            after = part[part["defense_label"] == label]
            if not len(after):
                continue
            if before["trial"].isna().all():
                line = _of_intervals(before.iloc[0], after.iloc[0])
            else:
                pair = [each.set_index("trial")["value"] for each in (before, after)]
                line = _of_pairs(*pair)
            setting = f"{part['task'].iloc[0]}: none against {label}"
            yield {"setting": setting, "more": line.pop("a"), "less": line.pop("b"), **line, "note": ""}


def _attacked(withheld: Sequence[str], metric: str, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Compare the best attacks; a trial that failed counts as chance or floor where nothing is protected.

    Where an attack of the undefended client failed or was not run against a defense, that comparison is undecided: its
    failure protects nothing.
    """
    spec = METRICS[metric]
    sign = 1 if spec.higher_is_better else -1
    rows = rows[rows[spec.reference].notna() | rows[metric].notna()]
    for _, part in rows.groupby("task_hash", sort=True):
        tried = part[part["status"] != "not_applicable"]
        undefended = tried[tried["defense_label"] == "none"]
        if not len(undefended):
            continue
        before = _strongest(undefended, spec, sign)
        for label in withheld:
            own = tried[tried["defense_label"] == label]
            if not len(own):
                continue
            declined = set(part.loc[part["defense_label"] == label, "attack_label"]) - set(own["attack_label"])
            lacking = set(undefended["attack_label"]) - set(own["attack_label"]) - declined
            lacking |= set(own.loc[own["status"] != "ok", "attack_label"])
            after = _strongest(own, spec, sign)
            line = _of_pairs(before["_value"] * sign, after["_value"] * sign)
            line |= {"more": sign * line.pop("a"), "less": sign * line.pop("b")}
            note = f"{before['attack_label'].iloc[0]} against {after['attack_label'].iloc[0]}"
            if lacking:
                line |= {"low": -np.inf, "high": np.inf}
                note = f"failed or not run against the defense: {', '.join(sorted(lacking))}"
            yield {"setting": f"{part['task'].iloc[0]}: none against {label}", **line, "note": note}


def _strongest(rows: pd.DataFrame, spec: MetricSpec, sign: int) -> pd.DataFrame:
    """Return the rows, by trial, of the attack with the best mean."""
    ok = (rows["status"] == "ok") & rows[spec.name].notna()
    rows = rows.assign(_value=rows[spec.name].where(ok, rows[spec.reference]))
    means = rows.groupby("attack_label")["_value"].mean() * sign
    return rows[rows["attack_label"] == means.idxmax()].set_index("trial").sort_index()


# --- differences with intervals ---------------------------------------------------------------------------------------


def _of_pairs(a: pd.Series[float], b: pd.Series[float]) -> dict[str, Any]:
    """Return the mean difference over common trials with its bootstrap interval."""
    common = a.index.intersection(b.index)
    first, second = a.loc[common].to_numpy(float), b.loc[common].to_numpy(float)
    mean, low, high = bootstrap(first - second, common.tolist())
    return {
        "a": first.mean(),
        "b": second.mean(),
        "difference": mean,
        "low": low,
        "high": high,
        "n": len(common),
    }


def _of_samples(a: NDArray[np.float64], b: NDArray[np.float64]) -> dict[str, Any]:
    """Return the difference of two means of different trials; the interval is that of two independent ones."""
    return _independent(bootstrap(a, range(len(a))), bootstrap(b, range(len(b))), len(a))


def _of_intervals(a: pd.Series[Any], b: pd.Series[Any]) -> dict[str, Any]:
    """Return the difference of two fitted values as if they were independent: wider than it is for common trials."""
    ends = [tuple(float(row[key]) for key in ("value", "low", "high")) for row in (a, b)]
    return _independent(ends[0], ends[1], int(a["n"]))


def _independent(a: Sequence[float], b: Sequence[float], n: int) -> dict[str, Any]:
    below = float(np.hypot(a[0] - a[1], b[2] - b[0]))
    above = float(np.hypot(a[2] - a[0], b[0] - b[1]))
    difference = a[0] - b[0]
    return {
        "a": a[0],
        "b": b[0],
        "difference": difference,
        "low": difference - below,
        "high": difference + above,
        "n": n,
    }


def _setting(part: pd.DataFrame) -> str:
    row = part.iloc[0]
    defense = "" if row["defense_label"] == "none" else f" vs {row['defense_label']}"
    return f"{row['task']}{defense}"

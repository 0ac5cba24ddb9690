"""The columns of the board: what is computed from the rows of one attack, defense and task.

An attack is never rewarded for failing: a trial that failed counts as the chance level (labels, inference) or floor
(inputs) of its metric. So does one that the attack declined in a cell of which it tried others: it may have picked the
easy ones. Trials that were not available, and cells that were not applicable throughout, are counted and left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.arrays import Rows
from leakbench.board.detection import STATISTICS, statistics
from leakbench.board.stats import Interval, bootstrap
from leakbench.keys import DEVELOPMENT
from leakbench.metrics import METRICS, MetricSpec, headline, metric_target
from leakbench.schema import DEFENDED, FAILURES, STATUSES

DEMONSTRATION_DATASETS = frozenset({"digits", "digits_parity"})
"""Datasets that are in every environment, an attack's included: their rows demonstrate and are never ranked."""

OVERSTATES = "overstates protection"
"""Note on a defense that changes what the adversary sees of the model: a server knows what it sent."""

TASK_KEYS = (
    *("season", "season_commitment", "benchmark_version", "lane", "task", "task_version", "task_hash", "target"),
    *("dataset", "dataset_fingerprint", "checkpoint", "model_draws"),
    *("budget_model_evaluations", "budget_wall_seconds"),
)
"""What rows must agree on to be compared. ``checkpoint`` is the origin of the weights, and for locally trained ones
also a digest of them."""

ATTACK_KEYS = ("attack", "attack_version", "attack_params", "attack_source_sha256")
DEFENSE_KEYS = ("defense", "defense_version", "defense_params", "defense_source_sha256")
CELL_KEYS = (*TASK_KEYS, *ATTACK_KEYS, *DEFENSE_KEYS)


def entry_parameters(params: str) -> list[dict[str, Any]]:
    """Return the parameters of every part of an entry: one dict, or several for a chain of defenses."""
    loaded = json.loads(params) if params else {}
    return loaded if isinstance(loaded, list) else [loaded]


def entry_label(name: str, parameters: list[dict[str, Any]]) -> str:
    """Return ``topk(keep=0.1)``, or ``clip(norm=1)+topk(keep=0.1)`` for a chain."""
    names = name.split("+") if len(parameters) > 1 else [name]
    texts = [", ".join(f"{key}={value}" for key, value in part.items()) for part in parameters]
    return "+".join(name + (f"({text})" if text else "") for name, text in zip(names, texts, strict=True))


@lru_cache(maxsize=256)
def _by_cluster(clusters: tuple[tuple[int, int], ...]) -> pd.MultiIndex:
    return pd.MultiIndex.from_tuples(clusters, names=["draw", "trial"])


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the values that are known."""
    known = ~np.isnan(values)
    count = int(known.sum())
    return float(np.where(known, values, 0.0).sum() / count) if count else np.nan


@dataclass(frozen=True)
class Cell:
    """The rows of one attack against one defense on one task.

    Args:
        keys: Values of `CELL_KEYS`.
        rows: All rows, by draw and trial.
        places: Their positions in the frame that they were cut from.
    """

    keys: dict[str, Any]
    rows: Rows
    places: NDArray[np.intp]

    @cached_property
    def metric(self) -> MetricSpec:
        """The metric that ranks."""
        return headline(self.keys["target"])

    @cached_property
    def statuses(self) -> Counter[str]:
        """How many rows have each status."""
        return Counter(self.rows["status"].tolist())

    @cached_property
    def tried(self) -> Rows:
        """The rows that count: succeeded or failed, and where there are such, those that the attack declined."""
        counted = {"ok", *FAILURES}
        if counted & self.statuses.keys():
            counted.add("not_applicable")
        if counted >= self.statuses.keys():
            return self.rows
        return self.rows.part(np.array([status in counted for status in self.rows["status"]], dtype=np.bool_))

    @cached_property
    def clusters(self) -> list[tuple[int, int]]:
        """What is resampled together: one model draw and victim."""
        return list(zip(self.tried["draw"].tolist(), self.tried["trial"].tolist(), strict=True))

    @cached_property
    def ok(self) -> NDArray[np.bool_]:
        """Which of the rows that count succeeded."""
        ok: NDArray[np.bool_] = self.tried["status"] == "ok"
        return ok

    def reference(self, spec: MetricSpec) -> NDArray[np.float64]:
        """Return the chance or floor of each trial, that of the other trials' mean where a failed row lacks it."""
        values = self.tried[spec.reference]
        missing = np.isnan(values)
        if not missing.any():
            return values
        known = values[~missing]
        return np.where(missing, known.mean() if len(known) else np.nan, values)

    def values(self, spec: MetricSpec) -> NDArray[np.float64]:
        """Return the value of each trial; a failed one, or one without a value, is its reference."""
        values = self.tried[spec.name]
        scored = self.ok & ~np.isnan(values)
        return values if scored.all() else np.where(scored, values, self.reference(spec))

    def mean(self, spec: MetricSpec) -> float:
        """Return the mean value of any metric; NaN for those of another target, or where nothing was planted.

        Trials where it could not be had, for want of a net's weights, have neither value nor reference: they are left
        out, since counting them would make the mean depend on the machine.
        """
        if spec.target == "stealth":
            return _mean(self.tried[spec.name])
        if spec.target != metric_target(self.keys["target"]):
            return np.nan
        missing = self.ok & np.isnan(self.tried[spec.name]) & np.isnan(self.tried[spec.reference])
        values = self.values(spec)
        values = values[~missing] if missing.any() else values
        return float(values.mean()) if len(values) else np.nan

    @cached_property
    def score(self) -> Interval:
        """Mean of the ranking metric; the interval of a share ends at 0 and 1."""
        mean, low, high = bootstrap(self.values(self.metric), self.clusters)
        if self.metric.target == "inputs":
            return Interval(mean, low, high)
        return Interval(mean, *(float(np.clip(end, 0.0, 1.0)) for end in (low, high)))

    @cached_property
    def chance(self) -> float:
        """Mean chance or floor of the ranking metric."""
        return float(self.reference(self.metric).mean()) if len(self.tried) else np.nan

    @cached_property
    def advantage(self) -> Interval:
        """(v - c) / (1 - c): 0 is chance, 1 is everything; undefined for inputs, and where chance is everything."""
        if self.metric.target == "inputs" or not self.chance < 1:
            return Interval(np.nan, np.nan, np.nan)
        return Interval(*((value - self.chance) / (1 - self.chance) for value in self.score))

    @cached_property
    def gain(self) -> Interval:
        """Gain over the floor of the same trial, for inputs."""
        if self.metric.target != "inputs":
            return Interval(np.nan, np.nan, np.nan)
        return bootstrap(self.values(self.metric) - self.reference(self.metric), self.clusters)

    @cached_property
    def statistics(self) -> dict[str, Interval]:
        """Statistics over the trials of an inference target; a trial without a claim counts as one of .5."""
        known = ~np.isnan(self.tried["inference_truth"])
        scores = np.where(self.ok, self.tried["inference_score"], np.nan)[known]
        scores = np.where(np.isnan(scores), 0.5, scores)
        clusters = [cluster for cluster, kept in zip(self.clusters, known, strict=True) if kept]
        truth = self.tried["inference_truth"][known].astype(np.int64)
        return statistics(truth, scores, clusters)

    @property
    def defense_note(self) -> str | None:
        """What to know of the defense: that it hides from the server what the server itself has sent."""
        return OVERSTATES if DEFENDED in self.rows["model_shown"].tolist() else None

    def count(self, *statuses: str) -> int:
        """Return the number of rows with one of the statuses."""
        return sum(self.statuses[status] for status in statuses)

    @property
    def coverage(self) -> float:
        """Share of the trials that count that succeeded."""
        return self.count("ok") / len(self.tried) if len(self.tried) else np.nan

    @cached_property
    def by_trial(self) -> pd.Series[float]:
        """Values of the ranking metric by (draw, trial)."""
        values = pd.Series(self.values(self.metric), index=_by_cluster(tuple(self.clusters)))
        return values if values.index.is_unique else values.groupby(level=[0, 1]).mean()

    @cached_property
    def edge_by_trial(self) -> pd.Series[float]:
        """By (draw, trial), what ranks: attacks that claim unlike things (of each client, of all) have unlike chances.

        Inputs: gain over the mean floor; else the share of the way from chance to everything.
        """
        gap = self.by_trial - self.chance
        return gap / (1 - self.chance) if self.metric.target != "inputs" and self.chance < 1 else gap

    @cached_property
    def ranked(self) -> bool:
        """Whether the cell may count as a record."""
        return (
            len(self.tried) > 0
            and self.keys["season"] != DEVELOPMENT.name
            and not pd.isna(self.keys["lane"])
            and self.keys["dataset"] not in DEMONSTRATION_DATASETS
            and "none" not in self.rows["isolation"].tolist()
        )


@dataclass(frozen=True)
class BoardColumn:
    """One column of the board: a new one is a new entry of `COLUMNS`.

    Args:
        key: Column name.
        label: What it is, in a line.
        produce: Its value for one cell.
    """

    key: str
    label: str
    produce: Callable[[Cell], Any]


def _label(cell: Cell, kind: str) -> str:
    return str(cell.rows[f"{kind}_label"][0])


def _failure(cell: Cell) -> str | None:
    if cell.statuses.keys() == {"ok"}:
        return None
    pairs = zip(cell.rows["status"], cell.rows["error"], strict=True)
    errors = Counter(str(error) for status, error in pairs if status != "ok" and error is not None)
    return errors.most_common(1)[0][0] if errors else None


def _number(cell: Cell, column: str) -> float:
    return _mean(cell.tried[column])


def _attributed(cell: Cell) -> bool | None:
    known = cell.rows.known("attributed")
    return all(known) if known else None


def _inserted(cell: Cell) -> str | None:
    known = cell.rows.known("inserted")
    return str(known[0]) if known else None


def _status(status: str) -> BoardColumn:
    return BoardColumn(status, f"trials with status {status}", lambda c: c.count(status))


def _metric(spec: MetricSpec) -> BoardColumn:
    return BoardColumn(spec.name, f"mean of {spec.name}", lambda c: c.mean(spec))


def _statistic(name: str) -> list[BoardColumn]:
    return [
        BoardColumn(name, f"inference: {STATISTICS[name]}", lambda c: c.statistics[name].mean),
        BoardColumn(f"{name}_low", "lower end of its 95% interval", lambda c: c.statistics[name].low),
        BoardColumn(f"{name}_high", "upper end of its 95% interval", lambda c: c.statistics[name].high),
    ]


COLUMNS: tuple[BoardColumn, ...] = (
    BoardColumn("attack_label", "attack with its notable parameters", lambda c: _label(c, "attack")),
    BoardColumn("defense_label", "defense with its notable parameters", lambda c: _label(c, "defense")),
    BoardColumn(
        "defense_note",
        f"`{OVERSTATES}` where the defense changes what the adversary sees of the model",
        lambda c: c.defense_note,
    ),
    BoardColumn("metric", "metric that ranks", lambda c: c.metric.name),
    BoardColumn("n", "trials that count: succeeded, failed, or declined while others were not", lambda c: len(c.tried)),
    *map(_status, STATUSES),
    BoardColumn("coverage", "share of n that succeeded", lambda c: c.coverage),
    BoardColumn("mean", "mean of the ranking metric", lambda c: c.score.mean),
    BoardColumn("ci_low", "lower end of its 95% interval", lambda c: c.score.low),
    BoardColumn("ci_high", "upper end of its 95% interval", lambda c: c.score.high),
    BoardColumn("reference", "chance (labels, inference) or floor (inputs) of the ranking metric", lambda c: c.chance),
    BoardColumn("advantage", "labels, inference: (mean - chance) / (1 - chance)", lambda c: c.advantage.mean),
    BoardColumn("advantage_low", "lower end of its 95% interval", lambda c: c.advantage.low),
    BoardColumn("advantage_high", "upper end of its 95% interval", lambda c: c.advantage.high),
    BoardColumn("gain", "inputs: mean gain over the floor of the same trial, dB", lambda c: c.gain.mean),
    BoardColumn("gain_low", "lower end of its 95% interval", lambda c: c.gain.low),
    BoardColumn("gain_high", "upper end of its 95% interval", lambda c: c.gain.high),
    *(column for name in STATISTICS for column in _statistic(name)),
    BoardColumn(
        "planted_share", "mean share of the parameters that were replaced", lambda c: _number(c, "planted_share")
    ),
    BoardColumn("attributed", "whether label counts were claimed client by client", _attributed),
    BoardColumn("inserted", "module that was inserted in front of the net", _inserted),
    BoardColumn("refused", "mean share of the clients that refused", lambda c: _number(c, "refused")),
    BoardColumn("seconds", "wall seconds of the attack per trial", lambda c: _number(c, "wall_seconds")),
    BoardColumn(
        "isolation", "isolation levels of the rows", lambda c: ", ".join(sorted(set(c.rows["isolation"].tolist())))
    ),
    BoardColumn("failure", "most frequent error", _failure),
    BoardColumn("ranked", "whether the cell may count as a record", lambda c: c.ranked),
    *map(_metric, METRICS.values()),
)
"""The columns that follow the keys, in order."""

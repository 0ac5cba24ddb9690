"""The board of a lane: each attack's mean over all undefended tasks of the lane in a suite, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.columns import ATTACK_KEYS, DEMONSTRATION_DATASETS, Cell
from leakbench.board.ranks import detectable, differences, groups, rank_intervals, replicates
from leakbench.board.score import build_cells, group_ids, plain
from leakbench.board.stats import MIN_PAIRS, ends
from leakbench.metrics import METRICS, headline
from leakbench.tasks import local_batches

LANE_KEYS = ("season", "season_commitment", "benchmark_version", "suite", "lane", "target", "demonstration", "stage")
"""What one table of attacks shares. Suites grant different budgets and name different attacks, so a table is of one:
an attack that another suite does not name is no worse for it."""

LANE_COLUMNS = {
    "attack_label": "attack with its notable parameters",
    "tasks": "undefended tasks of this lane and stage",
    "covered": "those on which it came to a result; on the others it counts as chance or floor",
    "mean": "mean of the ranking metric over the covered tasks, each with equal weight",
    "reference": "mean chance (labels, inference) or floor (inputs) of these",
    "edge": "labels, inference: (value - chance) / (1 - chance), at least -1, over tasks; inputs: gain over the floor, "
    "dB",
    "edge_low": "lower end of its 95% interval: victims and tasks are resampled, those that tasks share together",
    "edge_high": "upper end of its 95% interval",
    "exact": "mean share of exact label counts, or of recovered images, or mean bits, over the covered tasks",
    "detected": "mean share of trials in which clients' plain checks would notice what was planted; null: nothing was",
    "inserted": "module that the attack had inserted in front of the net; null: none",
    "rank_group": "1 for the best attack and those that cannot be told from it; null: not ranked, as it covers fewer "
    "than half of the tasks, or there are fewer than 6 victims",
    "rank_low": "lower end of the 95% interval of the rank",
    "rank_high": "upper end",
    "detectable": "difference in edge between two attacks that the table detects on such tasks (80% power, 5% level)",
}
"""The columns that follow `LANE_KEYS` and the attack's keys."""

EXACT = {
    "labels": "count_exact_match",
    "inputs": "recovered",
    "attribute": "inference_bits",
    "membership": "inference_bits",
}
"""What stands beside stealth, by target: a planted model is worth its risk where it is exact."""

_VICTIM = (
    *("dataset", "dataset_fingerprint", "batch_size", "batch_sizes", "sampler", "sampler_alpha", "sampler_classes"),
    *("attribute", "attribute_value", "attribute_mix"),
)
"""With the trial, and the number of examples behind the update, what tells victims apart."""

_READ = dict.fromkeys(
    (
        *(key for key in LANE_KEYS if key != "demonstration"),
        *("task_hash", *ATTACK_KEYS, "attack_label", "budget_model_evaluations", "budget_wall_seconds"),
        *("status", "inserted", headline("labels").reference),
        *("draw", "trial", *_VICTIM, "batches", "local_steps", "batches_per_epoch", "clients"),
    )
)
"""Columns of the rows themselves that tables are made from."""


@dataclass(frozen=True)
class LaneTable:
    """The attacks of one lane and stage.

    Args:
        lines: One mapping per attack, the best first: `LANE_KEYS`, `ATTACK_KEYS` and `LANE_COLUMNS`.
        low: (A, A) lower ends of the 95% intervals of the paired differences of edges, line minus column, of the
            attacks that ran, in the order of ``lines``; victims and tasks are resampled.
        high: (A, A) upper ends.
        tasks: Hashes of the tasks that it averages.
    """

    lines: list[dict[str, Any]]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    tasks: frozenset[str]


def lanes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per suite, lane, stage and attack.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them. Rows without a lane or with a defense are left
            out; demonstration datasets make tables of their own.

    Returns:
        `LANE_KEYS`, `ATTACK_KEYS` and `LANE_COLUMNS`, the best attack first.
    """
    return lane_frame(lane_tables(rows))


def lane_frame(tables: Sequence[LaneTable]) -> pd.DataFrame:
    """Return the lines of tables as `lanes` does."""
    lines = [line for table in tables for line in table.lines]
    return pd.DataFrame(lines, columns=[*LANE_KEYS, *ATTACK_KEYS, *LANE_COLUMNS])


def lane_tables(rows: pd.DataFrame, cells: Sequence[Cell] | None = None) -> list[LaneTable]:
    """Return one table per suite, lane and stage; see `lanes`.

    Args:
        rows: See `lanes`.
        cells: What `build_cells` makes of these rows, if that is at hand.
    """
    counted = rows["attack"].notna() & rows["lane"].notna() & (rows["defense"] == "none")
    if cells is None:
        rows = rows[counted]
        cells, counted = build_cells(rows), counted[counted]
    cell_of = np.full(len(rows), -1)
    for number, cell in enumerate(cells):
        cell_of[cell.places] = number
    # Numbers are in the cells; without them a million rows are small.
    rows = rows[list(_READ)].assign(_cell=cell_of)[counted]
    rows["demonstration"] = rows["dataset"].isin(list(DEMONSTRATION_DATASETS))
    tables = [_table(table, cells) for own in _by_suite(rows) for _, table in own.groupby(group_ids(own, LANE_KEYS))]
    return [table for table in tables if table is not None]


def _by_suite(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the rows of each suite: its attacks on its tasks.

    Where two suites measured the same trial, one row was kept, under the name of either: it counts for both.
    """
    suites = rows["suite"].unique().tolist()
    if len(suites) < 2:
        yield rows
        return
    attacks = group_ids(rows, (*ATTACK_KEYS, "budget_model_evaluations", "budget_wall_seconds"))
    for suite in suites:
        own = rows["suite"] == suite
        shared = rows["task_hash"].isin(rows.loc[own, "task_hash"].unique()) & attacks.isin(attacks[own].unique())
        yield rows[shared].assign(suite=suite)


def _table(rows: pd.DataFrame, every: Sequence[Cell]) -> LaneTable | None:
    keys = {key: rows[key].iloc[0] for key in LANE_KEYS}
    # A task of which nobody could measure anything, for want of data or because guessing is right, tells nothing.
    measured = {
        task
        for task, part in rows.groupby("task_hash")
        if part["status"].ne("unavailable").any()
        and not (keys["target"] == "labels" and part[headline("labels").reference].ge(1).any())
    }
    if not measured:
        return None
    rows = rows[rows["task_hash"].isin(measured)]
    victims = _Victims({task: _victims(part) for task, part in rows.groupby("task_hash")})
    by_attack: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in (every[number] for number in rows["_cell"].unique()):
        if len(cell.tried):
            by_attack.setdefault(tuple(cell.keys[key] for key in ATTACK_KEYS), []).append(cell)
    built = []
    for _, part in rows.groupby(group_ids(rows, ATTACK_KEYS)):
        cells = by_attack.get(tuple(plain(part[key].iloc[0]) for key in ATTACK_KEYS), [])
        edges = victims.edges(cells)
        line = keys | {key: part[key].iloc[0] for key in ATTACK_KEYS}
        line |= {
            "attack_label": part["attack_label"].iloc[0],
            "tasks": len(measured),
            "covered": len({cell.keys["task_hash"] for cell in cells if (cell.rows["status"] == "ok").any()}),
            "mean": float(np.mean([cell.mean(cell.metric) for cell in cells])) if cells else np.nan,
            "reference": float(np.mean([cell.chance for cell in cells])) if cells else np.nan,
            "edge": victims.over_tasks(edges),
        }
        inserted = part["inserted"].dropna()
        line["inserted"] = None if inserted.empty else inserted.iloc[0]
        for key, name in (("exact", EXACT[str(keys["target"])]), ("detected", "detected")):
            values = [cell.mean(METRICS[name]) for cell in cells]
            line[key] = float(np.nanmean(values)) if not np.isnan(values).all() else np.nan
        line |= dict.fromkeys(("edge_low", "edge_high", "rank_group", "rank_low", "rank_high", "detectable"), np.nan)
        built.append((line, edges))
    # An attack that ran on fewer than half of the tasks would be ranked for what it left out.
    built.sort(key=lambda item: (2 * item[0]["covered"] < len(measured), -item[0]["edge"], item[0]["attack_label"]))
    ran = [(line, edges) for line, edges in built if line["covered"]]
    never = [line | {"edge": np.nan} for line, _ in built if not line["covered"]]
    low = high = np.zeros((0, 0))
    if ran:
        means = victims.replicates(np.stack([edges for _, edges in ran], axis=1))
        for (line, _), own in zip(ran, means.T, strict=True):
            line["edge_low"], line["edge_high"] = ends(own) if victims.several else (np.nan, np.nan)
        ranked = [line for line, _ in ran if 2 * line["covered"] >= len(measured)]
        if ranked and victims.count >= MIN_PAIRS:
            means = means[:, : len(ranked)]
            low, high = differences(means)
            ranks = rank_intervals(means)
            for line, group, first, last in zip(ranked, groups(low), ranks["low"], ranks["high"], strict=True):
                line |= {"rank_group": group, "rank_low": first, "rank_high": last, "detectable": detectable(means)}
    return LaneTable([*(line for line, _ in ran), *never], low, high, frozenset(map(str, measured)))


def _victims(part: pd.DataFrame) -> pd.DataFrame:
    """Return the victims of a task by draw and trial, with the law they are drawn by.

    They are those that more than half of its attacks were planned on: what one attack tried beyond or left out moves
    no other.
    """
    known = part[part["dataset_fingerprint"].notna()]
    first = (known if len(known) else part).iloc[0]
    batches = local_batches(first["batches"], first["local_steps"], first["batches_per_epoch"])
    law = repr((*(str(first[key]) for key in _VICTIM), int(batches), int(first["clients"])))
    attacks = group_ids(part, ATTACK_KEYS)
    planned = part[["draw", "trial"]].assign(attack=attacks).drop_duplicates()
    counts = planned.groupby(["draw", "trial"]).size()
    usual = counts[2 * counts > attacks.nunique()]
    return (usual if len(usual) else counts).index.to_frame(index=False).assign(law=law)


class _Victims:
    """The victims of a lane's tasks: one line per task, draw and trial.

    Args:
        drawn: What `_victims` returns, by task.
    """

    def __init__(self, drawn: dict[Any, pd.DataFrame]) -> None:
        self._index = {task: pd.MultiIndex.from_frame(part[["draw", "trial"]]) for task, part in drawn.items()}
        every = pd.concat([part.assign(task=task) for task, part in drawn.items()])
        self._tasks, self._laws = every["task"].tolist(), every["law"].tolist()
        self._victim = every.groupby(["law", "trial"]).ngroup().to_numpy()
        self.count = len(set(self._victim.tolist()))
        """Distinct victims."""

    @property
    def several(self) -> bool:
        """Whether there is anything to resample."""
        return self.count > 1 or len(self._index) > 1

    def edges(self, cells: list[Cell]) -> NDArray[np.float64]:
        """Return the edge of an attack on every task, draw and trial, (N,).

        Args:
            cells: The attack's; on tasks without one, and on victims that it did not try, its edge is 0.
        """
        known = {cell.keys["task_hash"]: cell for cell in cells}
        parts = []
        for task, index in self._index.items():
            edges: NDArray[Any] = np.zeros(len(index))
            if task in known:
                cell = known[task]
                gap = cell.edge_by_trial
                if cell.metric.target != "inputs":
                    # Where chance is .89, naming a few classes of many gives -8: one task would decide all.
                    gap = gap.clip(lower=-1)
                same = gap.index.equals(index)
                edges = (gap if same else gap.reindex(index, fill_value=0.0)).to_numpy(np.float64)
            parts.append(edges)
        return np.concatenate(parts)

    def over_tasks(self, edges: NDArray[np.float64]) -> float:
        """Return the mean over tasks, each with equal weight, of what `edges` gives."""
        return float(pd.Series(edges).groupby(pd.factorize(np.array(self._tasks))[0]).mean().mean())

    def replicates(self, edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the means of attacks (N, A), as `edges` gives each, in resamples of victims and tasks (R, A)."""
        return replicates(edges, self._tasks, self._victim.tolist(), self._laws)

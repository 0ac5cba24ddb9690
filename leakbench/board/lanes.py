"""The board of a lane: each attack's mean over all undefended tasks of the lane, stage by stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from leakbench.board.columns import ATTACK_KEYS, DEMONSTRATION_DATASETS, Cell
from leakbench.board.score import build_cells, group_ids, plain
from leakbench.board.stats import rank_groups, stratified
from leakbench.metrics import METRICS, headline
from leakbench.tasks import local_batches

LANE_KEYS = ("season", "season_commitment", "benchmark_version", "lane", "target", "demonstration", "stage")
"""What one table of attacks shares."""

LANE_COLUMNS = {
    "attack_label": "attack with its notable parameters",
    "tasks": "undefended tasks of this lane and stage",
    "covered": "those on which the attack ran; on the others it counts as chance or floor",
    "mean": "mean of the ranking metric over the covered tasks, each with equal weight",
    "reference": "mean chance (labels, inference) or floor (inputs) of these",
    "edge": "labels, inference: (value - chance) / (1 - chance), at least -1, over tasks; inputs: gain over the floor, "
    "dB",
    "edge_low": "lower end of its 95% interval; victims that tasks share are resampled together",
    "edge_high": "upper end of its 95% interval",
    "exact": "mean share of exact label counts, or of recovered images, or mean bits, over the covered tasks",
    "detected": "mean share of trials in which clients' plain checks would notice what was planted; null: nothing was",
    "inserted": "module that the attack had inserted in front of the net; null: none",
    "rank_group": "1 for the best attack and those that cannot be told from it; null: ran on no task",
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


def lanes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per lane, stage and attack.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them. Rows without a lane or with a defense are left
            out; demonstration datasets make tables of their own.

    Returns:
        `LANE_KEYS`, `ATTACK_KEYS` and `LANE_COLUMNS`, the best attack first.
    """
    rows = rows.dropna(subset=["attack", "lane"])
    rows = rows[rows["defense"] == "none"]
    rows = rows.assign(demonstration=rows["dataset"].isin(list(DEMONSTRATION_DATASETS)))
    lines: list[dict[str, Any]] = []
    for _, table in rows.groupby(group_ids(rows, LANE_KEYS)):
        lines += _table(table)
    return pd.DataFrame(lines, columns=[*LANE_KEYS, *ATTACK_KEYS, *LANE_COLUMNS])


def _table(rows: pd.DataFrame) -> list[dict[str, Any]]:
    keys = {key: rows[key].iloc[0] for key in LANE_KEYS}
    # A task of which nobody could measure anything, for want of data or because guessing is right, tells nothing.
    measured = {
        task
        for task, part in rows.groupby("task_hash")
        if part["status"].ne("unavailable").any()
        and not (keys["target"] == "labels" and part[headline("labels").reference].ge(1).any())
    }
    if not measured:
        return []
    rows = rows[rows["task_hash"].isin(measured)]
    victims = _Victims({task: _victims(part) for task, part in rows.groupby("task_hash")})
    by_attack: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in build_cells(rows):
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
            "covered": len({cell.keys["task_hash"] for cell in cells}),
            "mean": float(np.mean([cell.mean(cell.metric) for cell in cells])) if cells else np.nan,
            "reference": float(np.mean([cell.chance for cell in cells])) if cells else np.nan,
        }
        inserted = part["inserted"].dropna()
        line["inserted"] = None if inserted.empty else inserted.iloc[0]
        for key, name in (("exact", EXACT[str(keys["target"])]), ("detected", "detected")):
            values = [cell.mean(METRICS[name]) for cell in cells]
            line[key] = float(np.nanmean(values)) if not np.isnan(values).all() else np.nan
        # Every law of victims weighs as much as it has tasks; victims of one law are resampled.
        parts = [
            (edge["tasks"].iloc[0] / len(measured), edge["edge"].to_numpy(float)) for _, edge in edges.groupby("law")
        ]
        interval = stratified(parts, "lane", *(line[key] for key in (*LANE_KEYS, *ATTACK_KEYS)))
        line |= {"edge": interval.mean, "edge_low": interval.low, "edge_high": interval.high, "rank_group": np.nan}
        built.append((line, edges["edge"] * edges["tasks"] * (len(edges) / len(measured)) / edges["victims"]))
    built.sort(key=lambda item: (-item[0]["edge"], item[0]["attack_label"]))
    ran = [(line, series) for line, series in built if line["covered"]]
    entries = [(repr([line[key] for key in ATTACK_KEYS]), series) for line, series in ran]
    for (line, _), rank in zip(ran, rank_groups(entries, "lane", *keys.values()), strict=True):
        line["rank_group"] = rank
    never = [
        line | {"edge": np.nan, "edge_low": np.nan, "edge_high": np.nan} for line, _ in built if not line["covered"]
    ]
    return [*(line for line, _ in ran), *never]


def _victims(part: pd.DataFrame) -> pd.DataFrame:
    """Return the victims of a task by draw and trial, with the law they are drawn by."""
    first = part.iloc[0]
    batches = local_batches(first["batches"], first["local_steps"], first["batches_per_epoch"])
    law = repr((*(str(first[key]) for key in _VICTIM), int(batches), int(first["clients"])))
    return part[["draw", "trial"]].drop_duplicates().assign(law=law)


class _Victims:
    """The victims of a lane's tasks: one line per task, draw and trial, and one per victim and law.

    Args:
        drawn: What `_victims` returns, by task.
    """

    def __init__(self, drawn: dict[Any, pd.DataFrame]) -> None:
        self._index = {task: pd.MultiIndex.from_frame(part[["draw", "trial"]]) for task, part in drawn.items()}
        every = pd.concat([part.assign(task=task) for task, part in drawn.items()])
        self._victim = every.groupby(["law", "trial"]).ngroup().to_numpy()
        lines = every[["law", "trial"]].assign(victim=self._victim).drop_duplicates("victim").sort_values("victim")
        lines.index = pd.Index([f"{law} {trial}" for law, trial in zip(lines["law"], lines["trial"], strict=True)])
        lines["tasks"] = lines["law"].map(every.groupby("law")["task"].nunique())
        lines["victims"] = lines.groupby("law")["trial"].transform("size")
        self._lines = lines

    def edges(self, cells: list[Cell]) -> pd.DataFrame:
        """Return the mean edge of an attack over tasks, victim by victim.

        Args:
            cells: The attack's; on tasks without one, and on victims that it did not try, its edge is 0.

        Returns:
            ``edge``, ``law``, ``tasks`` (of that law) and ``victims`` (of that law).
        """
        known = {cell.keys["task_hash"]: cell for cell in cells}
        parts = []
        for task, index in self._index.items():
            edges = pd.Series(0.0, index=index)
            if task in known:
                cell = known[task]
                gap = cell.by_trial - cell.chance
                if cell.metric.target != "inputs":
                    # Where chance is .89, naming a few classes of many gives -8: one task would decide all.
                    gap = (gap / (1 - cell.chance)).clip(lower=-1)
                if gap.index.equals(index):
                    edges = gap
                else:
                    edges.loc[gap.index] = gap
            parts.append(edges.to_numpy())
        means = pd.Series(np.concatenate(parts)).groupby(self._victim).mean()
        return self._lines.assign(edge=means.to_numpy())

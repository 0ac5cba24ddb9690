"""From rows to cells: one line per (task, attack, defense), with interval, chance and ties."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.arrays import Rows
from leakbench.board.columns import ATTACK_KEYS, CELL_KEYS, COLUMNS, DEFENSE_KEYS, TASK_KEYS, Cell
from leakbench.board.ranks import common, rank_intervals
from leakbench.board.stats import detectable_difference, rank_groups
from leakbench.schema import DEFENDED

TABLE_COLUMNS = {
    "rank_group": "1 for the best attack on this task and defense and those that cannot be told from it, and so on",
    "rank_low": "lower end of the 95% interval of the rank, on the trials that all attacks of the table have",
    "rank_high": "upper end",
    "detectable": "difference between two attacks of the table that its trials detect (80% power, 5% level)",
    "empty": "inputs: mean of the same attack on an update that carries nothing (defense null_update)",
}
"""Columns that depend on other cells of the task: all but the last on those of the same defense."""

_NOTHING = "null_update"


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per task, attack and defense.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them. Rows without an attack are left out.

    Returns:
        `CELL_KEYS`, the columns of `COLUMNS` and `TABLE_COLUMNS`; sorted by task, defense and score. No value but
        those of `TABLE_COLUMNS` depends on other cells.
    """
    return board_of(build_cells(rows.dropna(subset=["attack"])))


def board_of(built: Sequence[Cell]) -> pd.DataFrame:
    """Return the line of every cell; see `cells`."""
    columns = [*CELL_KEYS, *(column.key for column in COLUMNS)]
    frame = pd.DataFrame(
        [cell.keys | {column.key: column.produce(cell) for column in COLUMNS} for cell in built], columns=columns
    )
    order = list(dict.fromkeys(["task", *TASK_KEYS, *DEFENSE_KEYS, "_edge", "mean", *ATTACK_KEYS]))
    edges = frame["advantage"].fillna(frame["gain"])
    frame = frame.assign(_edge=edges).sort_values(order, ascending=[k not in ("_edge", "mean") for k in order])
    ordered = [built[number] for number in frame.index]
    frame = frame.drop(columns="_edge").reset_index(drop=True)
    frame[[*TABLE_COLUMNS]] = _of_tables(ordered, group_ids(frame, (*TASK_KEYS, *DEFENSE_KEYS)))
    carries_nothing = (frame["defense"] == _NOTHING) & (frame["target"] == "inputs")
    same_attack = group_ids(frame, (*TASK_KEYS, *ATTACK_KEYS))
    frame["empty"] = frame["mean"].where(carries_nothing).groupby(same_attack).transform("max")
    return frame


def _of_tables(ordered: Sequence[Cell], tables: pd.Series[int]) -> NDArray[np.float64]:
    """Return all of `TABLE_COLUMNS` but the last of every cell, with a column of NaN for that one.

    Args:
        ordered: Cells, those of one table with the best first.
        tables: (n,) table of each.
    """
    found = np.full((len(ordered), len(TABLE_COLUMNS)), np.nan)
    members: dict[int, list[int]] = {}
    for place, (cell, table) in enumerate(zip(ordered, tables.tolist(), strict=True)):
        if len(cell.tried):
            members.setdefault(table, []).append(place)
    for places in members.values():
        entries = [ordered[place].edge_by_trial for place in places]
        found[places, 0] = rank_groups(entries)
        found[places, 3] = detectable_difference([ordered[place].by_trial for place in places])
        means = common(entries)
        if means is not None:
            found[places, 1:3] = rank_intervals(means)[["low", "high"]]
    return found


def group_ids(frame: pd.DataFrame, keys: tuple[str, ...]) -> pd.Series[int]:
    """Return the number of the group that each row is in; nulls are equal."""
    return frame.groupby(list(keys), dropna=False, sort=False).ngroup()


def build_cells(rows: pd.DataFrame) -> list[Cell]:
    """Return the cells of result rows, in the order of their first rows."""
    if not len(rows):
        return []
    rows = _with_checkpoint(rows)
    ids = group_ids(rows, CELL_KEYS).to_numpy()
    order = np.lexsort((rows["trial"], rows["draw"], ids))
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    firsts = rows[list(CELL_KEYS)].iloc[order[starts]]
    keys = zip(*([plain(value) for value in firsts[key].tolist()] for key in CELL_KEYS), strict=True)
    whole = Rows.of(rows, order)
    ends = [*starts[1:].tolist(), len(order)]
    return [
        Cell(dict(zip(CELL_KEYS, own, strict=True)), whole.part(slice(start, end)), order[start:end])
        for own, start, end in zip(keys, starts.tolist(), ends, strict=True)
    ]


def split_cells(rows: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return the rows of every cell, by draw and trial, with the values of `CELL_KEYS`."""
    rows = _with_checkpoint(rows)
    parts = rows.sort_values(["draw", "trial"], kind="stable").groupby(group_ids(rows, CELL_KEYS))
    return [({key: plain(part[key].iloc[0]) for key in CELL_KEYS}, part) for _, part in parts]


def plain(value: Any) -> Any:
    """Return a key as the schema has it; pandas turns whole numbers to floats where another row holds a null."""
    if pd.isna(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_checkpoint(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``checkpoint``, and complete it, fingerprint and lane; see `named_weights`.

    A cell has no lane if any of its rows saw a model that the defense had changed.
    """
    completed = ("dataset_fingerprint", "checkpoint", "lane")
    entry = group_ids(rows, tuple(key for key in CELL_KEYS if key not in completed))
    rows = named_weights(rows, entry)
    defended = (rows["model_shown"] == DEFENDED).groupby(entry).transform("any")
    rows["lane"] = rows["lane"].astype(object).mask(defended, None)
    return rows


def named_weights(rows: pd.DataFrame, entry: pd.Series[int]) -> pd.DataFrame:
    """Add the column ``checkpoint``, and complete it and the fingerprint on rows that failed before they were known.

    Args:
        rows: Rows of results or of measures.
        entry: Number of the cell that each is in.
    """
    rows = rows.assign(checkpoint=rows["checkpoint_origin"].astype(object))
    for _, part in rows[rows["checkpoint_origin"] == "local"].groupby(entry):
        weights = part[["draw", "checkpoint_sha256"]].drop_duplicates().dropna(subset="checkpoint_sha256")
        weights = weights.sort_values(["draw", "checkpoint_sha256"])
        if weights["draw"].is_unique:
            digest = hashlib.sha256("".join(weights["checkpoint_sha256"]).encode()).hexdigest()[:12]
            rows.loc[part.index, "checkpoint"] = f"local:{digest}"
        else:  # rows of several trainings of the same draw: each is only comparable to itself
            rows.loc[part.index, "checkpoint"] = "local:" + part["checkpoint_sha256"].str[:12]
    for key in ("dataset_fingerprint", "checkpoint"):
        known = rows.groupby(entry)[key]
        fill = rows[key].isna() & (known.transform("nunique") == 1)
        rows[key] = rows[key].astype(object).mask(fill, known.transform("first"))
    return rows

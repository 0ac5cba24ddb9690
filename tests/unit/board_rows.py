"""Rows as a run writes them, made by hand: one attack against one defense on one task."""

from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd
import pyarrow as pa

from leakbench.board.columns import entry_label, entry_parameters
from leakbench.metrics import METRICS, headline
from leakbench.results import ROW_FIELDS, blank_row, task_columns
from leakbench.tasks import Architecture, Task

LABELS = Task(dataset="mnist", architecture=Architecture(name="mlp"))
INPUTS = LABELS.model_copy(update={"target": "inputs"})
DEFAULTS = {pa.string(): "", pa.int64(): 1, pa.float64(): 0.0, pa.bool_(): False}


def make(values, attack="llg", *, task=LABELS, reference=0.2, statuses=None, **changes):
    """Rows of one attack: the ranking metric per trial; None where the trial failed."""
    metric = headline(task.target).name
    base = {f.name: DEFAULTS.get(f.type, datetime(2026, 1, 1, tzinfo=UTC)) for f in ROW_FIELDS if not f.nullable}
    base |= blank_row() | task_columns(task)
    base |= {"season": "2026", "dataset_fingerprint": "f", "checkpoint_origin": "init", "isolation": "process"}
    base |= {"attack": attack, "attack_params": "{}", "defense": "none", "defense_params": "{}", "wall_seconds": 0.5}
    base |= {"defense_strength": "[]", "defense_adaptive": "[]"}
    base |= {"draw": 0, METRICS[metric].reference: reference}
    references = reference if isinstance(reference, list) else [reference] * len(values)
    rows = []
    for trial, (value, known) in enumerate(zip(values, references, strict=True)):
        status = statuses[trial] if statuses else "ok" if value is not None else "error"
        error = None if status == "ok" else f"{status} happened"
        own = {"trial": trial, metric: value, METRICS[metric].reference: known, "status": status, "error": error}
        row = base | own | changes
        labels = {
            f"{k}_label": entry_label(str(row[k]), entry_parameters(row[f"{k}_params"])) for k in ("attack", "defense")
        }
        rows.append(row | labels)
    return rows


def frame(*parts):
    return pd.DataFrame([row for part in parts for row in part])


def only(board):
    assert len(board) == 1
    return board.iloc[0]

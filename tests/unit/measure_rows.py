"""Rows as `leakbench measure` writes them, made by hand: one quantity of one measure on one task."""

from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd
from board_rows import DEFAULTS, INPUTS

from leakbench.measures.catalogue import ALL, MEASURES
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.results import blank_row, task_columns


def base(measure, task, **changes):
    row = {f.name: DEFAULTS.get(f.type, datetime(2026, 1, 1, tzinfo=UTC)) for f in MEASURE_FIELDS if not f.nullable}
    row |= blank_row(MEASURE_FIELDS) | task_columns(task)
    row |= {"season": "2026", "dataset_fingerprint": "f", "checkpoint_origin": "init", "checkpoint_sha256": "w"}
    row |= {"measure": measure, "measure_label": measure, "measure_params": "{}", "isolation": "process"}
    row |= {"defense": "none", "defense_label": "none", "defense_params": "{}", "model_draws": "one"}
    return row | {"status": "ok", "block_start": 0, "block_stop": 64, "job_id": "j"} | changes


def measured(quantity, values, *, task=INPUTS, fitted=False, ends=0.5, n=40, **changes):
    """Rows of one quantity: by layer one value per trial, or the fitted value with an interval of +- ``ends``."""
    specs = [MEASURES.get(name) for name in MEASURES.names()]
    spec, known = next((s, q) for s in specs for q in s.quantities if q.name == quantity)
    fixed = base(spec.name, task, quantity=quantity, kind=known.kind, unit=known.unit)
    depths = {layer: depth for depth, layer in enumerate(layer for layer in values if layer != ALL)}
    rows = []
    for layer, own in values.items():
        place = {"layer": layer, "depth": depths.get(layer), "layer_parameters": 10}
        if fitted:
            ends_of = {} if ends is None else {"low": own - ends, "high": own + ends}
            rows.append(fixed | place | {"value": own, "n": n} | ends_of | changes)
        else:
            rows += [fixed | place | {"value": v, "trial": t, "draw": 0} | changes for t, v in enumerate(own)]
    return rows


def failed(measure, status, error, *, task=INPUTS, **changes):
    return [base(measure, task, status=status, error=error) | changes]


def frame(*parts):
    return pd.DataFrame([row for part in parts for row in part])

"""The schema of measure rows: the task, defense and provenance columns of result rows, and what was measured."""

from __future__ import annotations

import pyarrow as pa

from leakbench.schema import ROW_FIELDS, Field

_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()


def result_columns(first: str, stop: str | None) -> tuple[Field, ...]:
    """Return the columns of result rows from ``first`` to the one before ``stop``, or to the last."""
    names = [field.name for field in ROW_FIELDS]
    return ROW_FIELDS[names.index(first) : None if stop is None else names.index(stop)]


MEASURE_FIELDS: tuple[Field, ...] = (
    *result_columns("schema_version", "budget_model_evaluations"),
    Field("measure", _TEXT, "Measure id"),
    Field("measure_label", _TEXT, "Id with the parameters that differ from the defaults"),
    Field("measure_version", _INT, "Version of the measure"),
    Field("measure_params", _TEXT, "Parameters, canonical JSON"),
    *result_columns("defense", "job_id"),
    Field("job_id", _TEXT, "Content hash of task, block, measure, defense and their parameters"),
    *result_columns("block_start", "trial"),
    *result_columns("model_draws", "model_shown"),
    Field("trial", _INT, "Number of the trial; null: fitted over the trials of the block, or failed", nullable=True),
    Field("draw", _INT, "Init or checkpoint draw; null: fitted or failed", nullable=True),
    Field("status", _TEXT, "As of result rows; a failed job has one row"),
    Field("error", _TEXT, "One line on what went wrong; null when ok", nullable=True),
    Field("quantity", _TEXT, "What the value is; null: failed", nullable=True),
    Field("kind", _TEXT, "lower_bound, proxy or proved_bound; never mixed in a column; null: failed", nullable=True),
    Field("unit", _TEXT, "Unit of the value; null: failed", nullable=True),
    Field("layer", _TEXT, "Layer by name, or `all` for the whole update; null: failed", nullable=True),
    Field("depth", _INT, "Position of the layer from the input, 0 is the first; null: all", nullable=True),
    Field("layer_kind", _TEXT, "convolution, linear, norm or other; null: all, or failed", nullable=True),
    Field("layer_parameters", _INT, "P_l: numbers of the update in that layer; null: failed", nullable=True),
    Field("value", _FLOAT, "The value; null: failed", nullable=True),
    Field("low", _FLOAT, "Lower end of the 95% interval of a fitted value; null: none", nullable=True),
    Field("high", _FLOAT, "Upper end", nullable=True),
    Field("n", _INT, "Observations behind a fitted value; null: one trial", nullable=True),
    Field("wall_seconds", _FLOAT, "Wall seconds of the job; null: not measured", nullable=True),
    Field("peak_memory_bytes", _INT, "Peak memory of the measuring process", nullable=True),
    *result_columns("leakbench_version", None),
)
"""Every column of a measure row, in order."""

"""What the site asks of rows before it makes pages of them: values that a board can place. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leakbench.board.columns import entry_label, entry_parameters
from leakbench.board.lanes import EXACT
from leakbench.errors import UserError
from leakbench.schema import ROW_FIELDS
from leakbench.stage import stage_order

LANE_TITLES = {
    "legacy_upper_bound": "one image, labels known (legacy upper bound)",
    "passive_labels": "labels from one gradient",
    "passive_images": "images from one gradient",
    "passive_update": "several local steps, learning rate unknown",
    "aggregate": "sums over clients",
    "malicious_server": "malicious server",
    "inference": "attributes and membership",
}
"""Lanes in words."""


def _one_of(*known: str | None) -> Callable[..., None]:
    def check(value: Any) -> None:
        if value not in known:
            raise ValueError

    return check


def _entry(name: str | None, params: str | None) -> None:
    if name is not None:
        entry_label(name, entry_parameters(params or ""))


_CHECKS: tuple[tuple[tuple[str, ...], str, Callable[..., Any]], ...] = (
    (("lane",), f"expected {', '.join(LANE_TITLES)} or null", _one_of(None, *LANE_TITLES)),
    (("target",), f"expected {', '.join(EXACT)}", _one_of(*EXACT)),
    (("stage",), "expected a stage such as untrained or sgd(steps=100)", stage_order),
    (("attack", "attack_params"), "expected parameters as JSON, one object per part of the name", _entry),
    (("defense", "defense_params"), "expected parameters as JSON, one object per part of the name", _entry),
)
"""Columns, what they hold, and what raises where they do not."""

_FLOATS = tuple(field.name for field in ROW_FIELDS if pa.types.is_floating(field.type))


def check_rows(path: Path) -> None:
    """See that a file holds only what pages can show.

    Raises:
        UserError: A lane, target or stage is none, parameters are no JSON, or a number is infinite; or the file
            cannot be read.
    """
    texts = list(dict.fromkeys(name for names, *_ in _CHECKS for name in names))
    seen: set[tuple[Any, ...]] = set()
    try:
        with pq.ParquetFile(path) as file:
            missing = sorted({*texts, *_FLOATS, "job_id"} - set(file.schema_arrow.names))
            if missing:
                return  # the reader says which
            for batch in file.iter_batches(50_000, columns=[*texts, "job_id"], use_threads=False):
                _texts(path, pa.Table.from_batches([batch]), texts, seen)
            for batch in file.iter_batches(50_000, columns=[*_FLOATS, "job_id"], use_threads=False):
                _numbers(path, batch)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: expected a Parquet file of rows ({str(error)[:80]}); leave it out") from None


def _texts(path: Path, table: pa.Table, columns: list[str], seen: set[tuple[Any, ...]]) -> None:
    for row in table.group_by(columns).aggregate([("job_id", "min")]).to_pylist():
        for names, expected, check in _CHECKS:
            values = tuple(row[name] for name in names)
            if (names, *values) in seen:
                continue
            try:
                check(*values)
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise _error(path, row["job_id_min"], names[-1], values[-1], expected) from None
            seen.add((names, *values))


def _numbers(path: Path, batch: pa.RecordBatch) -> None:
    for name in _FLOATS:
        infinite = pc.fill_null(pc.is_inf(batch[name]), False)
        if (place := pc.index(infinite, True).as_py()) >= 0:
            raise _error(path, batch["job_id"][place].as_py(), name, batch[name][place].as_py(), "a finite number")


def _error(path: Path, job: Any, column: str, value: Any, expected: str) -> UserError:
    got = repr(value if not isinstance(value, str) else value[:60])
    expected = expected.removeprefix("expected ")
    return UserError(f"{path}: job {str(job)[:16]}: {column}: expected {expected}, got {got}; leave the file out")

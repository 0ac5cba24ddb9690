"""Result rows as data frames. No torch here.

The columns are documented in `leakbench.schema`, the files in `leakbench.store`; the names of both are importable from
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.errors import UserError
from leakbench.schema import (
    BENCHMARK_VERSION,
    FAILURES,
    ROW_FIELDS,
    SCHEMA_VERSION,
    STATUSES,
    Field,
    arrow_schema,
    blank_row,
    schema_markdown,
    task_columns,
)
from leakbench.store import (
    MEASURES_FOLDER,
    ROWS_SHA256,
    UTILITY_FOLDER,
    JobFile,
    completed_jobs,
    is_complete,
    job_files,
    job_path,
    prepare_out,
    read_job_status,
    rows_sha256,
    write_job,
    write_parquet,
)

__all__ = [
    "BENCHMARK_VERSION",
    "FAILURES",
    "MEASURES_FOLDER",
    "ROWS_SHA256",
    "ROW_FIELDS",
    "SCHEMA_VERSION",
    "STATUSES",
    "UTILITY_FOLDER",
    "Field",
    "JobFile",
    "arrow_schema",
    "blank_row",
    "completed_jobs",
    "holds_measures",
    "holds_rows",
    "holds_utility",
    "is_complete",
    "job_files",
    "job_path",
    "latest_rows",
    "load_measures",
    "load_rows",
    "load_utility",
    "no_rows",
    "prepare_out",
    "read_files",
    "read_job_status",
    "rows_sha256",
    "schema_markdown",
    "task_columns",
    "write_job",
    "write_parquet",
]

_SAME_MODEL = (
    *("season", "season_commitment", "benchmark_version"),
    *("task_hash", "dataset_fingerprint", "checkpoint_sha256", "model_draws", "draw"),
    *("defense", "defense_version", "defense_params", "defense_source_sha256"),
)
_SAME_TRIAL = (
    *_SAME_MODEL,
    *("attack", "attack_version", "attack_params", "attack_source_sha256"),
    *("budget_model_evaluations", "budget_wall_seconds", "trial"),
)
_UNKNOWN_WITHOUT_DATA = ("dataset_fingerprint", "checkpoint_sha256")
_SAME_VALUE = (*_SAME_MODEL, "measure", "measure_version", "measure_params", "quantity", "layer", "trial")


def load_rows(out: Path | Iterable[Path]) -> pd.DataFrame:
    """Return the rows under one or several output directories, one per trial.

    Where a trial was measured in several jobs, the row of the widest and then latest block is kept; one whose data was
    not at hand only where there is no other.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no rows at all.
    """
    return _latest(read_files([out] if isinstance(out, Path) else list(out), "run"), _SAME_TRIAL)


def holds_rows(out: Path) -> bool:
    """Whether there are rows of attacks under an output directory."""
    return next(job_files(out), None) is not None


def holds_measures(out: Path) -> bool:
    """Whether there are rows of measures under an output directory."""
    return holds_rows(out / MEASURES_FOLDER)


def holds_utility(out: Path) -> bool:
    """Whether there are rows of federated trainings under an output directory."""
    return holds_rows(out / UTILITY_FOLDER)


def no_rows() -> pd.DataFrame:
    """Return rows of attacks, of which there are none."""
    rows: pd.DataFrame = arrow_schema().empty_table().to_pandas()
    return rows


def load_measures(out: Path | Iterable[Path]) -> pd.DataFrame:
    """Return the rows of measures under one or several output directories, one per layer, quantity and trial.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no such rows at all.
    """
    directories = [out] if isinstance(out, Path) else list(out)
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected results; make some with: leakbench measure quick")
    found = [directory / MEASURES_FOLDER for directory in directories if (directory / MEASURES_FOLDER).is_dir()]
    if not found:
        listed = " ".join(map(str, directories))
        raise UserError(f"no rows of measures under {listed}; make some with: leakbench measure quick --out {listed}")
    return _latest(read_files(found, "measure"), _SAME_VALUE)


def load_utility(out: Path | Iterable[Path]) -> pd.DataFrame:
    """Return the rows of federated trainings under one or several output directories, one per setting, defense, seed.

    Of every defense those at the learning rate that it chose, beside the undefended training of the same seed: the
    columns of `leakbench.utility.rows.UTILITY_FIELDS` and `leakbench.utility.summary.COMPARED`.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no such rows at all.
    """
    from leakbench.utility.summary import compared

    directories = [out] if isinstance(out, Path) else list(out)
    found = [directory / UTILITY_FOLDER for directory in directories if holds_utility(directory)]
    if not found:
        listed = " ".join(map(str, directories))
        raise UserError(f"no rows of trainings under {listed}; make some with: leakbench utility SUITE --out {listed}")
    return compared(read_files(found, "utility"))


def read_files(directories: Sequence[Path], command: str) -> pd.DataFrame:
    """Return all rows under several directories as they are.

    Args:
        directories: Where to look.
        command: What makes such rows, for the error.

    Raises:
        UserError: A directory is missing, holds rows of another schema version, or no rows at all.
    """
    tables = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected results; make some with: leakbench {command} quick")
        paths = dict.fromkeys(job.path for job in job_files(directory))
        tables += [pq.read_table(path) for path in paths]
    if not tables:
        listed = ", ".join(map(str, directories))
        raise UserError(f"no result rows under {listed}; make some with: leakbench {command} quick --out {listed}")
    rows: pd.DataFrame = pa.concat_tables([table.replace_schema_metadata() for table in tables]).to_pandas()
    return rows


def latest_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, of the rows of attacks on the same trial, that of the widest and then latest block."""
    return _latest(rows, _SAME_TRIAL)


def _latest(rows: pd.DataFrame, same: Sequence[str]) -> pd.DataFrame:
    """Keep, of the rows that agree in ``same``, that of the widest and then latest block."""
    few = rows[[*same, "utc"]].reset_index(drop=True)
    few["_width"] = (rows["block_stop"] - rows["block_start"]).to_numpy()
    # Failed measures have no trial: one row stands for its block.
    few["_block"] = rows["block_start"].where(rows["status"] != "ok", -1).to_numpy() if "measure" in rows else 0
    _complete(few, same)
    few["_tried"] = (rows["status"] != "unavailable").to_numpy()
    order = few.sort_values(["_tried", "_width", "utc"], kind="stable")
    kept = order.drop_duplicates([*same, "_block"], keep="last").index
    if len(kept) < len(rows):
        rows = rows.iloc[kept.sort_values()]
    return rows.reset_index(drop=True)


def _complete(few: pd.DataFrame, same: Sequence[str]) -> None:
    """Write into rows without data or model, as the job failed before, those of other rows of the same trial."""
    columns = [name for name in _UNKNOWN_WITHOUT_DATA if few[name].isna().any()]
    if not columns:
        return
    others = [name for name in same if name not in _UNKNOWN_WITHOUT_DATA]
    trial = few.groupby(others, dropna=False, observed=True, sort=False).ngroup()
    for name in columns:
        known = few[name].astype(object)
        few[name] = known.fillna(trial.map(known[known.notna()].groupby(trial).first()))

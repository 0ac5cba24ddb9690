"""Rows for the site: only the columns that it shows, texts as categories, cell by cell. No torch here.

A million rows with every column as Python objects would not fit into two gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.board.columns import CELL_KEYS
from leakbench.errors import UserError
from leakbench.results import job_files, latest_rows
from leakbench.schema import ROW_FIELDS, SCHEMA_VERSION

LEFT_OUT = frozenset({"notes", "isolation_detail", "planted_tensors", "schema_version", "visible_loss"})
"""Columns that only the download has."""

COLUMNS = tuple(field.name for field in ROW_FIELDS if field.name not in LEFT_OUT)
_TEXTS = [field.name for field in ROW_FIELDS if field.type == pa.string()]
_FEW_FILES = 64
_ORDER = tuple(key for key in CELL_KEYS if key != "checkpoint")


def row_files(results: Sequence[Path]) -> list[Path]:
    """Return the files with rows: those of runs, those of folders of compacted rows, and files themselves.

    Raises:
        UserError: There is no such file or folder, one holds rows of another schema version, or there are no rows.
    """
    files: list[Path] = []
    for path in results:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += dict.fromkeys(job.path for job in job_files(path)) or sorted(path.glob("[!.]*.parquet"))
        else:
            raise UserError(f"no results at {path}: expected a folder of a run; make one with: leakbench run quick")
    if not files:
        listed = " ".join(map(str, results))
        raise UserError(f"no result rows under {listed}; make some with: leakbench run quick --out {listed}")
    return files


def load(files: Sequence[Path]) -> pd.DataFrame:
    """Return the rows of files with `COLUMNS`, those of one cell together and by trial.

    Where a trial was measured in several jobs, the row of the widest and then latest block is kept.

    Raises:
        UserError: A file is not one of rows of this schema version.
    """
    files = list(files)
    frames = []
    # Columns in turns, so that Arrow's copy of all and that of pandas are never held at once; of many files, opening
    # them again would take longer than it saves.
    step = len(COLUMNS) if len(files) > _FEW_FILES else -(-len(COLUMNS) // 5)
    for start in range(0, len(COLUMNS), step):
        tables = [_read(path, COLUMNS[start : start + step]) for path in files]
        if not start and len(files) > 1:
            firsts = [_place(path, table) for path, table in zip(files, tables, strict=True)]
            order = sorted(range(len(files)), key=lambda i: firsts[i])
            files, tables = [files[i] for i in order], [tables[i] for i in order]
        whole = pa.concat_tables(tables).unify_dictionaries()
        del tables
        frames.append(whole.to_pandas(split_blocks=True, self_destruct=True))
        del whole
        pa.default_memory_pool().release_unused()
    rows = pd.concat(frames, axis=1)
    del frames
    for name, values in rows.items():
        if isinstance(values.dtype, pd.CategoricalDtype):
            rows[name] = values.cat.reorder_categories(sorted(values.cat.categories))
    return latest_rows(rows.dropna(subset=["attack"]) if rows["attack"].isna().any() else rows)


def _place(path: Path, table: pa.Table) -> tuple[str, ...]:
    """Return where the rows of a file belong: by cell, then by trial."""
    missing = [key for key in (*_ORDER, "trial") if key not in table.column_names]
    parts = [table.slice(0, 1)]
    if missing:
        parts.append(pq.read_table(path, columns=missing, use_threads=False).slice(0, 1))
    values = {
        key: str(part[key][0].as_py()) for part in parts for key in (*_ORDER, "trial") if key in part.column_names
    }
    return (*(values[key] for key in _ORDER), f"{values['trial']:>012}")


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(path, columns=list(columns), read_dictionary=_TEXTS, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: expected a Parquet file of rows ({str(error)[:80]}); leave it out") from None
    if table.column_names != list(columns):
        missing = sorted(set(columns) - set(table.column_names))
        raise UserError(
            f"{path}: expected rows of schema version {SCHEMA_VERSION}, got a file without {', '.join(missing[:3])}; "
            "leave it out"
        )
    return table.replace_schema_metadata()


def everything(files: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield every column of every row, a few at a time."""
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000, use_threads=False):
                yield pa.Table.from_batches([batch]).replace_schema_metadata()

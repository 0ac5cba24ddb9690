"""What can be taken home: all rows as one Parquet file, and how to cite them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.schema import BENCHMARK_VERSION, arrow_schema
from leakbench.site.citing import bibtex_of
from leakbench.site.data import Data
from leakbench.site.loading import everything
from leakbench.store import MEASURES_FOLDER, UTILITY_FOLDER, job_files
from leakbench.utility.rows import UTILITY_FIELDS


def write_rows(data: Data, path: Path) -> Path:
    """Write every column of every row to one file, and return it; at no time are all rows in memory."""
    return _write(path, arrow_schema(), everything(data.files))


OTHERS = (
    ("measures.parquet", MEASURES_FOLDER, MEASURE_FIELDS, "values of measures, one row per quantity, layer and trial"),
    ("trainings.parquet", UTILITY_FOLDER, UTILITY_FIELDS, "federated trainings, one row each"),
)
"""Files of rows that are not of attacks: name, folder in a run, columns, and what they hold."""


def held(data: Data) -> list[tuple[str, str]]:
    """Return name and content of those of `OTHERS` of which there are rows."""
    return [(name, text) for name, folder, _, text in OTHERS if _files(data, folder)]


def write_others(data: Data, out: Path) -> list[Path]:
    """Write `OTHERS` as far as there are such rows, and return the files."""
    return [
        _write(out / name, pa.schema([(field.name, field.type) for field in fields]), everything(files))
        for name, folder, fields, _ in OTHERS
        if (files := _files(data, folder))
    ]


def _files(data: Data, folder: str) -> list[Path]:
    return list(dict.fromkeys(job.path for run in data.folders for job in job_files(run / folder)))


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Path:
    with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table.select(schema.names).cast(schema))
            if sum(map(len, waiting)) >= 20_000:
                writer.write_table(pa.concat_tables(waiting).combine_chunks())
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
    return path


def bibtex(data: Data) -> str:
    """Return how to cite the benchmark at its version, and the works that entries with rows name."""
    year, month, _ = data.date.split("-")
    lines = [
        f"@misc{{leakbench_{BENCHMARK_VERSION.replace('.', '_')},",
        "  title  = {leakbench: a benchmark of gradient and model leakage in federated learning},",
        "  author = {{The leakbench contributors}},",
        f"  year   = {{{year}}},",
        f"  month  = {{{month}}},",
        f"  note   = {{Benchmark version {BENCHMARK_VERSION}, rows up to {data.date}}},",
        "}",
    ]
    told = [(kind, name, str(text.get("reference", ""))) for (kind, name), text in sorted(data.descriptions.items())]
    return "\n".join(["\n".join(lines) + "\n", *filter(None, (bibtex_of(*entry) for entry in told))])

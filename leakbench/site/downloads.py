"""What can be taken home: all rows as one Parquet file, and how to cite them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.schema import BENCHMARK_VERSION, arrow_schema
from leakbench.site.citing import bibtex_of
from leakbench.site.data import Data
from leakbench.site.loading import everything


def write_rows(data: Data, path: Path) -> Path:
    """Write every column of every row to one file, and return it; at no time are all rows in memory."""
    schema = arrow_schema()
    with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
        waiting: list[pa.Table] = []
        for table in everything(data.files):
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

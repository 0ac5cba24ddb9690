"""How long the site of many rows takes, and how much memory.

    python tests/benchmarks/bench_site.py [--rows 1000000] [--keep FOLDER]

Rows are made up: 26 attacks, 5 defenses, half of the tasks labels and half images, 64 trials a cell. They are written
to one Parquet file, and a process of its own builds the site. Printed: seconds (of the clock, and of the processor,
which others on the machine disturb less), peak memory, files, their size, the size of the start page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from board_rows import INPUTS, LABELS, make

from leakbench.schema import arrow_schema

ATTACKS, DEFENSES, TRIALS = 26, 5, 64

CHILD = """
import json, resource, sys, time
from pathlib import Path
from leakbench.site.build import build
begun = time.perf_counter()
built = build([Path(sys.argv[1])], Path(sys.argv[2]))
print(json.dumps({"rows": built.rows, "pages": built.pages, "seconds": time.perf_counter() - begun,
    "processor_seconds": time.process_time(),
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "torch": "torch" in sys.modules}))
"""


def write(path: Path, tasks: int) -> int:
    """Write the rows of so many tasks, and return their number."""
    rng = np.random.default_rng(0)
    schema, count = arrow_schema(), 0
    templates = [(task, pd.DataFrame(make([0.5] * TRIALS, task=task))) for task in (LABELS, INPUTS)]
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for number in range(tasks):
            task, template = templates[number % 2]
            frame = template.iloc[np.tile(np.arange(TRIALS), ATTACKS * DEFENSES)].reset_index(drop=True)
            cell = np.arange(len(frame)) // TRIALS
            attack, defense = cell // DEFENSES, cell % DEFENSES
            values = rng.normal(0.4 + 0.02 * attack, 0.1).clip(0, 1)
            names = np.array([f"attack{i}" for i in range(ATTACKS)])[attack]
            against = np.array(["none", *(f"defense{i}" for i in range(1, DEFENSES))])[defense]
            frame["task"], frame["task_hash"] = f"{task.id}-{number}", f"{number:064x}"
            frame["attack"] = frame["attack_label"] = names
            frame["defense"] = frame["defense_label"] = against
            frame["job_id"] = [f"{number * ATTACKS * DEFENSES + own:064x}" for own in cell]
            if task is LABELS:
                frame["instance_recall"] = (values * 8).round() / 8
            else:
                frame["psnr"], frame["psnr_floor"] = 10 + 20 * values, rng.normal(9, 1, len(frame))
            count += len(frame)
            writer.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
    return count


def main() -> None:
    """Make rows, build their site, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="Folder for rows and site. [default: a temporary one]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows.parquet").is_file():
            begun = time.perf_counter()
            count = write(folder / "rows.parquet", -(-arguments.rows // (ATTACKS * DEFENSES * TRIALS)))
            print(f"{count} rows made in {time.perf_counter() - begun:.0f} s")
        command = [sys.executable, "-c", CHILD, str(folder / "rows.parquet"), str(folder / "site")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        told = json.loads(done.stdout)
        files = [path.stat().st_size for path in (folder / "site").rglob("*.*") if path.is_file()]
        told |= {"files": len(files), "megabytes": sum(files) / 1e6}
        told["index_kb"] = (folder / "site" / "index.html").stat().st_size / 1e3
        for key, value in told.items():
            print(f"{key:>18}: {value:,.1f}" if isinstance(value, float) else f"{key:>18}: {value}")


if __name__ == "__main__":
    main()

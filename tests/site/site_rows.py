"""Rows for a site, made by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leakbench.schema import arrow_schema
from leakbench.site.data import Options
from leakbench.tasks import BatchSpec

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # rows as the tests of boards make them
from board_rows import INPUTS, LABELS, make

OPTIONS = Options(changelog=Path(__file__))  # no history: that of the checkout changes
HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"
"""What a stranger might call a thing."""


def site_rows():
    """Rows of label and image attacks, some defended, some failed, one with a hostile name and error."""
    rng = np.random.default_rng(0)
    eight = LABELS.model_copy(update={"batch": BatchSpec(size=8), "dataset": "cifar10"})
    parts = []
    for task in (LABELS, eight):
        for attack, mean in (("llg", 0.9), ("idlg", 0.6), ("rlg", 0.58), ("ebi", 0.2), (HOSTILE, 0.3)):
            for defense in ("none", "topk"):
                values = np.clip(rng.normal(mean - 0.2 * (defense == "topk"), 0.1, 12), 0, 1).round(2).tolist()
                job = f"{attack[:3].strip('<')}{defense}{task.batch.size}"
                changes = {"job_id": job, "defense": defense, "suite": "quick", "model_evaluations": 3}
                parts.append(make(values, attack, task=task, reference=0.1, draw=0, **changes))
    broken = make([None] * 12, "dlg", statuses=["error"] * 12, job_id="dlg1", suite="quick")
    parts.append([row | {"error": HOSTILE} for row in broken])
    for attack, mean in (("dlg", 12.0), ("mean_image", 10.0)):
        values = rng.normal(mean, 2, 12).round(3).tolist()
        changes = {"job_id": f"{attack}i", "suite": "quick", "model_evaluations": 100}
        parts.append(make(values, attack, task=INPUTS, reference=9.0, **changes))
    return [row for part in parts for row in part]


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema()), path)
    return path

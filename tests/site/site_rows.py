"""Rows for a site, made by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from leakbench import gallery
from leakbench.keys import DEVELOPMENT
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.schema import arrow_schema
from leakbench.site.data import Options
from leakbench.store import MEASURES_FOLDER, write_job
from leakbench.tasks import BatchSpec

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # rows as the tests of boards make them
from board_rows import INPUTS, LABELS, make
from measure_rows import measured

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
        changes = {"job_id": f"{attack}i", "suite": "quick", "model_evaluations": 100, "season": DEVELOPMENT.name}
        parts.append(make(values, attack, task=INPUTS, reference=9.0, **changes))
    return [row for part in parts for row in part]


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema()), path)
    return path


def write_measures(out: Path) -> None:
    """Write one job with a value per trial and layer, and one with a fitted value."""
    shares = {"all": [1.0, 1.0], "conv.weight": [0.3, 0.1], "fc.weight": [0.7, 0.9]}
    jobs = (
        ("ab12", measured("sensitivity_share", shares, suite="localization")),
        ("cd34", measured("v_information", {"all": 0.5, "fc.weight": 0.25}, fitted=True, suite="localization")),
    )
    for name, rows in jobs:
        job = name * 16
        own = [row | {"job_id": job, "season": DEVELOPMENT.name} for row in rows]
        write_job(out / MEASURES_FOLDER, job, DEVELOPMENT.name, own, MEASURE_FIELDS, statuses={"ok": 2})


def write_pictures(out: Path) -> None:
    """Write pictures of an attack and of the floor, which is one gray for all."""
    for attack, grays in (("dlg", (10, 90, 200)), ("mean_image", (128, 128, 128))):
        entries = []
        for trial, (rule, gray) in enumerate(zip(gallery.RULES, grays, strict=True)):
            row = site_rows_of(attack)[0]
            images = {"true": np.full((1, 1, 8, 8), 77 + trial), "recovered": np.full((1, 1, 8, 8), gray)}
            own = {"job_id": attack, "trial": trial, "rule": rule, "psnr": 20.0 - trial, "psnr_floor": 9.0, "images": 1}
            pictures = {side: gallery.strip(image.astype(np.uint8)) for side, image in images.items()}
            own |= {key: row[key] for key in gallery.IDENTITY}
            entries.append(own | pictures | {"visible_loss_trace": []})
        gallery.write_gallery(out, attack, entries)


def site_rows_of(attack: str):
    """Rows of an attack on images."""
    return [row for row in site_rows() if row["attack"] == attack and row["target"] == "inputs"]

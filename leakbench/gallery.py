"""Pictures beside the rows: of every job that recovers images, the trials of best, median and worst PSNR. No torch.

A job's pictures are one Parquet file, ``<out>/gallery/<job id>.parquet``, written like its rows and before them. Which
trials are shown follows from `choose` alone; of a batch the first images are shown. Only victims of the public season
and of `DATASETS` are (DESIGN.md 5).
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from leakbench.errors import UserError, unknown
from leakbench.keys import DEVELOPMENT, Season
from leakbench.results import write_parquet

DATASETS = frozenset({"digits", "digits_parity", "mnist", "mnist_parity", "cifar10", "cifar10_animal"})
"""Datasets whose victims may be shown."""

RULES = ("best", "median", "worst")
"""What is shown of a cell, in order."""

MOST_IMAGES = 8
"""Most images of a batch in a picture."""

_SIDE, _GAP = 64, 2  # pixels that an image fills as far as whole multiples allow, and between images
FOLDER = "gallery"
"""Folder of an output directory that holds the pictures."""

IDENTITY = (
    *("season", "task", "task_hash", "dataset"),
    *("attack", "attack_label", "attack_version", "attack_source_sha256"),
    *("defense", "defense_label", "defense_version", "defense_source_sha256"),
)
"""Row columns that a picture carries: what tells cells apart."""

SCHEMA = pa.schema(
    [
        ("job_id", pa.string()),
        *((key, pa.int64() if key.endswith("_version") else pa.string()) for key in IDENTITY),
        ("trial", pa.int64()),
        ("rule", pa.string()),
        ("psnr", pa.float64()),
        ("psnr_floor", pa.float64()),
        ("images", pa.int64()),
        ("true", pa.binary()),
        ("recovered", pa.binary()),
        ("visible_loss_trace", pa.list_(pa.float32())),
    ]
)
"""One line per rule: `IDENTITY`, the trial, its mean PSNR and floor in dB, the images of its batch, PNG strips of the
first `MOST_IMAGES` of them (true, and recovered in the same order), and the attack's own loss along the way."""

Entry = dict[str, Any]
"""A line of `SCHEMA`."""


def may_show(season: Season, dataset: str) -> bool:
    """Whether victims of that season and dataset may be shown."""
    return season.commitment == DEVELOPMENT.commitment and dataset in DATASETS


def choose(psnr: Sequence[float]) -> dict[str, int]:
    """Return the position of the trial for each of `RULES`: the median is the lower one, ties go to the first."""
    ascending = sorted(range(len(psnr)), key=lambda i: (psnr[i], i))
    best = min(range(len(psnr)), key=lambda i: (-psnr[i], i))
    return {"best": best, "median": ascending[(len(psnr) - 1) // 2], "worst": ascending[0]}


def strip(images: NDArray[np.uint8]) -> bytes:
    """Return images (N, 1 or 3, height, width) side by side as PNG, enlarged by repeating pixels."""
    shown = images[:MOST_IMAGES]
    factor = max(1, _SIDE // max(shown.shape[2:]))
    shown = shown.repeat(factor, axis=2).repeat(factor, axis=3)
    white = np.full((*shown.shape[1:3], _GAP), 255, dtype=np.uint8)
    parts = [part for image in shown for part in (white, image)][1:]
    pixels = np.concatenate(parts, axis=2).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def write_gallery(out: Path, job_id: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write the pictures of a job; without any, remove what an earlier measurement left.

    Raises:
        OSError: The directory cannot be written.
    """
    path = out / FOLDER / f"{job_id}.parquet"
    if entries:
        write_parquet(pa.Table.from_pylist(list(entries), schema=SCHEMA), path)
    else:
        path.unlink(missing_ok=True)


def read_gallery(out: Path, *, attack: str | None = None, task: str | None = None) -> list[list[Entry]]:
    """Return the pictures under ``out``, one list per task, attack and defense, in the order of `RULES`.

    A cell of several jobs shows the best and worst of all; its median is the lower median of those of the jobs.

    Args:
        out: Output directory of a run.
        attack: Only this attack, by name or label.
        task: Only this task, by id.

    Raises:
        UserError: There are no pictures, or none of that attack or task.
    """
    entries: list[Entry] = []
    for path in sorted((out / FOLDER).glob("[!.]*.parquet")):
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException):
            continue  # cut off; the rows are what counts
        if table.schema.equals(SCHEMA):
            entries += table.to_pylist()
    if not entries:
        raise UserError(
            f"no pictures under {out}: expected a run that recovers images of {', '.join(sorted(DATASETS))} in the "
            "public season; make one with: leakbench run quick"
        )
    for kind, wanted, keys in (("attack", attack, ("attack", "attack_label")), ("task", task, ("task",))):
        if wanted is not None:
            kept = [entry for entry in entries if wanted in [entry[key] for key in keys]]
            if not kept:
                raise unknown(kind, wanted, sorted({entry[key] for entry in entries for key in keys}))
            entries = kept
    cells: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        cells[tuple(entry[key] for key in IDENTITY)].append(entry)
    lines = [_of_all_jobs(cell) for cell in cells.values()]
    median = RULES.index("median")
    return sorted(
        lines, key=lambda e: (e[0]["task"], e[0]["defense"] != "none", e[0]["defense_label"], -e[median]["psnr"])
    )


def _of_all_jobs(cell: list[Entry]) -> list[Entry]:
    chosen = []
    for rule in RULES:
        candidates = sorted((entry for entry in cell if entry["rule"] == rule), key=lambda entry: entry["trial"])
        chosen.append(candidates[choose([entry["psnr"] for entry in candidates])[rule]])
    return chosen

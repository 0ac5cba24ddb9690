"""What a job's recovery looks like: drawn by the process that holds the truth, for `leakbench.gallery`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from leakbench.attack import Recovery
from leakbench.data import Victims
from leakbench.gallery import IDENTITY, Entry, choose, may_show, strip
from leakbench.metrics.images import match
from leakbench.runner.plan import Job
from leakbench.runner.scene import Scenes, pixels, true_pixels


def pictures(
    job: Job, recovery: Recovery | None, victims: Victims | None, scenes: Scenes, rows: Sequence[Mapping[str, Any]]
) -> list[Entry]:
    """Return the gallery lines of a job; none where nothing was recovered, or where victims must not be shown.

    Args:
        job: The job.
        recovery: What was recovered.
        victims: The true images.
        scenes: Knows the dataset.
        rows: The job's rows, one per trial.
    """
    inputs = None if recovery is None else recovery.inputs
    if recovery is None or inputs is None or victims is None or not may_show(job.season, job.task.dataset):
        return []
    data = scenes.dataset(job.task)
    true, trace = true_pixels(job.task, victims, data), recovery.visible_loss_trace
    entries = []
    for rule, t in choose([row["psnr"] for row in rows]).items():
        original = true[t : t + 1]
        matched = match(pixels(inputs[t : t + 1], job.task, data), original)
        entries.append(
            {key: rows[t][key] for key in ("job_id", *IDENTITY, "trial", "psnr", "psnr_floor")}
            | {"rule": rule, "images": original.shape[1]}
            | {"true": strip(_bytes(original)), "recovered": strip(_bytes(matched))}
            | {"visible_loss_trace": None if trace is None else trace[t].tolist()}
        )
    return entries


def _bytes(images: Tensor) -> NDArray[np.uint8]:
    """Return the images of one trial (1, N, *shape) as uint8 (N, *shape)."""
    rounded: NDArray[np.uint8] = (images[0] * 255).round().byte().numpy()
    return rounded

"""tasks.lock: which definition of a suite, and which checkpoints, are the official ones. No torch at import."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakbench.errors import UserError
from leakbench.parts import content_hash

if TYPE_CHECKING:
    from leakbench.grids import Suite


def tasks_folder() -> Path:
    """Return the folder of suites, ``tasks.lock`` and ``checkpoints`` that comes with leakbench.

    Raises:
        UserError: The package ``leakbench_tasks`` is missing.
    """
    spec = importlib.util.find_spec("leakbench_tasks")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "package leakbench_tasks is not installed; reinstall with: pip install --force-reinstall leakbench"
        )
    return Path(spec.submodule_search_locations[0])


def suite_hash(suite: Suite) -> str:
    """Return the sha256 (hex) of everything in a suite that decides a number."""
    content = suite.content()
    del content["description"]
    return content_hash([content, sorted(suite.tasks())])


def read_lock(folder: Path) -> dict[str, Any]:
    """Return the content of ``folder``/tasks.lock: ``suites`` and ``checkpoints``."""
    path = folder / "tasks.lock"
    pinned: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {"suites": {}, "checkpoints": {}, **pinned}


def lock_suite(suite: Suite, folder: Path, *, checkpoints: bool = True) -> list[Path]:
    """Make a suite's definition and the checkpoints of its trained stages official.

    Args:
        suite: The suite.
        folder: Where suites, ``tasks.lock`` and ``checkpoints`` are.
        checkpoints: Whether to train and pin the checkpoints, which needs the suite's datasets.

    Returns:
        The checkpoint files.

    Raises:
        UserError: The definition changed without a raised version, or a dataset is not at hand.
    """
    from leakbench.data import load_dataset
    from leakbench.models.recipe import POINTS
    from leakbench.models.stages import DRAWS, lock_checkpoint

    pin = {"version": suite.version, "sha256": suite_hash(suite)}
    before = read_lock(folder)["suites"].get(suite.name, pin)
    if before["version"] == pin["version"] and before["sha256"] != pin["sha256"]:
        raise UserError(
            f"suite {suite.name!r}: its definition changed, but its version is still {suite.version}; "
            f"set version: {suite.version + 1} (and raise the benchmark's MINOR)"
        )
    wanted = {
        (task.architecture.label, task.dataset, task.stage, task.normalise, draw): task
        for grid in suite.grids
        for task in grid.tasks()
        if task.stage in POINTS
        for draw in range(DRAWS if (grid.model_draws or suite.model_draws) == "per_trial" else 1)
    }
    files = [
        lock_checkpoint(
            task.architecture, load_dataset(task.dataset), task.stage, draw, normalise=task.normalise, tasks=folder
        )
        for (*_, draw), task in sorted(wanted.items())
        if checkpoints
    ]
    pinned = read_lock(folder)
    pinned["suites"][suite.name] = pin
    (folder / "tasks.lock").write_text(json.dumps(pinned, indent=2, sort_keys=True) + "\n")
    return files

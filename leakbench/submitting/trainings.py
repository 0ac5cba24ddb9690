"""From rows of federated trainings, and of attacks on what these kept, back to their job ids. No torch here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from leakbench.entries import EntrySpec
from leakbench.parts import content_hash
from leakbench.stage import IN_TRAINING
from leakbench.submitting.identity import Doubt, Row, architecture_of, chains, doubt, explains_job_id
from leakbench.submitting.known import Declared
from leakbench.tasks import BatchSpec, Protocol, Task
from leakbench.utility.attacked import WHERE
from leakbench.utility.plan import TRAINING

MOST_KEPT = 256
"""Greatest ``keep`` that is tried, as it is no column; suites have 2."""
MOST_CHOICES = 4096
CURVE_ROUNDING = 1e-6
"""Of a curve in a row; see `leakbench.utility.runner`."""
_LAST = 5
"""Evaluations whose mean is the accuracy."""
_FEDERATION = ("clients", "rounds")
"""Columns of a training that are the federation's; a client's own round has one of each."""
_SAID = ("partition", *_FEDERATION, "holdout", "lr_grid", "planned_seeds", "evaluate_every", "lr")


def training_task(row: Row) -> Task:
    """Rebuild the task of a training from its columns.

    Raises:
        ValueError: They describe none.
    """
    protocol = {name: row[name] for name in Protocol.model_fields if name in row and name not in _FEDERATION}
    try:
        return Task(
            dataset=row["dataset"],
            normalise=row["normalise"],
            architecture=architecture_of(row),
            batch=BatchSpec(size=row["batch_size"]),
            protocol=Protocol(**protocol),
        )
    except ValidationError as error:
        detail = error.errors()[0]
        raise ValueError(
            f"its columns describe no training: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        ) from None


def explains_training(row: Row, classes: Mapping[str, str]) -> bool:
    """Whether the job id is the hash of what the row says of its training; see `identity.explains_job_id`.

    Raises:
        ValueError: Its columns describe no training.
    """
    fixed = {
        "benchmark_version": row["benchmark_version"],
        "schema_version": row["schema_version"],
        "season": row["season_commitment"],
        "task": training_task(row).hash,
        "block": [row["block_start"], row["block_stop"]],
        "model_draws": "per_trial",
        "threads": row["threads"],
        "wall_seconds": None,
        "model_evaluations": None,
    }
    said = {name: row[name] for name in _SAID}
    return any(
        content_hash(
            {**fixed, "attack": EntrySpec(TRAINING, said | {"keep": keep}, None).id_content(), "defense": chain}
        )
        == row["job_id"]
        for chain, keep in product(chains(row, classes), range(MOST_KEPT + 1))
    )


def wrong_training_values(row: Row) -> Iterator[str]:
    """Yield the values of a training's row that none can have."""
    if row["status"] == "ok" and row["error"] is not None:
        yield "status 'ok' with an error"
    if row["seed"] != row["block_start"] or row["block_stop"] != row["block_start"] + 1:
        yield f"seed {row['seed']} is not the one trial of its block"
    if row["lr"] not in json.loads(row["lr_grid"]):
        yield f"lr {row['lr']} is none of lr_grid {row['lr_grid']}"
    for name in ("accuracy", "accuracy_chance", "accuracy_holdout", "refused"):
        if row[name] is not None and not 0 <= row[name] <= 1:
            yield f"{name} = {row[name]} is no share"
    if row["status"] != "ok" or row["accuracy"] is None:
        if row["accuracy"] not in (None, row["accuracy_chance"]):
            yield f"status {row['status']!r} with an accuracy other than the chance level"
        return
    if row["rounds_done"] != row["rounds"]:
        yield f"status 'ok' after {row['rounds_done']} of {row['rounds']} rounds"
    last = [value for _, value in json.loads(row["curve"])][-_LAST:]
    if not last or abs(sum(last) / len(last) - row["accuracy"]) > CURVE_ROUNDING:
        yield f"accuracy = {row['accuracy']} is not the mean of the last evaluations of its curve"


class KeptUpdates:
    """The updates that trainings kept under some folders.

    Args:
        folders: Where rows are verified.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    @cached_property
    def by_trial(self) -> dict[int, dict[str, dict[str, Any]]]:
        """The note of every file by its hash, by the trial that attacks it."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for path in sorted({p for folder in self.folders for p in folder.rglob(f"{WHERE}/[!.]*.safetensors")}):
            try:
                with safe_open(path, framework="numpy") as file:
                    note = json.loads(file.metadata()["leakbench"])
                found.setdefault(int(note["trial"]), {})[hashlib.sha256(path.read_bytes()).hexdigest()] = note
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                continue  # none that a row can be of
        return found

    def choices(self, rows: Sequence[Row]) -> list[tuple[str, ...]] | None:
        """Return what the hashes of the files behind the rows of one job may be, in the order of trials.

        None where a file is not at hand, or too many would fit; empty where those at hand are of other models.
        """
        own = [{sha: n for sha, n in self.by_trial.get(row["trial"], {}).items() if _fits(n, row)} for row in rows]
        if not all(own) or math.prod(map(len, own)) > MOST_CHOICES:
            return None
        fitting = [
            [sha for sha, note in files.items() if row["checkpoint_sha256"] in (None, note["model_sha256"])]
            for files, row in zip(own, rows, strict=True)
        ]
        return list(product(*fitting))


def _fits(note: Mapping[str, Any], row: Row) -> bool:
    names = "+".join(part["name"] for part in note["defense_content"]) or "none"
    return (note["task"]["dataset"], note["season"], names) == (row["dataset"], row["season"], row["defense"])


@dataclass(frozen=True)
class AtHand:
    """What job ids cover beyond the columns of rows.

    Args:
        classes: Class names of entries that are given by path, by the hash of their source.
        kept: Updates that trainings kept.
        declared: What the rows that were read say of entries.
    """

    classes: Mapping[str, str]
    kept: KeptUpdates
    declared: Declared = field(default_factory=Declared)


def job_doubt(rows: Sequence[Row], hand: AtHand) -> Doubt | None:
    """Return why the job id of attacks or measures does not follow from their columns; None where it does."""
    row = rows[0]
    kept = hand.kept.choices(rows) if row["stage"] == IN_TRAINING else [()]
    if kept is None:
        return "kept"
    try:
        return None if explains_job_id(row, hand.classes, kept) else doubt(row)
    except (ValueError, TypeError, KeyError):
        return doubt(row)

"""Raw updates of federated trainings that were kept, for attacks at stage ``in_training``.

A defense that behaves only when attacked is seen here: the pairs (round, client) are chosen after the update has come
back, so what is attacked is what the defense did when it had to be useful.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leakbench.entries import NO_DEFENSE, EntrySpec
from leakbench.errors import UserError
from leakbench.results import UTILITY_FOLDER
from leakbench.tasks import Task

KEPT_FOLDER = "kept"
"""Folder, in that of the rows, of what was kept."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One client's update of one round of a federated training, with all that led to it.

    Args:
        run: Job id of the training.
        season: Name of the season whose key the training was drawn with.
        task: What the clients did: dataset, normalisation, architecture, batch and protocol; its stage is
            ``untrained`` and its target and threat model are the defaults. ``protocol.lr`` is the training's.
        fingerprint: Of the dataset.
        num_classes: C.
        partition: How examples were spread over clients, e.g. ``dirichlet(0.1)``.
        seed: Number of the repetition.
        defense: Expression that `leakbench.entries.resolve` takes; ``none`` for no defense.
        defense_content: Identity of every part of it, see `EntrySpec.id_content`.
        trial: Number of the trial that attacks it: of the same victim the same, whatever the defense and learning rate.
            It is `leakbench.utility.spec.SLOTS` times a number of the federation, plus seed * keep, plus the rank among
            what was kept with that seed.
        round: Index of the round, from 0.
        client: Index of the client, from 0.
        head: Name of the last linear layer.
        model: The global model that the client got, in the form of `leakbench.models.functional.Model.tensors`, M = 1.
        update: What the server got from this client, by parameter (and, with ``send_buffers``, buffer) name, each
            (1, *shape).
        indices: (N,) int64 into the dataset: the client's examples of that round, batch after batch.
        labels: (N,) int64 their labels.
        order: (local_steps, B) int64 into ``indices``, the batches of the local steps; None where they are the batches
            in their own order (`leakbench.federation.client.batch_order`).
    """

    run: str
    season: str
    task: Task
    fingerprint: str
    num_classes: int
    partition: str
    seed: int
    defense: str
    defense_content: list[dict[str, Any]]
    trial: int
    round: int
    client: int
    head: str
    model: dict[str, Tensor]
    update: dict[str, Tensor]
    indices: Tensor
    labels: Tensor
    order: Tensor | None = None

    @property
    def name(self) -> str:
        """Name of its file, without suffix."""
        return f"{self.run}-{self.round}-{self.client}"

    @property
    def model_sha256(self) -> str:
        """Sha256 (hex) of the global model."""
        return state_sha256(self.model)


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of one model's state (M = 1), as `checkpoint_sha256` of a row has it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        row = tensors[name][0]
        digest.update(f"{name}{row.dtype}{tuple(row.shape)}".encode())
        digest.update(row.contiguous().numpy().tobytes())
    return digest.hexdigest()


def expression(chain: Sequence[EntrySpec]) -> str:
    """Return an expression that `leakbench.entries.resolve` turns into these entries again, all parameters written."""

    def call(part: EntrySpec) -> str:
        own = part.source is not None and part.source.module is None
        ref = f"{part.source.path}:{part.source.class_name}" if part.source is not None and own else part.name
        arguments = ", ".join(f"{key}={value!r}" for key, value in part.params.items())
        return f"{ref}({arguments})" if arguments else ref

    return "+".join(map(call, chain)) or NO_DEFENSE


_TENSORS = ("model", "update")
_SINGLE = ("indices", "labels", "order")


def write_kept(out: Path, kept: Kept) -> Path:
    """Write an update and what led to it to ``OUT/utility/kept/``; the file is whole as soon as it has its name.

    Raises:
        UserError: The directory cannot be written.
    """
    tensors = {f"{part}/{k}": v.contiguous() for part in _TENSORS for k, v in getattr(kept, part).items()}
    tensors |= {part: getattr(kept, part) for part in _SINGLE if getattr(kept, part) is not None}
    note = {k: v for k, v in vars(kept).items() if k not in (*_TENSORS, *_SINGLE, "task")}
    note |= {"task": kept.task.content(), "model_sha256": kept.model_sha256}
    folder = out / UTILITY_FOLDER / KEPT_FOLDER
    path = folder / f"{kept.name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(safetensors.torch.save(tensors, metadata={"leakbench": json.dumps(note)}))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only the owner reads
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write {path.name} ({error.strerror}); use another --out") from None
    return path


def read_file(path: Path) -> Kept:
    """Read one file.

    Raises:
        UserError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            note = json.loads(file.metadata()["leakbench"])
        named: dict[str, dict[str, Tensor]] = {part: {} for part in _TENSORS}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            if part in named:
                named[part][name] = value
        sha256, task = note.pop("model_sha256"), Task.model_validate_json(json.dumps(note.pop("task")))
        parts: dict[str, Any] = {**named, **{part: tensors.get(part) for part in _SINGLE}}
        kept = Kept(**note, task=task, **parts)
        if kept.model_sha256 != sha256:
            raise ValueError("the model is another one than was kept")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a kept update ({' '.join(str(error).split())}); remove it and run "
            "leakbench utility again"
        ) from None
    return kept

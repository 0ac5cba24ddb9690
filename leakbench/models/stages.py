"""Checkpoints of the stages: official ones by their sha256, local ones trained by the recipe and cached."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from leakbench.cache import cache_dir
from leakbench.errors import LeakbenchError, Unavailable, UserError
from leakbench.lock import read_lock, tasks_folder
from leakbench.models.build import build_module, first_line
from leakbench.models.catalogue import ZOOS
from leakbench.models.functional import build_model
from leakbench.models.recipe import RECIPE_VERSION, TrainingData, init_seed, resumable, train
from leakbench.parts import content_hash
from leakbench.stage import SGDStage

if TYPE_CHECKING:
    from leakbench.tasks import Architecture

DRAWS = 3
"""Checkpoints per trained stage."""

_TRAINING: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by run
_UNREACHABLE: dict[str, str] = {}  # a download that fails takes most of a minute; once per process is enough


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one draw of a stage.

    Args:
        tensors: State in the form of `leakbench.models.functional.Model.tensors`, M = 1.
        sha256: Hash of the safetensors file (hex).
        origin: ``init`` (untrained), ``local`` (trained here), ``official`` (pinned in tasks.lock) or ``pretrained``.
        accuracy: Accuracy on the test split; None where it was not measured.
        path: The file, where there is one.
    """

    tensors: dict[str, Tensor]
    sha256: str
    origin: str
    accuracy: float | None
    path: Path | None


def checkpoint(
    architecture: Architecture,
    dataset: TrainingData,
    stage: str,
    draw: int,
    *,
    normalise: bool,
    cache: Path | None = None,
) -> Checkpoint:
    """Return the weights of a stage: the official ones if there are any, else cached ones, else newly trained ones.

    Args:
        architecture: Which net.
        dataset: What it is trained on.
        stage: ``untrained``, ``early``, ``mid``, ``converged``, ``pretrained`` or ``sgd(...)``.
        draw: Which of the `DRAWS` training runs; for ``untrained`` any number, for ``pretrained`` it does not matter.
        normalise: Whether inputs are normalised.
        cache: Folder of locally trained checkpoints; None means ``checkpoints`` in the cache directory.

    Raises:
        UserError: The stage or draw is unknown, or an official file is not the one that tasks.lock pins.
        Unavailable: There are no pretrained weights, or they cannot be reached.
    """
    if stage == "untrained":
        seeds = [init_seed(architecture, dataset, draw)]
        model = build_model(architecture, dataset.input_spec.shape, dataset.num_classes, seeds=seeds)
        return _unsaved(model.tensors(), "init")
    if stage == "pretrained":
        return _pretrained(architecture, dataset)
    try:
        sgd = SGDStage.parse(stage)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not 0 <= draw < DRAWS:
        raise UserError(f"stage {stage} has draws 0 to {DRAWS - 1}, got {draw}; give one of these")
    key = checkpoint_key(architecture, dataset, draw, normalise)
    folder = cache or cache_dir() / "checkpoints"
    with _TRAINING[key]:  # one thread trains, the others find the result
        found = _official(key, stage) or _cached(folder, key, stage)
        if found is None:
            start = _nearest(folder, key, sgd) if sgd and resumable(architecture, sgd) else None
            for snapshot in train(architecture, dataset, draw, normalise=normalise, last=stage, start=start):
                data = _serialise(snapshot.tensors, snapshot.accuracy)
                found = _parse(data, "local", _store(folder, f"{key[:32]}-{_slug(snapshot.stage)}", data))
    if found is None:
        raise LeakbenchError(f"training yielded no checkpoint of stage {stage}")
    return found


def checkpoint_at_hand(
    architecture: Architecture, dataset: TrainingData, stage: str, draw: int, *, normalise: bool
) -> Checkpoint | None:
    """Return the weights of a trained stage if they are official or in the cache; nothing is trained.

    Raises:
        UserError: An official file is not the one that tasks.lock pins.
    """
    key = checkpoint_key(architecture, dataset, draw, normalise)
    return _official(key, stage) or _cached(cache_dir() / "checkpoints", key, stage)


def checkpoint_key(architecture: Architecture, dataset: TrainingData, draw: int, normalise: bool) -> str:
    """Return the hash of everything that determines the training run of a draw."""
    return content_hash(
        {
            "architecture": architecture.content(),
            "dataset": dataset.fingerprint,
            "input_spec": dataset.input_spec.content(),
            "normalise": normalise,
            "draw": draw,
            "recipe": RECIPE_VERSION,
        }
    )


def lock_checkpoint(
    architecture: Architecture,
    dataset: TrainingData,
    stage: str,
    draw: int,
    *,
    normalise: bool,
    tasks: Path,
    cache: Path | None = None,
) -> Path:
    """Make a checkpoint official: copy it to ``tasks``/checkpoints and pin it in ``tasks``/tasks.lock.

    Returns:
        The copied file.
    """
    made = checkpoint(architecture, dataset, stage, draw, normalise=normalise, cache=cache)
    key = checkpoint_key(architecture, dataset, draw, normalise)
    name = f"{architecture.label}-{_slug(stage)}-{draw}-{key[:8]}.safetensors"
    data = _serialise(made.tensors, made.accuracy)
    _write(tasks / "checkpoints" / name, data)
    pinned = read_lock(tasks)
    pinned["checkpoints"].setdefault(key, {})[stage] = {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
    _write(tasks / "tasks.lock", (json.dumps(pinned, indent=2, sort_keys=True) + "\n").encode())
    return tasks / "checkpoints" / name


def _official(key: str, stage: str) -> Checkpoint | None:
    pin = read_lock(tasks_folder())["checkpoints"].get(key, {}).get(stage)
    if pin is None:
        return None
    file = tasks_folder() / "checkpoints" / pin["file"]
    data = file.read_bytes() if file.is_file() else b""
    got = hashlib.sha256(data).hexdigest() if data else "no file"
    if got != pin["sha256"]:
        raise UserError(
            f"official checkpoint {pin['file']}: expected sha256 {pin['sha256']} (tasks.lock), got {got}; "
            "reinstall leakbench or restore the file"
        )
    return _parse(data, "official", file)


def _nearest(folder: Path, key: str, sgd: SGDStage) -> tuple[int, dict[str, Tensor]] | None:
    """Return the latest earlier point of the same run that is at hand: its steps and state."""
    prefix, rest = f"{key[:32]}-sgd", sgd.label.removeprefix(f"sgd{sgd.steps}")
    names = (path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*.safetensors"))
    points = (re.fullmatch(rf"(\d+){re.escape(rest)}-[0-9a-f]{{64}}\.safetensors", name) for name in names)
    for steps in sorted({int(point[1]) for point in points if point and int(point[1]) < sgd.steps}, reverse=True):
        found = _cached(folder, key, str(sgd.model_copy(update={"steps": steps})))
        if found is not None:
            return steps, found.tensors
    return None


def _slug(stage: str) -> str:
    sgd = SGDStage.parse(stage)
    return stage if sgd is None else sgd.label


def _cached(folder: Path, key: str, stage: str) -> Checkpoint | None:
    for path in sorted(folder.glob(f"{key[:32]}-{_slug(stage)}-{'[0-9a-f]' * 64}.safetensors")):
        data = path.read_bytes()
        if path.stem.rpartition("-")[2] == hashlib.sha256(data).hexdigest():
            return _parse(data, "local", path)
    return None


def _store(folder: Path, prefix: str, data: bytes) -> Path | None:
    path = folder / f"{prefix}-{hashlib.sha256(data).hexdigest()}.safetensors"
    try:
        for damaged in set(folder.glob(f"{prefix}-*.safetensors")) - {path}:
            damaged.unlink()
        _write(path, data)
    except OSError:
        return None  # without a cache every process trains again, which is slow and nothing worse
    return path


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        temporary.write(data)
    os.chmod(temporary.name, 0o644)  # a temporary file is its owner's alone; checkpoints are to be shared
    os.replace(temporary.name, path)


def _serialise(tensors: dict[str, Tensor], accuracy: float | None) -> bytes:
    # One metadata key: safetensors does not promise an order of several, and the bytes are hashed.
    metadata = {"leakbench": json.dumps({"accuracy": accuracy})}
    return safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata)


def _parse(data: bytes, origin: str, path: Path | None) -> Checkpoint:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise LeakbenchError(f"{path}: {first_line(error)}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    accuracy: float | None = json.loads(header["__metadata__"]["leakbench"])["accuracy"]
    return Checkpoint(tensors, hashlib.sha256(data).hexdigest(), origin, accuracy, path)


def _unsaved(tensors: dict[str, Tensor], origin: str) -> Checkpoint:
    digest = hashlib.sha256(_serialise(tensors, None)).hexdigest()
    return Checkpoint(tensors, digest, origin, None, None)


def _pretrained(architecture: Architecture, dataset: TrainingData) -> Checkpoint:
    if architecture.name.partition("/")[0] not in ZOOS:
        raise UserError(
            f"stage pretrained needs an architecture of torchvision/NAME or timm/NAME, got {architecture.name!r}; "
            "use stage converged"
        )
    shape, classes = dataset.input_spec.shape, dataset.num_classes
    build_module(architecture, shape, classes)  # what is wrong with the name or a parameter surfaces here
    if architecture.name in _UNREACHABLE:
        raise Unavailable(_UNREACHABLE[architecture.name])
    wanted = architecture.model_copy(update={"params": {**architecture.params, "pretrained": True}})
    try:
        module = build_module(wanted, shape, classes)
    except Exception as error:  # the libraries' downloads raise whatever their HTTP client does
        reason = f"pretrained weights of {architecture.name}: {first_line(error)}"
        if not isinstance(error, UserError):
            _UNREACHABLE[architecture.name] = reason
        raise Unavailable(reason) from error
    named = {f"parameter/{k}": v.detach()[None] for k, v in module.named_parameters()}
    return _unsaved(named | {f"buffer/{k}": v[None] for k, v in module.named_buffers()}, "pretrained")

"""The runner's side of a job: data, victims, models, chance levels and floors. Truth lives here and nowhere else."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from leakbench.data import Dataset, Victims, draw_label_counts, draw_victims, load_dataset
from leakbench.federation.inputs import to_pixels
from leakbench.keys import PUBLIC_KEY, Season, derive, seed
from leakbench.metrics.chance import label_chance
from leakbench.models.functional import Model, build_model
from leakbench.models.stages import checkpoint
from leakbench.runner.wire import Blob
from leakbench.tasks import Task

CHECKPOINTS = 3
"""Checkpoints of a trained stage; trial t of ``model_draws: per_trial`` uses checkpoint t mod 3."""
CHANCE_DRAWS = 10_000

V = TypeVar("V")


@dataclass(frozen=True)
class Weights:
    """The model of a block, as the server holds it.

    Args:
        model: M = 1 or T.
        blob: Its tensors, ready to be sent; shared by all jobs that use it.
        sha256: Sha256 of every draw's weights, length M.
        origin: ``init``, ``official``, ``local`` or ``pretrained``.
        draws: Number of the draw behind each of the M.
    """

    model: Model
    blob: Blob
    sha256: tuple[str, ...]
    origin: str
    draws: tuple[int, ...]

    @property
    def digest(self) -> str:
        """One hash for all M."""
        return hashlib.sha256("".join(self.sha256).encode()).hexdigest()


class Kept:
    """A small cache that computes each value once, however many threads ask, and keeps the last few.

    Args:
        size: Values kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], V]) -> V:
        """Return the value of ``key``, computing it if need be."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            with self._guard:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]  # type: ignore[no-any-return]
            value = compute()
            with self._guard:
                self._values[key] = value
                while len(self._values) > self._size:
                    self._locks.pop(self._values.popitem(last=False)[0], None)
            return value


class Scenes:
    """Draws victims and builds models for jobs, keeping what several jobs share.

    Args:
        season: Whose key the victims, inits and defense noise are drawn with.
    """

    def __init__(self, season: Season) -> None:
        self._season = season
        self._weights = Kept(4)
        self._chances = Kept(256)
        self._means = Kept(16)

    def dataset(self, task: Task) -> Dataset:
        """Return the task's dataset."""
        return load_dataset(task.dataset)

    def victims(self, task: Task, trials: Sequence[int]) -> Victims:
        """Draw the private examples of ``trials``."""
        protocol = task.protocol
        return draw_victims(
            self.dataset(task),
            task.batch,
            clients=protocol.clients,
            local_batches=protocol.local_batches,
            trials=trials,
            key=self._season.key,
        )

    def order(self, task: Task, trials: Sequence[int]) -> Tensor | None:
        """Return (T, K, local_steps, B) example indices for ``batches: epochs``, reshuffled every pass; else None."""
        protocol, batch = task.protocol, task.batch
        if protocol.batches != "epochs":
            return None
        count = protocol.local_batches * batch.size
        passes = protocol.local_steps // protocol.local_batches

        def shuffled(trial: int, client: int, turn: int) -> list[int]:
            stream = derive(self._season.key, "order", batch.content(), count, trial, client, turn)
            return sorted(range(count), key=lambda i: derive(stream, i))

        every = [
            [[shuffled(t, k, turn) for turn in range(passes)] for k in range(protocol.clients)] for t in trials
        ]
        return torch.tensor(every).view(len(trials), protocol.clients, protocol.local_steps, batch.size)

    def seeds(self, purpose: str, trials: Sequence[int], *names: object) -> Tensor:
        """Return (T, 32) uint8 seeds of the defense's noise (secret) or of the attack's draws (public)."""
        key = self._season.key if purpose == "defense" else PUBLIC_KEY
        rows = [list(derive(key, purpose, *names, trial)) for trial in trials]
        return torch.tensor(rows, dtype=torch.uint8).view(len(trials), 32)

    def weights(self, task: Task, model_draws: str, trials: Sequence[int]) -> Weights:
        """Return the model of a block: one draw for all trials, or one each.

        Raises:
            Unavailable: Pretrained weights cannot be had.
        """
        numbers = (0,) if model_draws == "one" else tuple(trials)
        if task.stage != "untrained":
            numbers = tuple(n % CHECKPOINTS for n in numbers)
        data = self.dataset(task)
        # Untrained weights depend on the architecture and the data's shape alone.
        trained = (data.fingerprint, task.normalise) if task.stage != "untrained" else ()
        key = (task.architecture.model_dump_json(), data.input_spec.shape, data.num_classes, task.stage, trained)
        return self._weights.get((key, numbers), lambda: self._build(task, data, numbers))

    def _build(self, task: Task, data: Dataset, numbers: tuple[int, ...]) -> Weights:
        shape, classes, origin = data.input_spec.shape, data.num_classes, "init"
        if task.stage == "untrained":
            content = task.architecture.content()
            seeds = [seed(self._season.key, "init", content, shape, classes, n) for n in numbers]
            model = build_model(task.architecture, shape, classes, seeds=seeds)
        else:
            distinct = {
                n: checkpoint(task.architecture, data, task.stage, n, normalise=task.normalise) for n in set(numbers)
            }
            origin = distinct[numbers[0]].origin
            names = distinct[numbers[0]].tensors
            # stages hand out tensors with a leading 1, as Model.tensors() does for one draw
            state = {name: torch.cat([distinct[n].tensors[name] for n in numbers]) for name in names}
            model = build_model(task.architecture, shape, classes, state=state)
        tensors = model.tensors()
        return Weights(model, Blob.pack(tensors), _hashes(tensors, model.draws), origin, numbers)

    def chance(self, task: Task) -> dict[str, float]:
        """Return the chance level of every label metric for the task's sampler and data."""
        data, protocol = self.dataset(task), task.protocol
        prior = data.class_prior()
        count = task.inputs_per_client

        def compute() -> dict[str, float]:
            draws = draw_label_counts(
                task.batch, prior, local_batches=protocol.local_batches, draws=CHANCE_DRAWS, key=PUBLIC_KEY
            )
            return label_chance(draws, prior, count)

        return self._chances.get((data.fingerprint, task.batch, protocol.local_batches), compute)

    def floors(self, task: Task, trials: Sequence[int]) -> dict[str, Tensor]:
        """Return the images that need no update: uniform noise (T, K * N, *shape) and the mean image (1, 1, *shape)."""
        data = self.dataset(task)
        shape = (task.protocol.clients * task.inputs_per_client, *data.input_spec.shape)
        noise = torch.empty(len(trials), *shape)
        for row, trial in zip(noise, trials, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(seed(PUBLIC_KEY, "floor", shape, trial)))

        def mean() -> Tensor:
            images = data.images[data.rows("auxiliary")]
            average = np.mean(images, axis=0, dtype=np.float64) / 255
            return torch.from_numpy(average).float()[None, None]

        return {"random_image": noise, "mean_image": self._means.get(data.fingerprint, mean)}

    def auxiliary(self, task: Task) -> dict[str, Tensor]:
        """Return the examples the attacker owns: the first ones of the auxiliary split in a fixed public order."""
        data = self.dataset(task)
        rows = data.rows("auxiliary")[: task.threat_model.auxiliary]
        return {"images": torch.from_numpy(data.images[rows]), "labels": torch.from_numpy(data.labels[rows])}


def pixels(inputs: Tensor, task: Task, data: Dataset) -> Tensor:
    """Return inputs as intensities in [0, 1]."""
    return to_pixels(inputs, data.input_spec, task.normalise)


def _hashes(tensors: dict[str, Tensor], draws: int) -> tuple[str, ...]:
    digests = [hashlib.sha256() for _ in range(draws)]
    for name in sorted(tensors):
        for digest, row in zip(digests, tensors[name], strict=True):
            digest.update(f"{name}{row.dtype}{tuple(row.shape)}".encode())
            digest.update(row.contiguous().numpy().tobytes())
    return tuple(digest.hexdigest() for digest in digests)

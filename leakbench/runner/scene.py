"""The runner's side of a job: data, victims, models, chance levels and floors. Truth lives here and nowhere else."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakbench.data import Dataset, Victims, draw_label_counts, draw_task, load_dataset
from leakbench.errors import Unavailable
from leakbench.federation.inputs import to_inputs, to_pixels
from leakbench.keys import PUBLIC_KEY, Season, derive, seed
from leakbench.metrics.chance import CHANCE_DRAWS, label_chance
from leakbench.metrics.identification import GALLERY, Identification
from leakbench.metrics.perceptual import FeatureDistance
from leakbench.models.functional import build_model, flat_state, split_state
from leakbench.models.stages import DRAWS, checkpoint, checkpoint_at_hand
from leakbench.runner.wire import Blob
from leakbench.tasks import Architecture, BatchSpec, Task

V = TypeVar("V")

JUDGES = (
    Architecture(name="resnet20"),
    Architecture(name="convnet"),
    Architecture(name="lenet5"),
    Architecture(name="lenet_zhu", init="uniform(0.5)"),
    Architecture(name="mlp"),
)
"""Nets whose features may judge images, in order of preference."""


@dataclass(frozen=True)
class Judge:
    """A trained net that compares images by its features.

    Args:
        name: Architecture label and sha256 of the weights.
        distance: The measure.
    """

    name: str
    distance: FeatureDistance


@dataclass(frozen=True)
class Weights:
    """The model of a block, as the server holds it.

    Args:
        parameters: (M, *shape) by name, M = 1 or T.
        buffers: (M, *shape) by name.
        head: Name of the last linear layer.
        nonnegative_features: Whether its inputs are never negative; None when unknown.
        sha256: Sha256 of every draw's weights, length M.
        origin: ``init``, ``official``, ``local`` or ``pretrained``.
        draws: Number of the draw behind each of the M.
        inserted: Name of the module that an attack has inserted in front; empty for none.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    head: str
    nonnegative_features: bool | None
    sha256: tuple[str, ...]
    origin: str
    draws: tuple[int, ...]
    inserted: str = ""

    @cached_property
    def blob(self) -> Blob:
        """Its tensors, ready to be sent; shared by all jobs that use it."""
        return Blob.pack(flat_state(self.parameters, self.buffers))

    @property
    def has_head_bias(self) -> bool:
        """Whether the last layer has a bias."""
        return f"{self.head}.bias" in self.parameters

    @property
    def digest(self) -> str:
        """One hash for all M."""
        return hashlib.sha256("".join(self.sha256).encode()).hexdigest()

    def numel(self, names: Iterable[str]) -> int:
        """Return the numbers of one draw's tensors, parameters or buffers, of these names."""
        state = {**self.parameters, **self.buffers}
        return sum(state[name][0].numel() for name in names)


@dataclass(frozen=True)
class Built:
    """Weights that a child built, because a defense changes the architecture.

    Args:
        tensors: State in the form of `leakbench.models.functional.Model.tensors`.
        head: Name of the last linear layer.
    """

    tensors: dict[str, Tensor]
    head: str


Builder = Callable[[dict[str, Any], Mapping[str, Tensor]], Built]
"""Asks a child to build weights: from a recipe (JSON) and training data (tensors)."""


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
        self._victims = Kept(4)
        self._weights = Kept(4)
        self._chances = Kept(256)
        self._means = Kept(16)
        self._judges = Kept(16)

    def dataset(self, task: Task) -> Dataset:
        """Return the task's dataset."""
        return load_dataset(task.dataset)

    def victims(self, task: Task, trials: Sequence[int]) -> Victims:
        """Draw the private examples of ``trials``, or return them as another job has drawn them."""
        data, clients, batches = self.dataset(task), task.protocol.clients, task.protocol.local_batches
        asked = (task.attribute, task.target == "membership")

        def draw() -> Victims:
            return draw_task(data, task, trials=trials, key=self._season.key)

        return self._victims.get((data.fingerprint, task.batch, clients, batches, asked, tuple(trials)), draw)

    def auxiliary_victims(self, task: Task, trials: Sequence[int]) -> Victims:
        """Draw trials of the auxiliary split by the task's own law: public, what an attacker may own."""
        data = self.dataset(task)
        return draw_task(data, task, trials=trials, key=PUBLIC_KEY, split="auxiliary")

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

        every = [[[shuffled(t, k, turn) for turn in range(passes)] for k in range(protocol.clients)] for t in trials]
        return torch.tensor(every).view(len(trials), protocol.clients, protocol.local_steps, batch.size)

    def seeds(self, purpose: str, trials: Sequence[object], *names: object) -> Tensor:
        """Return (T, 32) uint8 seeds of the defense's noise (secret) or of the attack's draws (public).

        Args:
            purpose: ``defense``, ``attack`` or ``prepare``.
            trials: What each row belongs to: trials, or hashes of weights.
            names: What all rows belong to.
        """
        key = self._season.key if purpose == "defense" else PUBLIC_KEY
        rows = [list(derive(key, purpose, *names, trial)) for trial in trials]
        return torch.tensor(rows, dtype=torch.uint8).view(len(trials), 32)

    def weights(
        self, task: Task, model_draws: str, trials: Sequence[int], *, defense: str = "", builder: Builder | None = None
    ) -> Weights:
        """Return the model of a block: one draw for all trials, or one each.

        Args:
            task: The task.
            model_draws: ``one`` or ``per_trial``.
            trials: The block's trials.
            defense: Identity of the defense that changes the architecture; empty where none does.
            builder: Builds the changed architecture; this process never runs a defense.

        Raises:
            Unavailable: Pretrained weights cannot be had.
        """
        numbers = (0,) if model_draws == "one" else tuple(trials)
        if task.stage != "untrained":
            numbers = tuple(n % DRAWS for n in numbers)
        data = self.dataset(task)
        # Untrained weights depend on the architecture and the data's shape alone.
        trained = (data.fingerprint, task.normalise) if task.stage != "untrained" else ()
        key = (task.architecture.model_dump_json(), data.input_spec.shape, data.num_classes, task.stage, trained)
        if builder is not None:
            return self._weights.get((key, numbers, defense), lambda: self._changed(task, data, numbers, builder))
        return self._weights.get((key, numbers), lambda: self._build(task, data, numbers))

    def _init_seeds(self, task: Task, data: Dataset, numbers: tuple[int, ...]) -> list[int]:
        content = (task.architecture.content(), data.input_spec.shape, data.num_classes)
        return [seed(self._season.key, "init", *content, n) for n in numbers]

    def _build(self, task: Task, data: Dataset, numbers: tuple[int, ...]) -> Weights:
        shape, classes, origin, hashes = data.input_spec.shape, data.num_classes, "init", None
        if task.stage == "untrained":
            model = build_model(task.architecture, shape, classes, seeds=self._init_seeds(task, data, numbers))
        else:
            draws = sorted(set(numbers))
            get = partial(checkpoint, task.architecture, data, task.stage, normalise=task.normalise)
            with ThreadPoolExecutor(len(draws)) as pool:  # those that have to be trained are trained side by side
                known = dict(zip(draws, pool.map(get, draws), strict=True))
            state = {name: torch.cat([known[n].tensors[name] for n in numbers]) for name in known[numbers[0]].tensors}
            model = build_model(task.architecture, shape, classes, state=state)
            origin, hashes = known[numbers[0]].origin, tuple(known[n].sha256 for n in numbers)
        hashes = hashes or _hashes(model.tensors(), len(numbers))
        return Weights(model.parameters, model.buffers, model.head, model.nonnegative_features, hashes, origin, numbers)

    def _changed(self, task: Task, data: Dataset, numbers: tuple[int, ...], builder: Builder) -> Weights:
        """Have a child apply a defense's change of the architecture before the stage recipe."""
        if task.stage == "pretrained":
            raise Unavailable("no pretrained weights exist for an architecture that a defense changed")
        recipe: dict[str, Any] = {"seeds": self._init_seeds(task, data, numbers)}
        examples: dict[str, Tensor] = {}
        if task.stage != "untrained":
            recipe = {"stage": task.stage, "draws": numbers, "normalise": task.normalise}
            recipe["fingerprint"] = data.fingerprint
            rows = {name: data.rows(name) for name in ("private", "test")}
            order = np.concatenate(list(rows.values()))
            examples = {"images": torch.tensor(data.images[order]), "labels": torch.tensor(data.labels[order])}
            examples["private"] = torch.arange(len(rows["private"]))
            examples["test"] = torch.arange(len(rows["private"]), len(order))
        built = builder(recipe, examples)
        parts = split_state(built.tensors)
        origin = "init" if task.stage == "untrained" else "local"
        return Weights(*parts, built.head, None, _hashes(built.tensors, len(numbers)), origin, numbers)

    def chance(self, task: Task, *, union: bool) -> dict[str, float]:
        """Return the chance level of every label metric for the task's sampler and data.

        Args:
            task: The task.
            union: Whether the labels of all clients are claimed together, not client by client.
        """
        data, protocol = self.dataset(task), task.protocol
        prior = data.class_prior()
        sizes = Counter(task.batch.of_client(k) for k in range(protocol.clients))

        def draw(batch: BatchSpec, clients: int) -> NDArray[np.int64]:
            batches = protocol.local_batches
            return draw_label_counts(
                batch, prior, clients=clients, local_batches=batches, draws=CHANCE_DRAWS, key=PUBLIC_KEY
            )

        def compute() -> dict[str, float]:
            if union:
                counts = [draw(batch, clients) for batch, clients in sizes.items()]
                return label_chance(np.sum(counts, axis=0), prior, task.total_inputs)
            levels = [label_chance(draw(batch, 1), prior, batch.size * protocol.local_batches) for batch in sizes]
            weights = np.array(list(sizes.values())) / protocol.clients
            return {name: float(weights @ [level[name] for level in levels]) for name in levels[0]}

        clients = protocol.clients
        return self._chances.get((data.fingerprint, task.batch, protocol.local_batches, clients, union), compute)

    def floors(self, task: Task, trials: Sequence[int]) -> dict[str, Tensor]:
        """Return the images that need no update: uniform noise (T, n, *shape) and the mean image (1, 1, *shape)."""
        data = self.dataset(task)
        shape = (task.total_inputs, *data.input_spec.shape)
        noise = torch.empty(len(trials), *shape)
        for row, trial in zip(noise, trials, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(seed(PUBLIC_KEY, "floor", shape, trial)))

        def mean() -> Tensor:
            images = data.images[data.rows("auxiliary")]
            average = np.mean(images, axis=0, dtype=np.float64) / 255
            return torch.from_numpy(average).float()[None, None]

        return {"random_image": noise, "mean_image": self._means.get(data.fingerprint, mean)}

    def identification(self, task: Task, victims: Victims) -> Identification:
        """Return the measure that looks for the victims among the first examples of the private split."""
        data = self.dataset(task)
        rows = data.rows("private")[:GALLERY]
        return Identification(
            data.images[rows], rows, victims.indices.reshape(len(victims.indices), -1)[:, victims.held]
        )

    def judge(self, task: Task) -> Judge | None:
        """Return the first of `JUDGES` of another architecture whose converged weights are at hand; looks once."""
        data = self.dataset(task)

        def find() -> Judge | None:
            for net in (net for net in JUDGES if net.name != task.architecture.name):
                found = checkpoint_at_hand(net, data, "converged", 0, normalise=True)
                if found is not None:
                    model = build_model(net, data.input_spec.shape, data.num_classes, state=found.tensors)
                    return Judge(f"{net.label}:{found.sha256}", FeatureDistance(model, data.input_spec, normalise=True))
            return None

        return self._judges.get((data.fingerprint, task.architecture.name), find)

    def auxiliary(self, task: Task) -> dict[str, Tensor]:
        """Return the examples the attacker owns: the first ones of the auxiliary split in a fixed public order."""
        data = self.dataset(task)
        rows = data.rows("auxiliary")[: task.threat_model.auxiliary]
        owned = {"images": torch.from_numpy(data.images[rows]), "labels": torch.from_numpy(data.labels[rows])}
        if task.attribute is not None:
            owned["attribute"] = torch.from_numpy(data.has(task.attribute)[rows].astype(np.int64))
        return owned


def pixels(inputs: Tensor, task: Task, data: Dataset) -> Tensor:
    """Return inputs as intensities in [0, 1]."""
    return to_pixels(inputs, data.input_spec, task.normalise)


def true_pixels(task: Task, victims: Victims, data: Dataset) -> Tensor:
    """Return the victims as intensities (T, n, *shape), all clients' together, gone the way of what is recovered."""
    inputs = victims.inputs.reshape(len(victims.inputs), -1, *data.input_spec.shape)[:, victims.held]
    return pixels(to_inputs(inputs, data.input_spec, task.normalise), task, data)


def _hashes(tensors: dict[str, Tensor], draws: int) -> tuple[str, ...]:
    digests = [hashlib.sha256() for _ in range(draws)]
    for name in sorted(tensors):
        for digest, row in zip(digests, tensors[name], strict=True):
            digest.update(f"{name}{row.dtype}{tuple(row.shape)}".encode())
            digest.update(row.contiguous().numpy().tobytes())
    return tuple(digest.hexdigest() for digest in digests)

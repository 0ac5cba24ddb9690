"""How trained stages are made: one fixed, seeded training run per draw, with snapshots along the way.

The run: AdamW (learning rate 3e-3, weight decay 1e-2), cross-entropy, batches of 64 drawn without replacement per
epoch from the private split, no augmentation, 20 epochs but at least 1,000 steps. ``early``, ``mid`` and ``converged``
are the weights after 2%, 20% and 100% of the steps. One CPU thread, so that the weights do not depend on the machine's
number of cores.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from leakbench.federation.inputs import to_inputs
from leakbench.keys import PUBLIC_KEY, seed
from leakbench.models.build import Transform, initialised, seeded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from leakbench.tasks import Architecture, InputSpec

RECIPE_VERSION = 1
"""Raised with every change that moves the weights."""
STAGES = {"early": 0.02, "mid": 0.2, "converged": 1.0}
"""Fraction of the steps after which the snapshot is taken."""

_log = logging.getLogger(__name__)
_REPORT_SECONDS = 5.0
_BATCH, _EPOCHS, _LEAST_STEPS = 64, 20, 1000
_RATE, _DECAY = 3e-3, 1e-2


class TrainingData(Protocol):
    """What training needs of a `leakbench.data.Dataset`."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """Values (n, *shape)."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Classes (n,)."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        """Indices of ``private`` (trained on) and ``test``."""

    @property
    def input_spec(self) -> InputSpec:
        """Shape and normalisation."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""


@dataclass(frozen=True)
class Snapshot:
    """A point of the training run.

    Args:
        stage: Its name.
        tensors: State in the form of `leakbench.models.functional.Model.tensors`, M = 1.
        accuracy: Accuracy on the test split.
    """

    stage: str
    tensors: dict[str, Tensor]
    accuracy: float


def init_seed(architecture: Architecture, data: TrainingData, draw: int) -> int:
    """Return the seed of the initialisation that a draw's training run starts from."""
    content = (architecture.content(), data.input_spec.shape, data.num_classes)
    return seed(PUBLIC_KEY, "stage-init", *content, draw)


def train(
    architecture: Architecture,
    data: TrainingData,
    draw: int,
    *,
    normalise: bool,
    last: str = "converged",
    transform: Transform = None,
) -> Iterator[Snapshot]:
    """Train on the private split and yield the snapshots up to ``last``.

    Args:
        architecture: What to train.
        data: What to train on.
        draw: Number of the run; it seeds the initialisation and the batches.
        normalise: Whether inputs are normalised.
        last: Stage to stop at; earlier ones do not depend on it.
        transform: A model-level defense's change of the module, made before training.
    """
    module = initialised(
        architecture, data.input_spec.shape, data.num_classes, init_seed(architecture, data, draw), transform
    )
    run_seed = seed(PUBLIC_KEY, "stage-run", RECIPE_VERSION, architecture.content(), data.fingerprint, normalise, draw)
    rows = torch.tensor(data.splits["private"])
    steps = max(_LEAST_STEPS, _EPOCHS * math.ceil(len(rows) / _BATCH))
    due = {max(1, round(fraction * steps)): stage for stage, fraction in STAGES.items()}
    optimizer = torch.optim.AdamW(module.requires_grad_(True).parameters(), lr=_RATE, weight_decay=_DECAY)
    order = torch.Generator().manual_seed(run_seed)
    batches: list[Tensor] = []
    with seeded(run_seed), _one_thread():
        told = time.monotonic()
        for step in range(1, steps + 1):
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                what = f"training {architecture.label} on {_shape(data)}, run {draw}"
                _log.info("%s: step %d of %d", what, step, steps)
            if not batches:
                shuffled = rows[torch.randperm(len(rows), generator=order)]
                # BatchNorm has no statistics of one example, so a last batch of one is dropped.
                batches = [b for b in torch.split(shuffled, _BATCH) if len(b) > 1 or len(rows) == 1]
            inputs, labels = _examples(data, batches.pop(), normalise)
            optimizer.zero_grad()
            cross_entropy(module.train()(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step in due:
                yield Snapshot(due[step], _tensors(module), _accuracy(module, data, normalise))
                if due[step] == last:
                    return


def _shape(data: TrainingData) -> str:
    shape = "x".join(map(str, data.input_spec.shape))
    return f"{len(data.splits['private'])} images of {shape}"


def _examples(data: TrainingData, rows: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    images = to_inputs(data.images[rows.numpy()], data.input_spec, normalise)
    return images, torch.tensor(data.labels[rows.numpy()])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = {f"parameter/{k}": v.detach()[None].clone() for k, v in module.named_parameters()}
    return named | {f"buffer/{k}": v[None].clone() for k, v in module.named_buffers()}


@torch.no_grad()
def _accuracy(module: nn.Module, data: TrainingData, normalise: bool) -> float:
    hits = 0
    rows = torch.tensor(data.splits["test"])
    for part in torch.split(rows, 256):
        inputs, labels = _examples(data, part, normalise)
        hits += int((module.eval()(inputs).argmax(1) == labels).sum())
    return hits / max(1, len(rows))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""How trained stages are made: one fixed, seeded training run per draw, with snapshots along the way.

The run: AdamW (learning rate 3e-3, weight decay 1e-2), cross-entropy, batches of 64 drawn without replacement per
epoch from the private split, no augmentation, 20 epochs but at least 1,000 steps. ``early``, ``mid`` and ``converged``
are the weights after 2%, 20% and 100% of the steps. A stage ``sgd(...)`` is a run of its own, of SGD
(`leakbench.tasks.SGDStage`). One CPU thread, so that the weights do not depend on the machine's
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
from torch.optim.lr_scheduler import MultiStepLR

from leakbench.federation.inputs import to_inputs
from leakbench.keys import PUBLIC_KEY, seed
from leakbench.models.build import Transform, initialised, seeded
from leakbench.models.catalogue import ZOOS
from leakbench.models.small import Classifier
from leakbench.stage import SGDStage

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from leakbench.tasks import Architecture, InputSpec

RECIPE_VERSION = 1
"""Raised with every change that moves the weights."""
POINTS = {"early": 0.02, "mid": 0.2, "converged": 1.0}
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
    start: tuple[int, dict[str, Tensor]] | None = None,
) -> Iterator[Snapshot]:
    """Train on the private split and yield the snapshots up to ``last``.

    Args:
        architecture: What to train.
        data: What to train on.
        draw: Number of the run; it seeds the initialisation and the batches.
        normalise: Whether inputs are normalised.
        last: Stage to stop at; earlier ones do not depend on it. Of a run of SGD it is the only one.
        transform: A model-level defense's change of the module, made before training.
        start: Steps done and the state they led to (`Snapshot.tensors`), to go on from; only where the state of the
            optimizer is the weights alone (`resumable`).
    """
    module = initialised(
        architecture, data.input_spec.shape, data.num_classes, init_seed(architecture, data, draw), transform
    ).requires_grad_(True)
    done = 0
    if start is not None:
        done, tensors = start
        module.load_state_dict({name.partition("/")[2]: value[0] for name, value in tensors.items()})
    rows = torch.tensor(data.splits["private"])
    run = _run(module, SGDStage.parse(last), len(rows), last)
    content = ["stage-run", RECIPE_VERSION, architecture.content(), data.fingerprint, normalise, draw, *run.seeded_by]
    run_seed = seed(PUBLIC_KEY, *content)
    order = torch.Generator().manual_seed(run_seed)
    crops = torch.Generator().manual_seed(run_seed)
    batches: list[Tensor] = []
    # Our own nets draw nothing while they train. Holding the global generator would keep other threads from training.
    own = isinstance(module, Classifier) and transform is None
    with contextlib.nullcontext() if own else seeded(run_seed), _one_thread():
        told = time.monotonic()
        for step in range(1, run.steps + 1):
            if not batches:
                shuffled = rows[torch.randperm(len(rows), generator=order)]
                batches = [b for b in torch.split(shuffled, run.batch) if len(b) >= min(run.least, len(rows))]
            batch = batches.pop()
            if step <= done:
                continue
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                what = f"training {architecture.label} on {_shape(data)}, run {draw}"
                _log.info("%s: step %d of %d", what, step, run.steps)
            inputs, labels = _examples(data, batch, normalise, crops if run.augment else None)
            run.optimizer.zero_grad()
            cross_entropy(module.train()(inputs), labels).backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()
            run.schedule.step()
            if step in run.due:
                yield Snapshot(run.due[step], _tensors(module), _accuracy(module, data, normalise))
                if run.due[step] == last:
                    return


def resumable(architecture: Architecture, sgd: SGDStage) -> bool:
    """Whether a run can go on from one of its points: the state is the weights alone, and nothing else is drawn."""
    foreign = architecture.name.partition("/")[0] in ZOOS  # may hold Dropout
    return not (foreign or sgd.momentum or sgd.drops or sgd.augment)


@dataclass(frozen=True)
class _Run:
    """How to train: batches smaller than ``least`` are left out; ``due`` names the step of every snapshot."""

    steps: int
    batch: int
    least: int
    due: dict[int, str]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    augment: bool = False
    seeded_by: tuple[object, ...] = ()


def _run(module: nn.Module, sgd: SGDStage | None, examples: int, last: str) -> _Run:
    optimizer: torch.optim.Optimizer
    if sgd is None:
        steps = max(_LEAST_STEPS, _EPOCHS * math.ceil(examples / _BATCH))
        due = {max(1, round(fraction * steps)): stage for stage, fraction in POINTS.items()}
        optimizer = torch.optim.AdamW(module.parameters(), lr=_RATE, weight_decay=_DECAY)
        # BatchNorm has no statistics of one example.
        return _Run(steps, _BATCH, 2, due, optimizer, MultiStepLR(optimizer, []))
    optimizer = torch.optim.SGD(
        module.parameters(), lr=sgd.lr, momentum=sgd.momentum, nesterov=sgd.momentum > 0, weight_decay=sgd.weight_decay
    )
    drops = [int(sgd.steps * eighths / 8) for eighths in (3, 5, 7)] if sgd.drops else []
    batch = min(sgd.batch_size, examples)
    return _Run(
        sgd.steps,
        batch,
        batch,
        {sgd.steps: last},
        optimizer,
        MultiStepLR(optimizer, drops),
        sgd.augment,
        ("sgd", batch),
    )


def _shape(data: TrainingData) -> str:
    shape = "x".join(map(str, data.input_spec.shape))
    return f"{len(data.splits['private'])} images of {shape}"


def _examples(
    data: TrainingData, rows: Tensor, normalise: bool, crops: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    images = data.images[rows.numpy()]
    if crops is not None:
        images = _shifted_and_flipped(images, crops)
    return to_inputs(images, data.input_spec, normalise), torch.tensor(data.labels[rows.numpy()])


def _shifted_and_flipped(images: NDArray[np.uint8], stream: torch.Generator) -> NDArray[np.uint8]:
    """Pad images (B, C, H, W) by 4 zeros, crop them back at random, and flip every second one, on average."""
    padded = torch.nn.functional.pad(torch.tensor(images), (4, 4, 4, 4))
    (count, _, height, width), each = images.shape, torch.arange(len(images))
    top, left = torch.randint(9, (2, count, 1), generator=stream)
    flipped = torch.rand(count, 1, generator=stream) < 0.5
    columns = left + torch.where(flipped, torch.arange(width).flip(0), torch.arange(width))
    rows = (top + torch.arange(height))[:, :, None]
    cropped = padded[each[:, None, None], :, rows, columns[:, None, :]].permute(0, 3, 1, 2)
    return cropped.contiguous().numpy()


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

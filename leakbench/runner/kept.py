"""Updates that a federated training kept, as a job attacks them: the clients behind them are not asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leakbench.data import Dataset, Victims
from leakbench.errors import InvalidOutput, UserError
from leakbench.models.catalogue import nonnegative_features
from leakbench.models.functional import split_state
from leakbench.runner.plan import Job
from leakbench.runner.scene import Weights
from leakbench.utility.kept import Kept, read_file

ORIGIN = "training"
"""Origin of the weights that a training had when an update was kept; see the column ``checkpoint_origin``."""


@dataclass(frozen=True)
class Block:
    """The kept updates of one job, each of them a trial.

    Args:
        victims: The examples behind them, K = 1.
        weights: The models that the clients got, M = T.
        order: (T, 1, local_steps, B) indices of every local step's batch; None where they are the batches in order.
        update: (T, *shape) by name.
    """

    victims: Victims
    weights: Weights
    order: Tensor | None
    update: dict[str, Tensor]


def load_block(job: Job, data: Dataset) -> Block:
    """Read the kept updates of a job.

    Args:
        job: Of stage ``in_training``.
        data: Its task's dataset.

    Raises:
        UserError: A file is damaged, or another one than was planned; or the dataset is.
        InvalidOutput: Updates of one training differ in shape.
    """
    kept = []
    for file in job.kept:
        if not file.path.is_file() or hashlib.sha256(file.path.read_bytes()).hexdigest() != file.sha256:
            raise UserError(f"{file.path}: changed since the run was planned; start it again")
        kept.append(read_file(file.path))
    own = kept[0]
    if any(each.fingerprint != data.fingerprint for each in kept):
        raise UserError(
            f"dataset {data.spec.name}: is another one than the training had (fingerprint {own.fingerprint[:12]}, here "
            f"{data.fingerprint[:12]}); set LEAKBENCH_DATA as it was, or run leakbench utility again"
        )
    indices = np.stack([each.indices.numpy() for each in kept])[:, None]
    labels = np.stack([each.labels.numpy() for each in kept])[:, None]
    known = nonnegative_features(job.task.architecture)
    return Block(
        victims=Victims(indices=indices, inputs=data.images[indices], labels=labels),
        weights=Weights(
            *split_state(_stacked([each.model for each in kept])),
            head=own.head,
            nonnegative_features=None if any("model" in part.description.acts_on for part in job.defense) else known,
            sha256=tuple(each.model_sha256 for each in kept),
            origin=ORIGIN,
            draws=tuple(job.trials),
        ),
        order=_orders(kept),
        update=_stacked([each.update for each in kept]),
    )


def _orders(kept: Sequence[Kept]) -> Tensor | None:
    orders = [each.order for each in kept if each.order is not None]
    return torch.stack(orders)[:, None] if orders else None


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return states (1, *shape) by name as one (T, *shape)."""
    try:
        return {name: torch.cat([state[name] for state in states]) for name in states[0]}
    except (KeyError, RuntimeError) as error:
        raise InvalidOutput(f"client: kept updates of one training differ: {error}") from None

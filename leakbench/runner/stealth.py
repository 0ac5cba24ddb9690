"""What clients could have noticed of a planted model; computed by the process that holds the truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leakbench.data import Dataset, Victims
from leakbench.federation.inputs import to_inputs
from leakbench.federation.planting import Planted
from leakbench.metrics import METRICS
from leakbench.metrics.stealth import findings
from leakbench.models.functional import Model
from leakbench.tasks import Task

CLIENTS = 4
"""Clients of a cohort that are looked at, evenly spread: each costs two backward passes per trial and example."""


def stealth_columns(
    task: Task, model: Model, victims: Victims, data: Dataset, planted: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Return the row columns about what was planted: a value for all trials, or (T,) float64.

    Every metric of stealth is the worst, the most visible one, over the rounds and over `CLIENTS` clients, each from
    what that client has: the model it got, the one before, its first batch. ``*_honest`` is the same for the honest
    model on the same batches.

    Args:
        task: The task.
        model: The honest model with what was inserted in front of it, M = 1 or T.
        victims: The private examples.
        data: Their dataset.
        planted: What was replaced, per round; see `leakbench.Attack.plant`.
    """
    clients, protocol = task.protocol.clients, task.protocol
    rounds = [Planted(model, tensors, clients) for tensors in planted]
    dtype = getattr(torch, protocol.precision)
    worst: dict[str, Tensor] = {}
    for k in sorted({round(i * (clients - 1) / max(1, CLIENTS - 1)) for i in range(CLIENTS)}):
        first = task.batch.of_client(k).size
        inputs = to_inputs(victims.inputs[:, k, :first], data.input_spec, task.normalise).to(dtype)
        labels = torch.tensor(victims.labels[:, k, :first])

        def look(got: Model, before: Model, digests: Sequence[str], suffix: str) -> None:
            found = findings(
                got,
                before,
                inputs,  # noqa: B023  (called within the iteration)
                labels,  # noqa: B023
                digests=digests,
                batch_norm=protocol.batch_norm,
                reduction=protocol.reduction,
            )
            for name, values in found.items():
                worse = torch.minimum if METRICS[name].higher_is_better else torch.maximum
                key = name + suffix
                worst[key] = worse(worst[key], values) if key in worst else values

        look(model, model, ("",) * clients, "_honest")
        before = model
        for planted_round in rounds:
            got = planted_round.model_of(k)
            look(got, before, planted_round.digests, "")
            before = got
    return _changes(rounds) | worst


def _changes(rounds: Sequence[Planted]) -> dict[str, Any]:
    """Return which share of the parameters was ever replaced, and in which tensors."""
    shares: dict[str, float] = {}
    for planted in rounds:
        for name, share in planted.changed().items():
            shares[name] = max(share, shares.get(name, 0.0))
    sizes = {name: value[0].numel() for name, value in rounds[0].honest.parameters.items()}
    replaced = sum(share * sizes[name] for name, share in shares.items())
    return {
        "planted_share": replaced / sum(sizes.values()),
        "planted_tensors": json.dumps(sorted(name for name, share in shares.items() if share)),
    }

"""What was planted, and what clients could have noticed of it; computed by the process that holds the truth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leakbench.data import Dataset, Victims
from leakbench.federation.inputs import to_inputs
from leakbench.federation.planting import Planted, changed
from leakbench.metrics import METRICS
from leakbench.metrics.stealth import findings
from leakbench.models.functional import Model
from leakbench.tasks import Task

_log = logging.getLogger(__name__)

CLIENTS = 4
"""Clients of a cohort that are looked at: each costs two gradients per trial and example, and round."""

Keep = Callable[[int, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Returns what was found for a client of the honest model, from memory where it is known."""


def changes(parameters: Mapping[str, Tensor], planted: Sequence[Mapping[str, Tensor]], clients: int) -> dict[str, Any]:
    """Return the row columns about which share of the parameters was ever replaced, and in which tensors.

    Args:
        parameters: The honest model's, (M, *shape) by name.
        planted: What was replaced, per round; see `leakbench.Attack.plant`.
        clients: K.
    """
    shares: dict[str, float] = {}
    for tensors in planted:
        for name, share in changed(parameters, tensors, clients).items():
            shares[name] = max(share, shares.get(name, 0.0))
    sizes = {name: value[0].numel() for name, value in parameters.items()}
    return {
        "planted_share": sum(share * sizes[name] for name, share in shares.items()) / sum(sizes.values()),
        "planted_tensors": json.dumps(sorted(name for name, share in shares.items() if share)),
    }


def stealth(
    task: Task, model: Model, victims: Victims, data: Dataset, planted: Sequence[Mapping[str, Tensor]], keep: Keep
) -> dict[str, Tensor]:
    """Return the metrics of stealth, (T,) float64 each, and of the honest model on the same batches (``*_honest``).

    Each is the worst, the most visible one, over the rounds and over `CLIENTS` clients, every one from what it has:
    the model it got, the one before, its first batch. Clients of different models come first. A client whose net cannot
    run on its batch (BatchNorm of a single value) is left out.

    Args:
        task: The task.
        model: The honest model with what was inserted in front of it, M = 1 or T.
        victims: The private examples.
        data: Their dataset.
        planted: What was replaced, per round; see `leakbench.Attack.plant`.
        keep: Remembers what was found of the honest model.
    """
    protocol = task.protocol
    rounds = [Planted(model, tensors, protocol.clients) for tensors in planted]
    dtype = getattr(torch, protocol.precision)
    worst: dict[str, Tensor] = {}

    def look_of(k: int) -> Callable[..., dict[str, Tensor]]:
        first = task.batch.of_client(k).size
        return partial(
            findings,
            inputs=to_inputs(victims.inputs[:, k, :first], data.input_spec, task.normalise).to(dtype),
            labels=torch.tensor(victims.labels[:, k, :first]),
            batch_norm=protocol.batch_norm,
            reduction=protocol.reduction,
        )

    def note(found: Mapping[str, Tensor], suffix: str = "") -> None:
        for name, values in found.items():
            worse = torch.minimum if METRICS[name].higher_is_better else torch.maximum
            key = name + suffix
            worst[key] = worse(worst[key], values) if key in worst else values

    for k in _clients(rounds, protocol.clients):
        try:
            look = look_of(k)
            honest = keep(k, lambda: look(model, model, digests=("",) * protocol.clients))  # noqa: B023  (at once)
            note(honest, "_honest")
            previous = model
            before: Mapping[str, Tensor] | None = honest
            for each in rounds:
                got = each.model_of(k)
                note(look(got, previous, digests=each.digests, before=before))
                previous, before = got, None
        except (ValueError, RuntimeError, MemoryError) as error:  # rows matter more
            _log.warning("stealth: client %d: %s", k, error)
    return worst


def _clients(rounds: Sequence[Planted], clients: int) -> list[int]:
    """Return `CLIENTS` clients: of every set of models one, then others, both spread over the cohort."""
    got = [tuple(planted.digests[k] for planted in rounds) for k in range(clients)]
    different = sorted({models: k for k, models in reversed(list(enumerate(got)))}.values())
    others = [k for k in range(clients) if k not in different]
    picked = _spread(different, CLIENTS)
    return sorted(picked + _spread(others, CLIENTS - len(picked)))


def _spread(values: Sequence[int], count: int) -> list[int]:
    count = min(count, len(values))
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]

"""What an attack child is handed: exactly what the threat model grants, and what of the update it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from leakbench.data import Dataset
from leakbench.entries import EntrySpec
from leakbench.models.functional import flat_state
from leakbench.runner.scene import Weights
from leakbench.tasks import Protocol, Task


def granted_names(task: Task, weights: Weights, defense: Sequence[EntrySpec]) -> frozenset[str]:
    """Return everything an attack's ``needs`` may count on: the grants, and the facts of the task and its defense."""
    merged = math.ceil(task.batch.size / math.prod(part.description.merges for part in defense))
    facts = {
        "head_bias": weights.has_head_bias,
        "nonnegative_features": weights.nonnegative_features is True,
        "four_classes": weights.parameters[f"{weights.head}.weight"].shape[1] >= 4,
        "single_example": merged * task.protocol.local_batches * task.protocol.clients == 1,
    }
    return task.threat_model.granted() | {name for name, true in facts.items() if true}


def read_names(reads: Sequence[str], weights: Weights, protocol: Protocol, target: str) -> list[str]:
    """Return the update tensors that patterns name; see `leakbench.attack.Attack.reads`."""
    led = [pattern.rpartition(":") for pattern in reads]
    wanted = [pattern for lead, _, pattern in led if lead in ("", target)]
    patterns = [
        pattern.replace("head.", f"{weights.head}.", 1) if pattern in ("head.weight", "head.bias") else pattern
        for pattern in wanted
    ]
    names = [*weights.parameters, *(weights.buffers if protocol.send_buffers else ())]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def granted_facts(
    task: Task, data: Dataset, *, wall_seconds: float | None, model_evaluations: int | None
) -> dict[str, Any]:
    """Return the JSON of `leakbench.facts.Facts`, with everything withheld left out."""
    threat, protocol = task.threat_model, task.protocol
    withheld: dict[str, Any] = {}
    mean = task.total_inputs / protocol.clients
    if not threat.lr:
        withheld |= {"lr": Protocol().lr, "momentum": 0.0, "weight_decay": 0.0}
    if not threat.local_steps:
        withheld |= {"local_steps": 1, "batches": "same", "batches_per_epoch": 1}
    return {
        "granted": sorted(threat.granted()),
        "protocol": protocol.model_copy(update=withheld).model_dump_json(),
        "input_spec": data.input_spec.model_dump_json(),
        "normalised": task.normalise,
        "num_classes": data.num_classes,
        "clients": protocol.clients,
        "batch_size": math.ceil(mean / protocol.local_batches) if threat.batch_size else None,
        "inputs_per_client": math.ceil(mean) if threat.batch_size else None,
        "client_sizes": task.client_sizes if threat.batch_size else None,
        "local_batches": protocol.local_batches if threat.batch_size else None,
        "class_prior": data.class_prior().tolist() if threat.label_prior else None,
        "wall_seconds": wall_seconds,
        "model_evaluations": model_evaluations,
        "target": task.target,
        "attribute": None if task.attribute is None else task.attribute.model_dump_json(),
    }


def granted_state(task: Task, weights: Weights) -> dict[str, Tensor]:
    """Return the model's tensors that may be known: without running statistics where those are withheld."""
    tensors = flat_state(weights.parameters, weights.buffers)
    if task.threat_model.bn_statistics == "none":
        for name in tensors:
            if name.endswith("running_mean"):
                tensors[name] = torch.zeros_like(tensors[name])
            elif name.endswith("running_var"):
                tensors[name] = torch.ones_like(tensors[name])
    return tensors

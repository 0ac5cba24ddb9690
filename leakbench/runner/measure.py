"""One job of `leakbench measure`, from victims to rows: the parent's half, which holds seeds, truth and clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leakbench.data import Victims, decoder_versions
from leakbench.errors import InvalidOutput, LeakbenchError, NotApplicable
from leakbench.measures.catalogue import MEASURES, MeasureSpec, Quantity
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.measures.subject import ALL
from leakbench.results import MEASURES_FOLDER, blank_row, write_job
from leakbench.runner.children import one_line
from leakbench.runner.exchange import CLIENT_SECONDS_PER_TRIAL, GRACE_SECONDS, client_request
from leakbench.runner.execute import JobOutcome, Runner, failures
from leakbench.runner.gauge import ENDS
from leakbench.runner.plan import Job
from leakbench.runner.rows import entry_columns, job_columns
from leakbench.runner.scene import Weights
from leakbench.runner.wire import Blob
from leakbench.runner.workshop import SLACK_BYTES, ask

SECONDS, SECONDS_PER_TRIAL = 3600.0, 120.0
"""Time limit of a measure: trusted, and it may train. A defense that hangs does so before, in a rehearsal."""


@dataclass
class Measured:
    """What a job came to.

    Args:
        status: ``ok`` or why not.
        error: One line where not ok.
        layers: Number of parameters and kind of each layer, from input to output, and of `ALL`.
        quantities: By quantity: ``layers`` and ``n``.
        tensors: By ``quantity/values``, ``/low``, ``/high``.
        seconds: Wall time of the measure.
        peak_memory: Of its process, bytes.
        isolation: What confined it.
    """

    status: str = "ok"
    error: str | None = None
    layers: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    quantities: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    isolation: dict[str, Any] = field(default_factory=dict)

    def fail(self, status: str, error: str) -> None:
        """Note why there is nothing."""
        self.status, self.error, self.quantities = status, one_line(error), {}


class MeasureRunner(Runner):
    """Executes jobs whose ``attack`` is a measure; see `Runner`."""

    def run(self, job: Job) -> JobOutcome:
        """Execute a job and write its rows.

        Raises:
            UserError: The rows cannot be written.
            LeakbenchError: The runner was closed meanwhile; the job has no rows.
        """
        begun = time.perf_counter()
        torch.set_num_threads(job.threads)
        found, weights = Measured(), None
        with failures(found) as printed:
            victims = self._shop.scenes.victims(job.task, job.trials)
            weights = self._shop.weights(job)
            self._measure(job, victims, weights, found)
        if self._shop.closed:
            raise LeakbenchError(f"{job.label}: the runner was closed before the job was done")
        rows = self._rows(job, found, weights)
        statuses = {found.status: len(job.trials)}
        folder = self._out / MEASURES_FOLDER
        path = write_job(folder, job.id, self._season.name, rows, MEASURE_FIELDS, statuses=statuses)
        return JobOutcome(job, path, statuses, time.perf_counter() - begun, found.error, "".join(printed))

    def _check_memory(self, job: Job, weights: Weights) -> None:
        """Refuse nothing: no update leaves the child, and measures cut their work to fit."""

    def _measure(self, job: Job, victims: Victims, weights: Weights, found: Measured) -> None:
        task, spec, scenes = job.task, MEASURES.get(job.attack.name), self._shop.scenes
        if "attribute" in spec.needs and task.attribute is None:
            raise NotApplicable("needs a task that asks for an attribute; write target: attribute in the suite")
        if "shared_model" in spec.needs and len(weights.draws) > 1:
            raise NotApplicable("compares trials, which must share a model; write model_draws: one in the suite")
        body, blobs = client_request(self._shop, job, weights, victims, scenes.order(task, job.trials))
        body["measure"] = spec.name
        body["attribute"] = None if task.attribute is None else task.attribute.model_dump_json()
        if victims.truth is not None:
            blobs["truth"] = Blob.pack({"truth": torch.tensor(victims.truth)})
        if train := job.attack.params.get("train"):
            blobs["auxiliary"] = Blob.pack(self._auxiliary(job, int(train)))
        most = 24 * (len(weights.parameters) + 1) * len(job.trials) * len(spec.quantities) + SLACK_BYTES
        with self._shop.spawn(job, most) as child:
            report = partial(self._report, job)
            begun = time.perf_counter()
            ask(child, "gauge", body, blobs, expect="ready", seconds=GRACE_SECONDS, who="client")
            seconds = CLIENT_SECONDS_PER_TRIAL * task.protocol.clients * task.protocol.local_steps + GRACE_SECONDS
            ask(child, "rehearse", {}, {}, expect="ready", seconds=seconds, who="client")
            message = ask(
                child,
                "measure",
                {"params": dict(job.attack.params)},
                {},
                expect="measured",
                seconds=SECONDS + SECONDS_PER_TRIAL * len(job.trials),
                limit=most,
                who="measure",
                on_progress=report,
            )
            found.seconds, found.isolation = time.perf_counter() - begun, child.detail
            if declined := message.body.get("declined"):
                raise NotApplicable(str(declined))
            found.layers, found.quantities = message.body["layers"], message.body["quantities"]
            found.tensors = message.tensors("measured")
            _check(found, spec, len(job.trials))
            child.close()
            found.peak_memory = child.peak_memory

    def _auxiliary(self, job: Job, trials: int) -> dict[str, Tensor]:
        """Draw trials of the auxiliary split by the task's own law: they are public, as what an attacker owns."""
        scenes, numbers = self._shop.scenes, list(range(trials))
        drawn = scenes.auxiliary_victims(job.task, numbers)
        tensors = {
            "images": torch.tensor(drawn.inputs),
            "labels": torch.tensor(drawn.labels),
            "seeds": scenes.seeds("measure", numbers, job.attack.name),
        }
        return tensors if drawn.truth is None else tensors | {"truth": torch.tensor(drawn.truth)}

    def _rows(self, job: Job, found: Measured, weights: Weights | None) -> list[dict[str, Any]]:
        """Return a row per trial, layer and quantity (of fitted ones no trials); a single one where there is none."""
        fixed = {
            **blank_row(MEASURE_FIELDS),
            **job_columns(job, self._columns(found.isolation)),
            **entry_columns("measure", (job.attack,)),
            "status": found.status,
            "error": found.error,
            "wall_seconds": found.seconds,
            "peak_memory_bytes": found.peak_memory,
        }
        if weights is not None:
            data = self._shop.scenes.dataset(job.task)
            fixed |= {"dataset_fingerprint": data.fingerprint, "decoder": decoder_versions()}
            fixed |= {"num_classes": data.num_classes, "checkpoint_origin": weights.origin}
            if len(weights.sha256) == 1:
                fixed["checkpoint_sha256"] = weights.sha256[0]
        fixed = {field.name: fixed[field.name] for field in MEASURE_FIELDS}
        rows = [
            fixed | of_layer | of_trial
            for quantity in MEASURES.get(job.attack.name).quantities
            if quantity.name in found.quantities
            for of_layer, values in _by_layer(found, quantity)
            for of_trial in _by_trial(values, job, weights)
        ]
        return rows or [fixed]


def _by_layer(found: Measured, quantity: Quantity) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield the columns of each layer and its values, (T,), or () of a fitted quantity."""
    own = found.quantities[quantity.name]
    every = found.tensors[f"{quantity.name}/values"]
    bounds = {end: found.tensors.get(f"{quantity.name}/{end}") for end in ("low", "high")}
    depths = {layer: depth for depth, layer in enumerate(found.layers)}
    for i, layer in enumerate(own["layers"]):
        columns = {
            "quantity": quantity.name,
            "kind": quantity.kind,
            "unit": quantity.unit,
            "layer": layer,
            "depth": None if layer == ALL else depths[layer],
            "layer_kind": found.layers[layer][1],
            "layer_parameters": found.layers[layer][0],
            "n": own["n"],
        }
        ends = {end: float(tensor[i]) for end, tensor in bounds.items() if tensor is not None}
        yield columns | ends, every[..., i]


def _by_trial(values: Tensor, job: Job, weights: Weights | None) -> Iterator[dict[str, Any]]:
    if values.dim() == 0:
        yield {"value": float(values)}
        return
    for t, (trial, value) in enumerate(zip(job.trials, values.tolist(), strict=True)):
        model = {} if weights is None else {"checkpoint_sha256": weights.sha256[t % len(weights.sha256)]}
        draw = {} if weights is None else {"draw": weights.draws[t % len(weights.draws)]}
        yield {"trial": trial, "value": value, **model, **draw}


def _check(found: Measured, spec: MeasureSpec, trials: int) -> None:
    """Check what came back; the defense ran in the same process.

    Raises:
        InvalidOutput: It is not what the measure declares.
    """
    declared = {quantity.name for quantity in spec.quantities}
    if set(found.quantities) != declared:
        raise InvalidOutput(f"gave {sorted(found.quantities)}, declares {sorted(declared)}")
    for name, own in found.quantities.items():
        shapes = {end: tuple(t.shape) for end in ENDS if (t := found.tensors.get(f"{name}/{end}")) is not None}
        layers = len(own["layers"])
        fitted = own["n"] is not None
        expected = dict.fromkeys(shapes, (layers,) if fitted else (trials, layers))
        known = set(own["layers"]) <= set(found.layers)
        if "values" not in shapes or shapes != expected or not known or (not fitted and len(shapes) > 1):
            raise InvalidOutput(f"{name}: expected {expected or (trials, layers)} of known layers, got {shapes}")
        for end in shapes:
            if not bool(torch.isfinite(found.tensors[f"{name}/{end}"]).all()):
                raise InvalidOutput(f"{name}: holds NaN or infinity")

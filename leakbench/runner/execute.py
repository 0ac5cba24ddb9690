"""One job from victims to rows. This is the parent of DESIGN.md 2.1: it holds truth, seeds, scoring and the clock."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from leakbench.attack import RecoveryShape
from leakbench.data import Victims
from leakbench.entries import EntrySpec
from leakbench.errors import InvalidOutput, UserError
from leakbench.federation.statistics import is_running_statistic
from leakbench.keys import Season
from leakbench.models.stages import Unavailable
from leakbench.provenance import provenance
from leakbench.results import prepare_out, write_job
from leakbench.runner.artefacts import Artefact, Artefacts
from leakbench.runner.child import STATISTICS
from leakbench.runner.children import Child, ChildFailed
from leakbench.runner.grant import granted_facts, granted_names, granted_state, read_names
from leakbench.runner.isolate import ChildServer, choose_level
from leakbench.runner.plan import Job
from leakbench.runner.rows import Outcome, job_rows
from leakbench.runner.scene import Built, Kept, Scenes, Weights
from leakbench.runner.wire import Blob, Message
from leakbench.tasks import Task, content_hash

Progress = Callable[[Job, dict[str, Any]], None]

GRACE_SECONDS = 30.0
"""Added to every time limit: starting the child and importing the entry are not the entry's fault."""
CLIENT_SECONDS_PER_TRIAL = 10.0
"""Time limit of a client; missing it is the defense's failure."""
SLACK_BYTES = 1 << 20
BUILD_SECONDS = 3600.0
"""Time limit of building a changed architecture, training included."""
BUILD_BYTES = 4 << 30
PREPARED_BYTES = 1 << 30
"""Most bytes of what `Attack.prepare` returns."""
MEMORY_SHARE = 0.8
"""Share of the machine's memory that all workers together may use."""


@dataclass(frozen=True)
class JobOutcome:
    """What became of a job.

    Args:
        job: The job.
        path: Its Parquet file.
        statuses: Rows by status.
        seconds: Wall time of the whole job.
        error: One line where rows failed.
        output: What the entries printed, untrusted text.
    """

    job: Job
    path: Path
    statuses: dict[str, int]
    seconds: float
    error: str | None = None
    output: str = ""


@dataclass
class _Run:
    """What is known of a job while it runs."""

    job: Job
    weights: Weights
    victims: Victims
    stack: ExitStack
    outcome: Outcome
    on_progress: Callable[[dict[str, Any]], None]
    order: Tensor | None = None
    output: str = ""
    names: list[str] = field(default_factory=list)


class Runner:
    """Executes jobs on this machine. A context manager; `run` may be called from several threads.

    Args:
        out: Output directory.
        isolation: ``auto``, ``none``, ``process`` or ``bwrap``.
        device: ``cpu`` or a CUDA device such as ``cuda:0``; children compute there.
        workers: Jobs that will run at once; each gets an equal share of the memory.
        season: Key of the victims.
        files: Entry files and packages that children may read besides the installed ones.
        local: Instances by entry name, for entries without a file (isolation ``none`` only).
        on_progress: Receives an attack's progress reports.

    Raises:
        UserError: The directory cannot be written, the isolation or the device cannot be had.
    """

    def __init__(
        self,
        out: Path,
        *,
        season: Season,
        isolation: str = "auto",
        device: str = "cpu",
        workers: int = 1,
        files: Iterable[Path] = (),
        local: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        prepare_out(out)
        self.level = choose_level(isolation)
        self._device = _checked_device(device)
        self._out = out
        self._season = season
        self._files = sorted({path.resolve() for path in files})
        self._local = dict(local or {})
        self._on_progress = on_progress
        self._memory = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / workers)
        self._server_lock = threading.Lock()
        self._server = self._new_server()
        self._scenes = Scenes(season)
        self._artefacts = Artefacts(out / "artefacts")
        self._granted = Kept(4)
        self._provenance = provenance(device)

    def _new_server(self) -> ChildServer:
        return ChildServer(self.level, files=self._files, device=self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    # --- before anything runs -------------------------------------------------------------------------------------

    def preflight(self, jobs: Iterable[Job]) -> None:
        """Find what would stop the jobs before any of them runs.

        Raises:
            UserError: A dataset cannot be read, a batch is larger than its split, a net cannot take its inputs, or a
                block would not fit into the memory.
        """
        seen: set[tuple[str, int]] = set()
        for job in jobs:
            size = job.stop - job.start
            if (job.task.hash, size) in seen:
                continue
            seen.add((job.task.hash, size))
            self._scenes.victims(job.task, [job.start])
            try:
                weights = self._scenes.weights(job.task, "one", [0])
            except Unavailable:
                continue  # the job's rows will say so
            self._check_memory(job, weights, size)

    def _check_memory(self, job: Job, weights: Weights, trials: int) -> None:
        numbers = weights.numel(weights.parameters)
        # Per trial: the update in the client, in transit and in the attack; its own weights where they are redrawn.
        copies = 3 + (2 if job.model_draws == "per_trial" else 0)
        read = weights.numel(read_names(job.attack.description.reads, weights, job.task.protocol))
        whole = job.model_draws == "per_trial" or job.task.protocol.sends != "gradient" or bool(job.defense)
        per_trial = 4 * copies * (numbers if whole else read)
        if per_trial * trials > self._memory:
            fits = max(1, self._memory // max(per_trial, 1))
            raise UserError(
                f"{job.label}: a block of {trials} trials needs about {per_trial * trials / 2**30:.1f} GiB, a worker "
                f"has {self._memory / 2**30:.1f}; set trials_per_job: {fits} in the suite or use fewer --workers"
            )

    # --- one job --------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> JobOutcome:
        """Execute a job and write its rows; a failure of an entry becomes rows, not an exception.

        Raises:
            UserError: The rows cannot be written.
        """
        begun = time.perf_counter()
        torch.set_num_threads(job.threads)
        outcome = Outcome(status="ok")
        victims: Victims | None = None
        weights: Weights | None = None
        output = ""
        try:
            victims = self._scenes.victims(job.task, job.trials)
            weights = self._weights(job)
            missing = set(job.attack.description.needs) - granted_names(job.task, weights)
            if missing:
                outcome.fail("not_applicable", f"the task does not grant: {', '.join(sorted(missing))}")
            else:
                output = self._execute(job, victims, weights, outcome)
        except Unavailable as error:
            outcome.fail("unavailable", str(error))
        except ChildFailed as error:
            outcome.fail(error.status, str(error))
        except InvalidOutput as error:
            outcome.fail("invalid", str(error))
        rows = job_rows(job, outcome, self._scenes, victims, weights, self._columns(outcome))
        path = write_job(self._out, job.id, self._season.name, rows)
        statuses = dict(Counter(row["status"] for row in rows))
        return JobOutcome(job, path, statuses, time.perf_counter() - begun, outcome.error, output)

    def _weights(self, job: Job) -> Weights:
        """Return the model of a block; a defense that changes the architecture does so in a child."""
        changing = [part for part in job.defense if "model" in part.description.acts_on]
        if not changing:
            return self._scenes.weights(job.task, job.model_draws, job.trials)
        defense = [part.id_content() for part in changing]

        def build(recipe: dict[str, Any], examples: Mapping[str, Tensor]) -> Built:
            identity = {"defense": defense, "recipe": recipe, "task": job.task.architecture.content()}
            identity["code"] = self._provenance["code_sha256"]
            made = self._artefacts.get(identity, lambda: self._ask_to_build(job, recipe, examples))
            return Built(made.tensors, made.info["head"])

        key = content_hash(defense)
        return self._scenes.weights(job.task, job.model_draws, job.trials, defense=key, builder=build)

    def _ask_to_build(self, job: Job, recipe: dict[str, Any], examples: Mapping[str, Tensor]) -> Artefact:
        data = self._scenes.dataset(job.task)
        body = {
            "recipe": recipe,
            "defense": [self._request(part) for part in job.defense],
            "architecture": job.task.architecture.model_dump_json(),
            "input_spec": data.input_spec.model_dump_json(),
            "num_classes": data.num_classes,
        }
        begun = time.perf_counter()
        with self._spawn(job, BUILD_BYTES) as child:
            message = self._ask(
                child,
                "build",
                body,
                {"data": Blob.pack(examples)},
                expect="built",
                seconds=BUILD_SECONDS,
                limit=BUILD_BYTES,
                who="defense.model",
            )
            info = {"seconds": time.perf_counter() - begun, "head": str(message.body.get("head"))}
            with _blaming("defense.model"):
                tensors = message.tensors("model")
        if f"parameter/{info['head']}.weight" not in tensors:
            raise ChildFailed("invalid", "defense.model: the changed architecture has no last linear layer")
        return Artefact(tensors, info)

    def _columns(self, outcome: Outcome) -> dict[str, Any]:
        detail = ", ".join(f"{name}={value}" for name, value in sorted(outcome.isolation.items()))
        return {**self._provenance, "isolation": self.level, "isolation_detail": detail or None}

    def _execute(self, job: Job, victims: Victims, weights: Weights, outcome: Outcome) -> str:
        def progress(report: dict[str, Any]) -> None:
            if self._on_progress is not None:
                self._on_progress(job, report)

        with ExitStack() as stack:
            run = _Run(job, weights, victims, stack, outcome, progress)
            run.order = self._scenes.order(job.task, job.trials)
            run.names = read_names(job.attack.description.reads, weights, job.task.protocol)
            try:
                self._exchange(run)
            except ChildFailed as error:
                outcome.fail(error.status, str(error))
                run.output += error.output
            return run.output

    def _exchange(self, run: _Run) -> None:
        """Plant, update, plant, ..., run: R rounds between the attack child and the client child."""
        job, threat = run.job, run.job.task.threat_model
        prepared = self._prepared(run)
        attack = self._attack_child(run, prepared, "attack")
        client = self._client_child(run)
        plants = job.attack.description.plants and threat.change_parameters
        updates: list[Blob] = []
        for index in range(job.task.protocol.rounds):
            planted: dict[str, Blob] = {}
            if plants:
                planted = {"planted": self._plant(run, attack, updates)}
            updates.append(self._update(run, client, index, planted))
        client.close()
        self._recover(run, attack, updates)

    def _client_child(self, run: _Run) -> Child:
        job, task, data = run.job, run.job.task, self._scenes.dataset(run.job.task)
        numbers = run.weights.numel([*run.names, *run.weights.buffers])
        run.outcome.update_bytes = 8 * numbers * len(job.trials) + SLACK_BYTES
        child = run.stack.enter_context(self._spawn(job, run.outcome.update_bytes))
        blobs = {
            "model": run.weights.blob,
            "victims": Blob.pack(
                {"images": torch.tensor(run.victims.inputs), "labels": torch.tensor(run.victims.labels)}
            ),
            "seeds": Blob.pack({"seeds": self._scenes.seeds("defense", job.trials)}),
        }
        if run.order is not None:
            blobs["order"] = Blob.pack({"order": run.order})
        body = {
            "protocol": task.protocol.model_dump_json(),
            "batch_size": task.batch.size,
            "input_spec": data.input_spec.model_dump_json(),
            "normalise": task.normalise,
            "num_classes": data.num_classes,
            "architecture": task.architecture.model_dump_json(),
            "defense": [self._request(part) for part in job.defense],
            "names": run.names,
            "bn_statistics": task.threat_model.bn_statistics,
            "device": self._device,
        }
        self._ask(child, "client", body, blobs, expect="ready", seconds=self._client_seconds(job), who="client")
        return child

    def _update(self, run: _Run, client: Child, index: int, planted: Mapping[str, Blob]) -> Blob:
        """Get one round's update and check it; an update that does not pass is the defense's failure."""
        begun = time.perf_counter()
        message = self._ask(
            client,
            "round",
            {"round": index},
            planted,
            expect="update",
            seconds=self._client_seconds(run.job),
            limit=run.outcome.update_bytes,
            who="client",
        )
        run.outcome.client_seconds += time.perf_counter() - begun
        run.outcome.isolation = client.detail
        state = {**run.weights.parameters, **run.weights.buffers}
        trials = len(run.job.trials)
        expected = {name: (trials, *state[name].shape[1:]) for name in run.names}
        if run.job.task.threat_model.bn_statistics in ("updated_running", "exact_batch"):
            running = {name: value for name, value in run.weights.buffers.items() if is_running_statistic(name)}
            expected |= {f"{STATISTICS}{name}": (trials, *value.shape[1:]) for name, value in running.items()}
        with _blaming("client"):
            tensors = message.tensors("update")
            got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if got != expected:
                raise InvalidOutput(f"sent tensors {_brief(got)}, expected {_brief(expected)}")
            for name, tensor in tensors.items():
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                    raise InvalidOutput(f"the update's {name!r} is not finite")
        return message.blobs["update"]

    def _attack_child(self, run: _Run, prepared: Mapping[str, Blob], purpose: str) -> Child:
        """Start the attack with what the threat model grants. ``purpose`` separates the draws of prepare and run."""
        job, task, threat = run.job, run.job.task, run.job.task.threat_model
        data = self._scenes.dataset(task)
        preparing = purpose == "prepare"
        trials = list(range(len(run.weights.draws))) if preparing else list(job.trials)
        limit = self._recovery_limit(run)
        child = run.stack.enter_context(self._spawn(job, max(limit, PREPARED_BYTES) if preparing else limit))
        identity = (job.attack.name, task.hash)
        if preparing:
            seeds = self._scenes.seeds("prepare", trials, job.attack.name, run.weights.digest)
        else:
            seeds = self._scenes.seeds("attack", trials, *identity)
        blobs = {"seeds": Blob.pack({"seeds": seeds}), **prepared}
        if threat.weights:
            blobs["model"] = self._granted_model(task, run.weights)
        if threat.auxiliary:
            blobs["auxiliary"] = Blob.pack(self._scenes.auxiliary(task))
        if threat.labels and not preparing:
            blobs["labels"] = Blob.pack({"labels": torch.tensor(run.victims.labels)})
        if threat.batch_order and run.order is not None and not preparing:
            blobs["order"] = Blob.pack({"order": run.order})
        body = {
            "facts": granted_facts(
                task,
                data,
                wall_seconds=None if job.wall_seconds is None else job.wall_seconds * len(trials),
                model_evaluations=job.model_evaluations,
            ),
            "attack": self._request(job.attack),
            "defense": [self._request(part) for part in job.defense] if threat.defense else None,
            "architecture": task.architecture.model_dump_json(),
            "num_classes": data.num_classes,
            "device": self._device,
            "shape": {
                "trials": len(trials),
                "clients": task.protocol.clients,
                "inputs_per_client": task.inputs_per_client if threat.batch_size else 1 << 12,
                "num_classes": data.num_classes,
            },
        }
        self._ask(child, "attack", body, blobs, expect="ready", seconds=GRACE_SECONDS, who="attack")
        return child

    def _prepared(self, run: _Run) -> dict[str, Blob]:
        job = run.job
        if not job.attack.description.prepares:
            return {}

        def compute() -> Artefact:
            child = self._attack_child(run, {}, "prepare")
            begun = time.perf_counter()
            message = self._ask(
                child,
                "prepare",
                {},
                {},
                expect="prepared",
                seconds=self._attack_seconds(job),
                limit=PREPARED_BYTES,
                who="attack.prepare",
            )
            info = {"seconds": time.perf_counter() - begun}
            with _blaming("attack.prepare"):
                tensors = message.tensors("prepared")
            child.close()
            return Artefact(tensors, info)

        task, threat = job.task, job.task.threat_model
        identity = {
            "attack": job.attack.id_content(),
            "defense": [part.id_content() for part in job.defense] if threat.defense else None,
            "weights": run.weights.digest,
            "dataset": self._scenes.dataset(task).fingerprint,
            "task": task.hash,
            "threads": job.threads,
            "budget": job.model_evaluations,
            "code": self._provenance["code_sha256"],
        }
        artefact = self._artefacts.get(identity, compute)
        run.outcome.prepare_seconds = artefact.info["seconds"]
        return {"prepared": artefact.blob}

    def _plant(self, run: _Run, attack: Child, updates: list[Blob]) -> Blob:
        """Get the parameters that a malicious server replaces, and check that it may."""
        parameters, threat = run.weights.parameters, run.job.task.threat_model
        history = {f"update{i}": blob for i, blob in enumerate(updates)}
        message = self._ask(
            attack,
            "plant",
            {},
            history,
            expect="planted",
            seconds=self._attack_seconds(run.job),
            limit=run.weights.numel(parameters) * 8 * run.job.task.protocol.clients + SLACK_BYTES,
            who="attack.plant",
        )
        leading = {1, run.job.task.protocol.clients} if threat.per_client else {1}
        with _blaming("attack.plant"):
            for name, tensor in message.tensors("planted").items():
                if name not in parameters or tensor.shape[1:] != parameters[name].shape[1:]:
                    raise InvalidOutput(f"{name!r} with shape {tuple(tensor.shape)} is no model parameter")
                if tensor.shape[0] not in leading or not bool(torch.isfinite(tensor).all()):
                    raise InvalidOutput(f"{name!r} must be finite with a leading dimension in {leading}")
            return message.blobs["planted"]

    def _recover(self, run: _Run, attack: Child, updates: list[Blob]) -> None:
        job, task = run.job, run.job.task
        begun = time.perf_counter()
        message = self._ask(
            attack,
            "run",
            {},
            {f"update{i}": blob for i, blob in enumerate(updates)},
            expect="recovery",
            seconds=self._attack_seconds(job),
            limit=self._recovery_limit(run),
            who="attack",
            on_progress=run.on_progress,
        )
        run.outcome.wall_seconds = time.perf_counter() - begun
        run.outcome.isolation = attack.detail
        data = self._scenes.dataset(task)
        shape = RecoveryShape(
            trials=len(job.trials),
            clients=task.protocol.clients,
            inputs_per_client=task.inputs_per_client,
            num_classes=data.num_classes,
            input_shape=data.input_spec.shape,
        )
        with _blaming("attack"):
            run.outcome.recovery = shape.claim(
                message.tensors("recovery"), message.body.get("model_evaluations"), task.target
            )
        attack.close()
        run.outcome.peak_memory = attack.peak_memory

    # --- children -------------------------------------------------------------------------------------------------

    def _spawn(self, job: Job, file_size: int) -> Child:
        with self._server_lock:
            if not self._server.alive:  # an entry may have managed to end it; the next job gets a new one
                self._server.close()
                self._server = self._new_server()
            server = self._server
        memory = self._memory if self._device == "cpu" else None
        return server.spawn(memory=memory, file_size=file_size, threads=job.threads, local=self._local)

    def _ask(
        self,
        child: Child,
        kind: str,
        body: Mapping[str, Any],
        blobs: Mapping[str, Blob],
        *,
        expect: str,
        seconds: float,
        who: str,
        limit: int = SLACK_BYTES,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Message:
        try:
            return child.ask(kind, body, blobs, expect=expect, seconds=seconds, limit=limit, on_progress=on_progress)
        except ChildFailed as error:
            raise ChildFailed(error.status, f"{who}: {error}", error.output) from None

    def _request(self, spec: EntrySpec) -> dict[str, Any]:
        if spec.source is None:
            return {"kind": spec.description.kind, "local": spec.name, "name": spec.name}
        return spec.request()

    def _granted_model(self, task: Task, weights: Weights) -> Blob:
        if task.threat_model.bn_statistics != "none" or not weights.buffers:
            return weights.blob
        return self._granted.get(weights.digest, lambda: Blob.pack(granted_state(task, weights)))

    def _attack_seconds(self, job: Job) -> float:
        per_trial = float("inf") if job.wall_seconds is None else job.wall_seconds
        return min(per_trial * len(job.trials) + GRACE_SECONDS, 30 * 24 * 3600.0)

    def _client_seconds(self, job: Job) -> float:
        return CLIENT_SECONDS_PER_TRIAL * len(job.trials) * job.task.protocol.local_steps + GRACE_SECONDS

    def _recovery_limit(self, run: _Run) -> int:
        data, protocol = self._scenes.dataset(run.job.task), run.job.task.protocol
        inputs = protocol.clients * run.job.task.inputs_per_client
        numbers = protocol.clients * data.num_classes + inputs * data.images[0].size + 256
        return 8 * len(run.job.trials) * int(numbers) + SLACK_BYTES


@contextmanager
def _blaming(who: str) -> Iterator[None]:
    try:
        yield
    except InvalidOutput as error:
        raise InvalidOutput(f"{who}: {error}") from None


def _checked_device(device: str) -> str:
    if device == "cpu":
        return device
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind != "cuda":
        raise UserError(f"--device {device}: expected cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is usable here; type --device cpu")
    return device


def _brief(shapes: Mapping[str, tuple[int, ...]]) -> str:
    listed = [f"{name} {shape}" for name, shape in itertools.islice(shapes.items(), 4)]
    return ", ".join(listed) + (", ..." if len(shapes) > 4 else "") if listed else "none"

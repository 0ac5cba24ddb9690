"""What the jobs of a run share on this machine: scenes, artefacts, and the server that forks their children."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.data import Victims
from leakbench.entries import EntrySpec
from leakbench.errors import InvalidOutput
from leakbench.keys import Season
from leakbench.models.functional import build_model, flat_state
from leakbench.models.imprint import inserted_parameters, insertion, with_inserted
from leakbench.parts import content_hash
from leakbench.provenance import code_sha256
from leakbench.runner.artefacts import Artefact, Artefacts
from leakbench.runner.children import Child, ChildFailed
from leakbench.runner.grant import granted_state
from leakbench.runner.isolate import ChildServer, Level
from leakbench.runner.kept import Block, load_block
from leakbench.runner.plan import Job
from leakbench.runner.scene import Built, Kept, Scenes, Weights
from leakbench.runner.stealth import changes, stealth
from leakbench.runner.wire import Blob, Message
from leakbench.tasks import Task

BUILD_SECONDS = 3600.0
"""Time limit of building a changed architecture, training included."""
BUILD_BYTES = 4 << 30
SLACK_BYTES = 1 << 20
MEMORY_SHARE = 0.8
"""Share of the machine's memory that all workers together may use."""


class Workshop:
    """Shared by all jobs of a `leakbench.runner.execute.Runner`; used from several threads.

    Args:
        level: Isolation level.
        device: Where children compute.
        workers: Jobs at once.
        season: Key of the victims.
        artefacts: Folder of prepared artefacts.
        files: Entry files that children may read.
        local: Instances by entry name, for entries without a file.
    """

    def __init__(
        self,
        *,
        level: Level,
        device: str,
        workers: int,
        season: Season,
        artefacts: Path,
        files: Iterable[Path],
        local: Mapping[str, Any],
    ) -> None:
        self.level = level
        self.device = device
        self.memory = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / workers)
        self.scenes = Scenes(season)
        self.artefacts = Artefacts(artefacts)
        self._files = sorted({path.resolve() for path in files})
        self._local = dict(local)
        self._granted = Kept(4)
        self._inserted = Kept(2)
        self._honest = Kept(64)
        self._blocks = Kept(2)
        self._lock = threading.Lock()
        self.closed = False
        self._server = self._new_server()

    def _new_server(self) -> ChildServer:
        return ChildServer(self.level, files=self._files, device=self.device)

    def close(self) -> None:
        """End the server and all children; what they were doing is nobody's failure."""
        with self._lock:
            self.closed = True
            self._server.close()

    def spawn(self, job: Job, file_size: int) -> Child:
        """Fork a child that may write files of ``file_size`` bytes."""
        with self._lock:
            if self.closed:
                raise ChildFailed("error", "the runner is closed")
            if not self._server.alive:  # an entry may have managed to end it; the next job gets a new one
                self._server.close()
                self._server = self._new_server()
            server = self._server
        memory = self.memory if self.device == "cpu" else None
        return server.spawn(memory=memory, file_size=file_size, threads=job.threads, local=self._local)

    def request(self, spec: EntrySpec) -> dict[str, Any]:
        """Return what a child needs to build an entry."""
        if spec.source is None:
            return {"kind": spec.description.kind, "local": spec.name, "name": spec.name}
        return spec.request()

    def granted_model(self, task: Task, weights: Weights) -> Blob:
        """Return the model as the threat model grants it."""
        if task.threat_model.bn_statistics != "none" or not weights.buffers:
            return weights.blob
        key = (weights.digest, weights.inserted, weights.numel(weights.parameters))
        return self._granted.get(key, lambda: Blob.pack(granted_state(task, weights)))

    def insertion(self, job: Job) -> dict[str, Any] | None:
        """Return name and params of the module that the attack has inserted, where the threat model lets it."""
        name = job.attack.description.inserts
        if name is None or not job.task.threat_model.change_architecture:
            return None
        return insertion(name, {**job.attack.params, "clients": job.task.protocol.clients})

    def block(self, job: Job) -> Block:
        """Return the kept updates of a job of stage ``in_training``, with what belongs to them."""
        return self._blocks.get(job.kept, lambda: load_block(job, self.scenes.dataset(job.task)))

    def victims(self, job: Job) -> Victims:
        """Return the private examples of a block: drawn, or those of the updates that were kept."""
        return self.block(job).victims if job.kept else self.scenes.victims(job.task, job.trials)

    def order(self, job: Job) -> Tensor | None:
        """Return (T, K, local_steps, B) example indices; see `Scenes.order`."""
        return self.block(job).order if job.kept else self.scenes.order(job.task, job.trials)

    def weights(self, job: Job) -> Weights:
        """Return the model of a block as the server holds it, with the module that the attack has inserted."""
        return self.inserted(job, self._weights(job))

    def inserted(self, job: Job, weights: Weights) -> Weights:
        """Return ``weights`` with the tensors, not yet planted, of the module that the attack has inserted."""
        inserted = self.insertion(job)
        if inserted is None:
            return weights
        shape, draws = self.scenes.dataset(job.task).input_spec.shape, len(weights.draws)

        def extend() -> Weights:
            own = inserted_parameters(inserted, shape, draws)
            return replace(weights, parameters={**weights.parameters, **own}, inserted=inserted["name"])

        return self._inserted.get((weights.digest, content_hash(inserted), shape), extend)

    def stealth(
        self, job: Job, weights: Weights, victims: Victims, planted: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        """Return the row columns about a planted model; see `leakbench.runner.stealth`.

        Where a defense changed the architecture, only what was replaced: no code of a defense runs in this process, so
        such a net cannot be built here.
        """
        task = job.task
        columns = changes(weights.parameters, planted, task.protocol.clients)
        if any("model" in part.description.acts_on for part in job.defense):
            return columns
        data, inserted = self.scenes.dataset(task), self.insertion(job)

        def transform(module: nn.Module) -> nn.Module:
            return with_inserted(module, inserted, shape)

        def keep(client: int, look: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            return self._honest.get(
                (task.hash, tuple(job.trials), weights.digest, content_hash(inserted), client), look
            )

        shape, precision = data.input_spec.shape, getattr(torch, task.protocol.precision)
        state = flat_state(weights.parameters, weights.buffers)
        model = build_model(task.architecture, shape, data.num_classes, state=state, transform=transform)
        return columns | stealth(task, model.to(dtype=precision), victims, data, planted, keep)

    def _weights(self, job: Job) -> Weights:
        """Return the model of a block; a defense that changes the architecture does so in a child."""
        if job.kept:
            return self.block(job).weights
        changing = [part for part in job.defense if "model" in part.description.acts_on]
        if not changing:
            return self.scenes.weights(job.task, job.model_draws, job.trials)
        defense = [part.id_content() for part in changing]

        def build(recipe: dict[str, Any], examples: Mapping[str, Tensor]) -> Built:
            identity = {"defense": defense, "recipe": recipe, "task": job.task.architecture.content()}
            identity["code"] = code_sha256()
            made = self.artefacts.get(identity, lambda: self._ask_to_build(job, recipe, examples))
            return Built(made.tensors, made.info["head"])

        key = content_hash(defense)
        return self.scenes.weights(job.task, job.model_draws, job.trials, defense=key, builder=build)

    def _ask_to_build(self, job: Job, recipe: dict[str, Any], examples: Mapping[str, Tensor]) -> Artefact:
        data = self.scenes.dataset(job.task)
        body = {
            "recipe": recipe,
            "defense": [self.request(part) for part in job.defense],
            "architecture": job.task.architecture.model_dump_json(),
            "input_spec": data.input_spec.model_dump_json(),
            "num_classes": data.num_classes,
        }
        begun = time.perf_counter()
        with self.spawn(job, BUILD_BYTES) as child:
            message = ask(
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
            with blaming("defense.model"):
                tensors = message.tensors("model")
        if f"parameter/{info['head']}.weight" not in tensors:
            raise ChildFailed("invalid", "defense.model: the changed architecture has no last linear layer")
        return Artefact(tensors, info)


def ask(
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
    """Ask a child; see `Child.ask`. A failure names ``who`` failed."""
    with blaming(who):
        return child.ask(kind, body, blobs, expect=expect, seconds=seconds, limit=limit, on_progress=on_progress)


@contextmanager
def blaming(who: str) -> Iterator[None]:
    """Put ``who`` in front of what is wrong with a child or its output."""
    try:
        yield
    except ChildFailed as error:
        raise ChildFailed(error.status, f"{who}: {error}", error.output) from None
    except InvalidOutput as error:
        raise InvalidOutput(f"{who}: {error}") from None

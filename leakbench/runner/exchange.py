"""The conversation of one job: plant, update, plant, ..., run, between an attack child and a client child."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from leakbench.attack import RecoveryShape
from leakbench.data import Victims
from leakbench.errors import InvalidOutput, NotApplicable
from leakbench.federation.planting import check_planted
from leakbench.federation.statistics import is_running_statistic
from leakbench.provenance import code_sha256
from leakbench.runner.artefacts import Artefact
from leakbench.runner.child import SHOWN, STATISTICS
from leakbench.runner.children import Child
from leakbench.runner.grant import granted_facts, read_names
from leakbench.runner.plan import Job
from leakbench.runner.rows import Outcome
from leakbench.runner.scene import Weights
from leakbench.runner.wire import Blob
from leakbench.runner.workshop import SLACK_BYTES, Workshop, ask, blaming
from leakbench.schema import DEFENDED

GRACE_SECONDS = 30.0
"""Added to every time limit: starting the child and importing the entry are not the entry's fault."""
CLIENT_SECONDS_PER_TRIAL = 10.0
"""Time limit of a client, per local step; missing it is the defense's failure."""
PREPARED_BYTES = 1 << 30
"""Most bytes of what `Attack.prepare` returns."""


class Exchange:
    """One job's children and what passes between them; checks everything that comes back.

    Args:
        shop: What jobs share.
        job: The job.
        victims: The private examples.
        weights: The model.
        outcome: Receives what was recovered, and what it cost.
        on_progress: Receives the attack's progress.
    """

    def __init__(
        self,
        shop: Workshop,
        job: Job,
        victims: Victims,
        weights: Weights,
        outcome: Outcome,
        on_progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self.shop = shop
        self.job = job
        self.task = job.task
        self.victims = victims
        self.weights = weights
        self.outcome = outcome
        self.on_progress = on_progress
        self.data = shop.scenes.dataset(job.task)
        self.order = shop.order(job)
        self.names = read_names(job.attack.description.reads, weights, job.task.protocol, job.task.target)
        # An adversary that does not know the weights is not shown any.
        self.plants = job.attack.description.plants and job.task.threat_model.change_parameters
        # Who plants knows what it sent.
        self.shows = (
            job.task.threat_model.weights
            and not self.plants
            and any("broadcast" in part.description.acts_on for part in job.defense)
        )
        self.plant_seconds = 0.0
        self.stack = ExitStack()

    def run(self) -> None:
        """Hold the conversation and end both children.

        Raises:
            ChildFailed: A child died, took too long, or reported an error.
            InvalidOutput: A child answered something that is not acceptable.
            NotApplicable: The attack declined before it saw an update.
        """
        with self.stack:
            self._converse()

    def _converse(self) -> None:
        if self.job.kept:
            kept = self._kept()
            attack = self._attack_child(self._prepared(), preparing=False)
            self._await(attack, "attack", GRACE_SECONDS)
            self._recover(attack, [kept])
            return
        attack = self._attack_child(self._prepared(), preparing=False)
        client = self._client_child()
        self._await(attack, "attack", GRACE_SECONDS)
        self._await(client, "client", self._client_seconds())
        updates: list[Blob] = []
        for index in range(self.task.protocol.rounds):
            planted: dict[str, Blob] = {}
            if self.plants:
                planted = {"planted": self._plant(attack, updates)}
            updates.append(self._update(client, index, planted))
        client.close(wait=False)
        self._recover(attack, updates)

    def _kept(self) -> Blob:
        """Return of the updates that were kept what the attack may see; no client is asked again."""
        if self.shows:
            raise NotApplicable("a kept update comes without what the defense shows of the model")
        if self.task.threat_model.bn_statistics in ("updated_running", "exact_batch") and self.weights.buffers:
            raise NotApplicable("a kept update comes without the BatchNorm statistics of its batches")
        update, state = self.shop.block(self.job).update, {**self.weights.parameters, **self.weights.buffers}
        # What counts batches is nothing that a federation averages.
        names = [name for name in self.names if name in update or state[name].is_floating_point()]
        with blaming("client"):
            if any(name not in update or update[name].shape != state[name].shape for name in names):
                raise InvalidOutput("the kept update is not of its model's tensors")
            _check_finite({name: update[name] for name in names}, self.weights.buffers)
        return Blob.pack({name: update[name] for name in names})

    def _client_child(self) -> Child:
        """Start the client."""
        job, task = self.job, self.task
        numbers = self.weights.numel(
            [*self.names, *self.weights.buffers, *(self.weights.parameters if self.shows else ())]
        )
        self.outcome.update_bytes = 8 * numbers * len(job.trials) + SLACK_BYTES
        child = self.stack.enter_context(self.shop.spawn(job, self.outcome.update_bytes))
        body, blobs = client_request(self.shop, job, self.weights, self.victims, self.order)
        body |= {
            "names": self.names,
            "bn_statistics": task.threat_model.bn_statistics,
            "shows": self.shows,
        }
        with blaming("client"):
            child.post("client", body, blobs)
        return child

    def _await(self, child: Child, who: str, seconds: float) -> None:
        """Wait until a child has imported its entries; both do so at the same time."""
        with blaming(who):
            child.wait(expect="ready", seconds=seconds)

    def _update(self, client: Child, index: int, planted: Mapping[str, Blob]) -> Blob:
        """Get one round's update and check it; an update that does not pass is the defense's failure."""
        begun = time.perf_counter()
        message = ask(
            client,
            "round",
            {"round": index},
            planted,
            expect="update",
            seconds=self._client_seconds(),
            limit=self.outcome.update_bytes,
            who="client",
        )
        self.outcome.client_seconds += time.perf_counter() - begun
        self.outcome.isolation = client.detail
        state = {**self.weights.parameters, **self.weights.buffers}
        trials = len(self.job.trials)
        expected = {name: (trials, *state[name].shape[1:]) for name in self.names}
        if self.task.threat_model.bn_statistics in ("updated_running", "exact_batch"):
            running = {name: value for name, value in self.weights.buffers.items() if is_running_statistic(name)}
            expected |= {f"{STATISTICS}{name}": (trials, *value.shape[1:]) for name, value in running.items()}
        with blaming("client"):
            tensors = message.tensors("update")
            got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if self.shows and any(name.startswith(SHOWN) for name in got):
                self.outcome.model_shown = DEFENDED
                expected |= {f"{SHOWN}{n}": (trials, *v.shape[1:]) for n, v in self.weights.parameters.items()}
            if got != expected:
                raise InvalidOutput(f"sent tensors {_brief(got)}, expected {_brief(expected)}")
        # A client can do nothing about a model that overflows: whoever planted it is to blame.
        with blaming("attack.plant" if self.outcome.planted and self.outcome.planted[-1] else "client"):
            _check_finite(tensors, self.weights.buffers)
            self.outcome.refused = _shares(message.body.get("refused"), trials)
        return message.blobs["update"]

    def _attack_child(self, prepared: Mapping[str, Blob], *, preparing: bool) -> Child:
        """Start the attack with what the threat model grants; a preparing one sees nothing of the victims."""
        job, task, threat = self.job, self.task, self.task.threat_model
        trials = list(range(len(self.weights.draws))) if preparing else list(job.trials)
        limit = max(self._recovery_limit(), self._plant_limit() if self.plants else 0)
        child = self.stack.enter_context(self.shop.spawn(job, max(limit, PREPARED_BYTES) if preparing else limit))
        if preparing:
            # By the weights alone, so that a model's artefact does not depend on which others are in the block.
            seeds = self.shop.scenes.seeds("prepare", self.weights.sha256, job.attack.name)
        else:
            seeds = self.shop.scenes.seeds("attack", trials, job.attack.name, task.hash)
        blobs = {"seeds": Blob.pack({"seeds": seeds}), **prepared}
        if threat.weights:
            blobs["model"] = self.shop.granted_model(task, self.weights)
        if threat.auxiliary:
            blobs["auxiliary"] = Blob.pack(self.shop.scenes.auxiliary(task))
        if threat.labels and not preparing:
            blobs["labels"] = Blob.pack({"labels": torch.tensor(self.victims.labels)})
        asked = self.victims.candidates
        if asked is not None and not preparing:
            packed = {"images": torch.tensor(asked.inputs), "labels": torch.tensor(asked.labels)}
            blobs["candidates"] = Blob.pack(packed)
        if threat.batch_order and self.order is not None and not preparing:
            blobs["order"] = Blob.pack({"order": self.order})
        body = {
            "facts": granted_facts(
                task,
                self.data,
                wall_seconds=None if job.wall_seconds is None else job.wall_seconds * len(trials),
                model_evaluations=job.model_evaluations,
            ),
            "attack": self.shop.request(job.attack),
            "defense": [self.shop.request(part) for part in job.defense] if threat.defense else None,
            "architecture": task.architecture.model_dump_json(),
            "insert": self.shop.insertion(job),
            "num_classes": self.data.num_classes,
            "device": self.shop.device,
            "shape": {
                "trials": len(trials),
                "clients": task.protocol.clients,
                "inputs": task.total_inputs if threat.batch_size else task.protocol.clients << 12,
                "num_classes": self.data.num_classes,
            },
        }
        with blaming("attack"):
            child.post("attack", body, blobs)
        return child

    def _prepared(self) -> dict[str, Blob]:
        job = self.job
        if not job.attack.description.prepares:
            return {}

        def compute() -> Artefact:
            child = self._attack_child({}, preparing=True)
            self._await(child, "attack", GRACE_SECONDS)
            begun = time.perf_counter()
            message = ask(
                child,
                "prepare",
                {},
                {},
                expect="prepared",
                seconds=self._attack_seconds(),
                limit=PREPARED_BYTES,
                who="attack.prepare",
            )
            if declined := message.body.get("declined"):
                raise NotApplicable(str(declined))
            info = {"seconds": time.perf_counter() - begun}
            with blaming("attack.prepare"):
                tensors = message.tensors("prepared")
            child.close()
            return Artefact(tensors, info)

        task, threat = job.task, job.task.threat_model
        identity = {
            "attack": job.attack.id_content(),
            "defense": [part.id_content() for part in job.defense] if threat.defense else None,
            "weights": self.weights.digest,
            "dataset": self.data.fingerprint,
            "task": task.hash,
            "threads": job.threads,
            "budget": job.model_evaluations,
            "code": code_sha256(),
        }
        artefact = self.shop.artefacts.get(identity, compute)
        self.outcome.prepare_seconds = artefact.info["seconds"]
        return {"prepared": artefact.blob}

    def _plant(self, attack: Child, updates: list[Blob]) -> Blob:
        """Get the parameters that a malicious server replaces, and check that it may."""
        history = {f"update{i}": blob for i, blob in enumerate(updates)}
        begun = time.perf_counter()
        message = ask(
            attack,
            "plant",
            {},
            history,
            expect="planted",
            seconds=self._attack_seconds(),
            limit=self._plant_limit(),
            who="attack.plant",
        )
        self.plant_seconds += time.perf_counter() - begun
        leading = {1, self._several} if self.task.threat_model.per_client else {1}
        with blaming("attack.plant"):
            planted = message.tensors("planted")
            check_planted(planted, self.weights.parameters, leading)
        self.outcome.planted.append(planted)
        return message.blobs["planted"]

    def _recover(self, attack: Child, updates: list[Blob]) -> None:
        job, task = self.job, self.task
        begun = time.perf_counter()
        message = ask(
            attack,
            "run",
            {},
            {f"update{i}": blob for i, blob in enumerate(updates)},
            expect="recovery",
            seconds=self._attack_seconds(),
            limit=self._recovery_limit(),
            who="attack",
            on_progress=self.on_progress,
        )
        self.outcome.wall_seconds = self.plant_seconds + time.perf_counter() - begun
        self.outcome.isolation = attack.detail
        shape = RecoveryShape(
            trials=len(job.trials),
            clients=task.protocol.clients,
            inputs=task.total_inputs,
            num_classes=self.data.num_classes,
            input_shape=self.data.input_spec.shape,
        )
        with blaming("attack"):
            self.outcome.recovery = shape.claim(
                message.tensors("recovery"), message.body.get("model_evaluations"), task.target
            )
        attack.close()
        self.outcome.peak_memory = attack.peak_memory

    def _attack_seconds(self) -> float:
        per_trial = float("inf") if self.job.wall_seconds is None else self.job.wall_seconds
        return min(per_trial * len(self.job.trials) + GRACE_SECONDS, 30 * 24 * 3600.0)

    def _client_seconds(self) -> float:
        updates = len(self.job.trials) * self.task.protocol.clients * self.task.protocol.local_steps
        return CLIENT_SECONDS_PER_TRIAL * updates + GRACE_SECONDS

    @property
    def _several(self) -> int:
        """How many different models there may be: K, or where K = 1 as many as trials."""
        clients = self.task.protocol.clients
        return clients if clients > 1 else len(self.job.trials)

    def _plant_limit(self) -> int:
        return 8 * self._several * self.weights.numel(self.weights.parameters) + SLACK_BYTES

    def _recovery_limit(self) -> int:
        clients = self.task.protocol.clients
        numbers = clients * self.data.num_classes + self.task.total_inputs * self.data.images[0].size + 256
        return 8 * len(self.job.trials) * int(numbers) + SLACK_BYTES


def client_request(
    shop: Workshop, job: Job, weights: Weights, victims: Victims, order: Tensor | None
) -> tuple[dict[str, Any], dict[str, Blob]]:
    """Return what a child needs to be the clients of a job: see `leakbench.runner.child.ClientRole`."""
    task, data = job.task, shop.scenes.dataset(job.task)
    blobs = {
        "model": weights.blob,
        "victims": Blob.pack({"images": torch.tensor(victims.inputs), "labels": torch.tensor(victims.labels)}),
        "seeds": Blob.pack({"seeds": shop.scenes.seeds("defense", job.trials)}),
    }
    if order is not None:
        blobs["order"] = Blob.pack({"order": order})
    body = {
        "protocol": task.protocol.model_dump_json(),
        "batch_sizes": [size // task.protocol.local_batches for size in task.client_sizes],
        "input_spec": data.input_spec.model_dump_json(),
        "normalise": task.normalise,
        "num_classes": data.num_classes,
        "architecture": task.architecture.model_dump_json(),
        "insert": shop.insertion(job),
        "defense": [shop.request(part) for part in job.defense],
        "names": None,
        "bn_statistics": "none",
        "shows": False,
        "device": shop.device,
    }
    return body, blobs


def _check_finite(update: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Refuse what is no number; only a buffer that counts may be of whole ones."""
    counts = {name for name, value in buffers.items() if not value.is_floating_point()}
    for name, tensor in update.items():
        if not (tensor.is_floating_point() or name in counts) or not bool(torch.isfinite(tensor).all()):
            raise InvalidOutput(f"the update's {name!r} is not finite")


def _shares(given: object, trials: int) -> list[float]:
    """Check the share of clients that refused, per trial."""
    if not isinstance(given, list) or len(given) != trials:
        raise InvalidOutput(f"sent {str(given)[:40]}, expected which share of the clients of {trials} trials refused")
    if not all(isinstance(value, float) and 0 <= value <= 1 for value in given):
        raise InvalidOutput(f"sent {str(given)[:40]}, expected shares in 0..1")
    return given


def _brief(shapes: Mapping[str, tuple[int, ...]]) -> str:
    listed = [f"{name} {shape}" for name, shape in itertools.islice(shapes.items(), 4)]
    return ", ".join(listed) + (", ..." if len(shapes) > 4 else "") if listed else "none"

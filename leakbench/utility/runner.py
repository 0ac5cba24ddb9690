"""One federated training, from the partition to its row: the parent's half, which holds seeds, truth and clock.

No code of a defense runs here. Where a defense changes the architecture, a child of its own that holds no private data
and no labels says which class the net gives each test input; elsewhere the net is evaluated here.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leakbench import keys
from leakbench.accounting import gdp_epsilon
from leakbench.data import decoder_versions
from leakbench.data.loading import Dataset
from leakbench.errors import InvalidOutput, LeakbenchError, Unavailable
from leakbench.models.functional import build_model, split_state
from leakbench.results import UTILITY_FOLDER, blank_row, write_job
from leakbench.runner.children import Child
from leakbench.runner.exchange import CLIENT_SECONDS_PER_TRIAL, GRACE_SECONDS
from leakbench.runner.execute import JobOutcome, Runner, failures
from leakbench.runner.plan import Job
from leakbench.runner.rows import job_columns
from leakbench.runner.scene import Weights
from leakbench.runner.wire import Blob
from leakbench.runner.workshop import SLACK_BYTES, ask
from leakbench.utility.child import predict
from leakbench.utility.federation import Course, Server, final, upload_bytes
from leakbench.utility.kept import Kept, expression, write_kept
from leakbench.utility.partition import Ints, Shares, batches, cut
from leakbench.utility.rows import UTILITY_FIELDS
from leakbench.utility.spec import SLOTS

PREDICT_SECONDS = 300.0
"""Time limit of an evaluation of a net that a defense changed."""

DELTA = 1e-5
"""At which epsilon is given."""
WEIGHED = 8
"""Rounds, spread over the training, in which upload is measured, of one client each."""


_COLUMNS = ("clients", "rounds", "partition", "holdout", "lr_grid", "planned_seeds", "evaluate_every")


@dataclass(frozen=True)
class Plan:
    """What a training is drawn from.

    Args:
        data: The dataset.
        shares: Who holds which examples.
        taken: (rounds, K, N) indices into the dataset.
        pool: Indices of all examples that clients hold, sorted.
        judged: Indices of what the net is evaluated on: test split, then what was held out.
    """

    data: Dataset
    shares: Shares
    taken: Ints
    pool: Ints
    judged: Ints

    @property
    def tested(self) -> int:
        """Examples of the test split."""
        return len(self.judged) - len(self.shares.holdout)


class UtilityRunner(Runner):
    """Executes jobs that are trainings; see `Runner` and `leakbench.utility.plan`."""

    def run(self, job: Job) -> JobOutcome:
        """Train, and write the row.

        Raises:
            UserError: The row cannot be written.
            LeakbenchError: The runner was closed meanwhile; the job has no row.
        """
        begun = time.perf_counter()
        torch.set_num_threads(job.threads)
        course, drawn, weights = Course(), None, None
        with failures(course) as printed:
            drawn = self._drawn(job)
            weights = self._shop.weights(job)
            with ExitStack() as stack:
                _Training(self, job, drawn, weights, course, stack).run()
        course.total_seconds = time.perf_counter() - begun
        if self._shop.closed:
            raise LeakbenchError(f"{job.label}: the runner was closed before the job was done")
        row = self._row(job, course, drawn, weights)
        path = write_job(self._out / UTILITY_FOLDER, job.id, self._season.name, [row], UTILITY_FIELDS)
        statuses = {course.status: 1}
        return JobOutcome(job, path, statuses, course.total_seconds, course.error, "".join(printed))

    def _unavailable(self, job: Job) -> str | None:
        try:
            self._drawn(job)
        except Unavailable as error:
            return str(error)
        return None

    def _drawn(self, job: Job) -> Plan:
        """Draw who holds what and in which order; nothing of it depends on the defense or the learning rate."""
        data, params, key = self._shop.scenes.dataset(job.task), job.attack.params, self._season.key
        law: dict[str, Any] = {name: params[name] for name in ("partition", "clients", "holdout")}
        names, rounds = tuple(law.values()), int(params["rounds"])  # type: ignore[arg-type]
        shares = cut(data, law.pop("partition"), **law, seed=job.start, key=key)
        count = job.task.batch.size * job.task.protocol.local_batches
        taken = batches(shares, count, rounds, (data.fingerprint, *names, job.start), key)
        judged = np.concatenate([data.rows("test"), shares.holdout])
        return Plan(data, shares, taken, np.sort(np.concatenate(shares.clients)), judged)

    def _row(self, job: Job, course: Course, drawn: Plan | None, weights: Weights | None) -> dict[str, Any]:
        params, measured = job.attack.params, course.status == "ok"
        row = {
            **blank_row(UTILITY_FIELDS),
            **job_columns(job, self._columns(course.isolation)),
            **{name: params[name] for name in _COLUMNS},
            "seed": job.start,
            "status": course.status,
            "error": course.error,
            "curve": json.dumps([[done, round(value, 6)] for done, value in course.curve]),
            "rounds_done": course.done,
            "client_seconds": course.client_seconds,
            "upload_bytes": course.upload_bytes,
            "epsilon": course.epsilon,
            "refused": sum(course.refused) / len(course.refused) if course.refused else None,
            "wall_seconds": course.total_seconds,
            "peak_memory_bytes": course.peak_memory,
        }
        if drawn is not None:
            chance = _chance(drawn)
            row |= {
                "dataset_fingerprint": drawn.data.fingerprint,
                "decoder": decoder_versions(),
                "num_classes": drawn.data.num_classes,
                "client_sizes": json.dumps(drawn.shares.sizes),
                "accuracy_chance": chance,
                "accuracy": final([value for _, value in course.curve]) if measured else chance,
                "accuracy_holdout": final(course.validation) if measured else chance,
            }
        if weights is not None:
            row |= {"checkpoint_sha256": weights.sha256[0], "checkpoint_origin": weights.origin}
            row["update_numbers"] = weights.numel(weights.parameters)
        if course.status == "unavailable":
            row |= {"accuracy": None, "accuracy_holdout": None}
        return {field.name: row[field.name] for field in UTILITY_FIELDS}


def _chance(drawn: Plan) -> float:
    """Return the accuracy on the test split of the class that clients have most of."""
    data = drawn.data
    most = Counter(data.labels[drawn.pool].tolist()).most_common(1)[0][0]
    return float((data.labels[data.rows("test")] == most).mean())


class _Training:
    """The conversation of one training: model out, updates back, round after round."""

    def __init__(
        self, runner: UtilityRunner, job: Job, drawn: Plan, weights: Weights, course: Course, stack: ExitStack
    ) -> None:
        self.runner, self.job, self.drawn, self.course, self.stack = runner, job, drawn, course, stack
        self.shop, self.task = runner._shop, job.task
        self.weights = weights
        self.clients = len(drawn.shares.clients)
        sizes = torch.tensor(drawn.shares.sizes)
        precision = getattr(torch, job.task.protocol.precision)
        own = {name: value.to(precision) for name, value in weights.parameters.items()}
        self.server = Server(own, dict(weights.buffers), job.task.protocol, sizes)
        self.labels = torch.tensor(drawn.data.labels[drawn.judged])
        self.wanted = 8 * self.clients * weights.numel([*weights.parameters, *weights.buffers]) + SLACK_BYTES

    def run(self) -> None:
        """Train; what goes wrong is noted by the caller."""
        params, course = self.job.attack.params, self.course
        clients, judge = self._clients(), self._judge()
        rounds, every, keep = (int(params[name]) for name in ("rounds", "evaluate_every", "keep"))  # type: ignore[arg-type]
        course.epsilon = self._epsilon(clients)
        begun = time.monotonic()
        for index in range(rounds):
            self._round(clients, index, keep)
            course.done = index + 1
            if course.done % every == 0 or course.done == rounds:
                hits = (judge() == self.labels).double()
                course.curve.append((course.done, float(hits[: self.drawn.tested].mean())))
                course.validation.append(float(hits[self.drawn.tested :].mean()))
            spent = max(time.monotonic() - begun, 1e-9)
            self.runner._report(self.job, {"done": course.done, "total": rounds, "rate": course.done / spent})
        course.isolation = clients.detail
        clients.close()
        course.peak_memory = clients.peak_memory

    def _epsilon(self, clients: Child) -> float | None:
        """Return epsilon of the example that is used most often; None where the defense promises nothing.

        None, too, where an example comes more than once in a round: what is declared is of one.
        """
        message = ask(clients, "promise", {}, {}, expect="promise", seconds=GRACE_SECONDS, who="client")
        mu = message.body.get("mu")
        if not isinstance(mu, float) or not mu >= 0:
            return None
        taken = np.sort(self.drawn.taken, axis=2)
        if (taken[..., 1:] == taken[..., :-1]).any():
            return None
        return gdp_epsilon(mu * math.sqrt(np.unique(taken, return_counts=True)[1].max()), DELTA)

    def _round(self, clients: Child, index: int, keep: int) -> None:
        taken, state = self.drawn.taken[index], self.server.state()
        order = self._order(index)
        batch = {"indices": torch.from_numpy(np.searchsorted(self.drawn.pool, taken))}
        blobs = {"model": Blob.pack(state), "batch": Blob.pack(batch if order is None else batch | {"order": order})}
        seconds = CLIENT_SECONDS_PER_TRIAL * self.clients * self.task.protocol.local_steps + GRACE_SECONDS
        message = ask(
            clients, "round", {"round": index}, blobs, expect="update", seconds=seconds, limit=self.wanted, who="client"
        )
        update = message.tensors("update")
        try:
            self.server.check(update)
            refused, spent = message.body.get("refused"), message.body.get("cpu_seconds")
            if not isinstance(refused, list) or not all(isinstance(v, float) and 0 <= v <= 1 for v in refused):
                raise InvalidOutput(f"sent {str(refused)[:40]}, expected which clients refused")
            if not isinstance(spent, float) or not 0 <= spent < math.inf:
                raise InvalidOutput(f"sent {str(spent)[:40]}, expected CPU seconds")
        except InvalidOutput as error:
            raise InvalidOutput(f"client: round {index + 1}: {error}") from None
        self.course.seconds.append(spent)
        self.course.refused.append(sum(refused) / max(len(refused), 1))
        if index % max(1, len(self.drawn.taken) // WEIGHED) == 0:
            self.course.upload.append(upload_bytes(update, index % self.clients))
        for rank, client in ((i, k) for i, (r, k) in enumerate(self._chosen[:keep]) if r == index):
            trial = self._first_trial(keep) + self.job.start * keep + rank
            self._keep(trial, index, client, state, update, taken, order)
        self.server.take(update)

    @cached_property
    def _chosen(self) -> list[tuple[int, int]]:
        """All pairs (round, client), those to keep first; asked for when updates have come back, told to nobody.

        The same for all defenses and learning rates, so that attacks on what was kept are paired.
        """
        names, key = (*self._federation, self.job.start), self.job.season.key
        pairs = product(range(len(self.drawn.taken)), range(self.clients))
        return sorted(pairs, key=lambda pair: keys.derive(key, "utility-kept", *names, *pair))

    @property
    def _federation(self) -> tuple[object, ...]:
        """What decides the examples of every round, and what clients do with them."""
        protocol = {name: value for name, value in self.task.protocol.content().items() if name != "lr"}
        own = ("partition", "clients", "rounds", "holdout")
        params = [self.job.attack.params[name] for name in own]
        return self.drawn.data.fingerprint, self.task.architecture.content(), self.task.batch.size, protocol, *params

    def _first_trial(self, keep: int) -> int:
        """Return the first trial number of the federation, in 24 random bits: others have others."""
        return SLOTS * (keys.seed(keys.PUBLIC_KEY, "utility-trials", *self._federation, keep) >> 39)

    def _keep(
        self,
        trial: int,
        index: int,
        client: int,
        state: dict[str, Tensor],
        update: Mapping[str, Tensor],
        taken: Ints,
        order: Tensor | None,
    ) -> None:
        job, data = self.job, self.drawn.data
        indices = torch.tensor(taken[client])
        kept = Kept(
            run=job.id,
            season=job.season.name,
            task=job.task,
            fingerprint=data.fingerprint,
            num_classes=data.num_classes,
            partition=str(job.attack.params["partition"]),
            seed=job.start,
            defense=expression(job.defense),
            defense_content=[part.id_content() for part in job.defense],
            trial=trial,
            round=index,
            client=client,
            head=self.weights.head,
            model=dict(state),
            update={name: value[client : client + 1].clone() for name, value in update.items()},
            indices=indices,
            labels=torch.tensor(data.labels[taken[client]]),
            order=None if order is None else order[client, 0],
        )
        write_kept(self.runner._out, kept)

    def _order(self, index: int) -> Tensor | None:
        """Return (K, 1, local_steps, B) orders of the examples for ``batches: epochs``; else None."""
        params = self.job.attack.params
        names = [f"{params['partition']} {self.job.start} {index} {k}" for k in range(self.clients)]
        return self.shop.scenes.order(self.task, names)  # type: ignore[arg-type]

    def _clients(self) -> Child:
        """Start the clients; from now on they keep their examples."""
        names = ("utility", self.job.attack.params["partition"], self.job.start)
        seeds = self.shop.scenes.seeds("defense", range(self.clients), *names)
        images, labels = (torch.tensor(a[self.drawn.pool]) for a in (self.drawn.data.images, self.drawn.data.labels))
        return self._child(images, labels, seeds, self.wanted)

    def _judge(self) -> Callable[[], Tensor]:
        """Return what says which class the net gives every example that it is evaluated on."""
        data, task = self.drawn.data, self.task
        images = torch.tensor(data.images[self.drawn.judged])
        if any("model" in part.description.acts_on for part in self.job.defense):
            blind = torch.zeros(len(images), dtype=torch.int64)
            child = self._child(images, blind, torch.zeros(1, 32, dtype=torch.uint8), 8 * len(images) + SLACK_BYTES)
            return lambda: self._asked(child, len(images))
        shape, device = data.input_spec.shape, self.shop.device
        net = build_model(task.architecture, shape, data.num_classes, state=self.server.state())
        net = net.to(device, getattr(torch, task.protocol.precision))

        def here() -> Tensor:
            parameters, buffers = split_state(self.server.state())
            now = net.with_state(
                {name: value.to(device, net.dtype) for name, value in parameters.items()},
                {name: value.to(device) for name, value in buffers.items()},
            )
            return predict(now, images, data.input_spec, task.normalise)

        return here

    def _asked(self, child: Child, count: int) -> Tensor:
        blobs = {"model": Blob.pack(self.server.state())}
        limit = 8 * count + SLACK_BYTES
        message = ask(
            child, "predict", {}, blobs, expect="predicted", seconds=PREDICT_SECONDS, limit=limit, who="defense.model"
        )
        classes = message.tensors("predicted").get("classes")
        if classes is None or classes.shape != (count,) or classes.dtype != torch.int64:
            raise InvalidOutput(f"defense.model: expected {count} predicted classes")
        return classes

    def _child(self, images: Tensor, labels: Tensor, seeds: Tensor, limit: int) -> Child:
        task, data = self.task, self.drawn.data
        child = self.stack.enter_context(self.shop.spawn(self.job, limit))
        body = {
            "protocol": task.protocol.model_dump_json(),
            "batch_sizes": [task.batch.size],
            "input_spec": data.input_spec.model_dump_json(),
            "normalise": task.normalise,
            "num_classes": data.num_classes,
            "architecture": task.architecture.model_dump_json(),
            "insert": None,
            "defense": [self.shop.request(part) for part in self.job.defense],
            "names": list(self.server.sent()),
            "bn_statistics": "none",
            "shows": False,
            "device": self.shop.device,
        }
        blobs = {
            "model": self.weights.blob,
            "victims": Blob.pack({"images": images, "labels": labels}),
            "seeds": Blob.pack({"seeds": seeds}),
        }
        ask(child, "train", body, blobs, expect="ready", seconds=2 * GRACE_SECONDS, who="client")
        return child

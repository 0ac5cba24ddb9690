"""What runs inside a child: it imports entries and does the work of a client, of an attack, or describes an entry.

The runner's requests are trusted here; what goes back is checked again by the runner.
"""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.attack import Attack, RecoveryShape
from leakbench.chain import DefenseChain
from leakbench.errors import InvalidOutput, NotApplicable, NotGranted
from leakbench.facts import Facts
from leakbench.federation.aggregation import StreamedSum, aggregation_weights
from leakbench.federation.client import Client, ClientState, Received
from leakbench.federation.inputs import input_bounds, to_inputs
from leakbench.federation.planting import Planted
from leakbench.federation.statistics import batch_statistics, is_running_statistic
from leakbench.knowledge import Knowledge
from leakbench.models.functional import Model, build_model
from leakbench.models.imprint import with_inserted
from leakbench.models.recipe import train
from leakbench.observation import Cohort, Observation, Seen
from leakbench.randomness import TrialRandom
from leakbench.runner.loading import Local, describe, error_line, load_chain, load_entry
from leakbench.runner.wire import Blob, ConnectionClosed, Message, receive, send
from leakbench.tasks import Architecture, AttributeSpec, InputSpec, Protocol

NO_LIMIT = 1 << 62
STATISTICS = "statistics/"
"""Leads the names of granted BatchNorm statistics among an update's tensors."""
SHOWN = "shown/"
"""Leads the names of the model's tensors as an adversary sees them, where a defense changes that."""
TRACEBACK_LIMIT = 4000

Reply = tuple[str, dict[str, Any], dict[str, dict[str, Tensor]]]


def serve(sock: socket.socket, *, threads: int, detail: Mapping[str, Any], local: Local | None = None) -> None:
    """Answer the runner's requests until it closes the connection.

    Args:
        sock: SEQPACKET socket to the runner.
        threads: Intra-operation threads of torch.
        detail: What confines this process; told to the runner once.
        local: Instances by token, for entries without a file (isolation ``none`` only).
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    roles: dict[str, Callable[[Message], Reply]] = {}
    with contextlib.suppress(ConnectionClosed):  # by the runner, which has no use for this child any more
        send(sock, "hello", dict(detail))
    while True:
        try:
            message = receive(sock, limit=NO_LIMIT)
        except ConnectionClosed:
            return
        try:
            reply: Reply = ("ready", {}, {})
            if message.kind == "describe":
                reply = ("described", {"entries": [describe(r) for r in message.body["entries"]]}, {})
            else:
                if message.kind == "build":
                    roles = {"build": partial(_build, local=local or {})}
                elif message.kind == "client":
                    client = ClientRole(message, local or {})
                    roles = {"round": client.round}
                elif message.kind == "gauge":
                    from leakbench.runner.gauge import MeasureRole  # builds on ClientRole

                    gauge = MeasureRole(message, local or {}, sock)
                    roles = {"rehearse": gauge.rehearse, "measure": gauge.measure}
                elif message.kind == "entry":
                    from leakbench.submitting.role import CheckRole  # no part of a run

                    roles = {"law": CheckRole(message).check}
                elif message.kind == "train":
                    from leakbench.utility.child import TrainingRole  # builds on ClientRole

                    training = TrainingRole(message, local or {})
                    roles = {"round": training.round, "predict": training.predict, "promise": training.promise}
                elif message.kind == "attack":
                    attack = AttackRole(message, local or {}, sock)
                    roles = {"prepare": attack.prepare, "plant": attack.plant, "run": attack.run}
                if message.kind in roles:
                    reply = roles[message.kind](message)
            kind, body, blobs = reply
            send(sock, kind, body, {name: Blob.pack(tensors) for name, tensors in blobs.items()})
        except ConnectionClosed:
            return
        except Exception as error:  # an entry may raise anything; the runner turns it into rows
            send(sock, "error", _report(error))


# --- roles --------------------------------------------------------------------------------------------------------


class ClientRole:
    """The clients of one block: holds victims, model and defense, returns one update per round.

    The request's body holds ``protocol``, ``batch_sizes`` (K,), ``input_spec``, ``normalise``, ``num_classes``,
    ``architecture``, ``insert`` (null, or name and params of an inserted module), ``defense`` (entry requests),
    ``names`` (tensors to send, or null), ``bn_statistics`` (which to add to the update, its tensors' names led by
    `STATISTICS`), ``shows`` (whether to add the model as an adversary sees it, led by `SHOWN`) and ``device``; its
    blobs are ``model``, ``victims`` (uint8 images (T, K, N, *shape), labels (T, K, N)), ``seeds`` and optionally
    ``order``.
    """

    def __init__(self, message: Message, local: Local) -> None:
        body = message.body
        self.device = torch.device(body["device"])
        self.protocol = Protocol.model_validate_json(body["protocol"])
        self.spec = InputSpec.model_validate_json(body["input_spec"])
        self.normalise = bool(body["normalise"])
        chain = load_chain(body["defense"], local)
        self.model = _model(message, chain, self.spec.shape).to(self.device, getattr(torch, self.protocol.precision))
        victims = message.tensors("victims")
        self.images, self.labels = victims["images"], victims["labels"].to(self.device)
        self.random = TrialRandom(message.tensors("seeds")["seeds"], device=self.device)
        self.order = message.tensors("order").get("order")
        self.bn_statistics = body["bn_statistics"]
        self.shows: bool = body["shows"]
        self.names = None if body["names"] is None else frozenset(body["names"])
        self.states = [ClientState() for _ in range(self.protocol.clients)]
        bounds = input_bounds(self.spec, self.normalise, self.device)
        self.clients = [Client(self.protocol, size, chain, bounds) for size in body["batch_sizes"]]
        sizes = [size * self.protocol.local_batches for size in body["batch_sizes"]]
        self.sizes, self.weights = sizes, aggregation_weights(self.protocol, sizes)
        self.previous: Planted | None = None
        self.out = torch.zeros(self.protocol.clients, len(self.labels), dtype=torch.bool, device=self.device)

    def round(self, message: Message) -> Reply:
        """One round: every client's update, summed where the protocol aggregates."""
        planted = Planted(self.model, message.tensors("planted"), self.protocol.clients)
        total = StreamedSum(self.weights)
        for k in range(self.protocol.clients):
            sent = self._client(planted, k, message.body["round"])
            total.add({name: tensor.detach() for name, tensor in sent.items()})
        self.previous = planted
        trials = self.labels.shape[0]
        update = {n: v.expand(trials, *v.shape[1:]).to("cpu") for n, v in total.mean().items()}
        return "update", {"refused": self.out.double().mean(0).tolist()}, {"update": update}

    def _client(self, planted: Planted, k: int, round_index: int) -> dict[str, Tensor]:
        """Return what one client of every trial sends: nothing new where it refuses, now or in a round before."""
        client, model = self.clients[k], planted.model_of(k)
        inputs = to_inputs(self.images[:, k, : self.sizes[k]].numpy(), self.spec, self.normalise)
        inputs, labels = inputs.to(self.device, self.model.dtype), self.labels[:, k, : self.sizes[k]]
        received = Received(
            model=model,
            previous=self.model if self.previous is None else self.previous.model_of(k),
            digests=planted.digests if client.defense.acts_in("accept") else (),
            state=self.states[k],
            round_index=round_index,
            client=k,
            order=None if self.order is None else self.order[:, k],
        )
        # Who refused stays out: asking again for what it saw before would make a planted model look familiar.
        self.out[k] |= ~client.accepts(received, inputs, labels, random=self.random)
        update = client.update(
            model,
            inputs,
            labels,
            random=self.random,
            state=received.state,
            names=self.names,
            order=received.order,
            round_index=round_index,
            client=k,
        )
        statistics = self._statistics(model, k, inputs, received.order)
        if bool(self.out[k].any()):
            start = model.parameters if self.protocol.sends == "weights" else {}
            nothing = {n: torch.zeros_like(v[:1]) for n, v in update.items()} | dict(start) | model.buffers
            update = {n: self._unless_out(k, v, nothing[n]) for n, v in update.items()}
            statistics = {n: self._unless_out(k, v, model.buffers[n]) for n, v in statistics.items()}
        update |= {f"{STATISTICS}{n}": v for n, v in statistics.items()}
        if self.shows:
            shown = client.shown(received, inputs, labels, random=self.random)
            update |= {f"{SHOWN}{n}": v for n, v in shown.items()}
        return update

    def _unless_out(self, k: int, sent: Tensor, nothing: Tensor) -> Tensor:
        return torch.where(self.out[k].view(-1, *(1,) * (sent.dim() - 1)), nothing, sent)

    def _statistics(self, model: Model, k: int, inputs: Tensor, order: Tensor | None) -> dict[str, Tensor]:
        """Return the BatchNorm statistics of one client that the threat model grants beyond the server's own."""
        if self.bn_statistics == "exact_batch":
            first = inputs[:, : self.clients[k].batch_size]
            if order is not None:
                first = inputs[torch.arange(len(inputs))[:, None], order[:, 0]]
            return batch_statistics(model, first)
        if self.bn_statistics == "updated_running":
            return {n: v for n, v in self.states[k].buffers.items() if is_running_statistic(n)}
        return {}


class AttackRole:
    """One attack on one block: holds what the threat model grants and nothing else.

    The request's body holds ``facts``, ``attack`` and ``defense`` (entry requests; the latter null when withheld),
    ``architecture``, ``insert``, ``num_classes`` and ``device``; its blobs are ``seeds`` and, where granted, ``model``,
    ``auxiliary``, ``labels``, ``order``, ``candidates``, ``prepared``.
    """

    def __init__(self, message: Message, local: Local, sock: socket.socket) -> None:
        body = message.body
        self.device = torch.device(body["device"])
        attack = load_entry(body["attack"], local)
        if not isinstance(attack, Attack):
            raise InvalidOutput(f"{attack!r} is not an Attack")
        self.attack = attack
        facts = _facts(body["facts"])
        dtype = getattr(torch, facts.protocol.precision)
        chain = None if body["defense"] is None else load_chain(body["defense"], local)
        self.shape = RecoveryShape(**{**body["shape"], "input_shape": facts.input_spec.shape})
        auxiliary = message.tensors("auxiliary")
        self.knowledge: dict[str, Any] = {
            "facts": facts,
            "random": TrialRandom(message.tensors("seeds")["seeds"], device=self.device),
            "model": None,
            "auxiliary": None,
            "auxiliary_attribute": _to(auxiliary.get("attribute"), self.device),
            "defense": chain,
            "report": lambda progress: send(sock, "progress", progress),
        }
        if "model" in message.blobs:
            transform = chain or DefenseChain()
            self.knowledge["model"] = _model(message, transform, facts.input_spec.shape).to(self.device, dtype)
        self.dtype = dtype
        self.knowledge["auxiliary"] = self._examples(auxiliary, facts)
        self.candidates = self._examples(message.tensors("candidates"), facts)
        self.planted: list[Planted] = []
        self.evaluations = 0
        self.labels = message.tensors("labels").get("labels")
        self.order = message.tensors("order").get("order")
        self.prepared = {name: t.to(self.device) for name, t in message.tensors("prepared").items()}

    def _examples(self, packed: Mapping[str, Tensor], facts: Facts) -> tuple[Tensor, Tensor] | None:
        """Return inputs and labels of images that the attacker was handed, if any."""
        if not packed:
            return None
        inputs = to_inputs(packed["images"].numpy(), facts.input_spec, facts.normalised)
        return inputs.to(self.device, self.dtype), packed["labels"].to(self.device)

    def prepare(self, _: Message) -> Reply:
        """Run `Attack.prepare`."""
        try:
            result = self.attack.prepare(Knowledge(**self.knowledge))
        except (NotApplicable, NotGranted) as error:
            return "prepared", {"declined": error_line(error)}, {"prepared": {}}
        if not isinstance(result, dict) or not all(isinstance(v, Tensor) for v in result.values()):
            raise InvalidOutput("prepare() must return a dict of tensors")
        return "prepared", {}, {"prepared": {name: v.detach().cpu() for name, v in result.items()}}

    def plant(self, message: Message) -> Reply:
        """Run `Attack.plant`."""
        updates, _, _ = self._updates(message)
        model = self.knowledge["model"]
        if model is None:
            raise InvalidOutput("plants without knowing the model; add 'weights' to needs")
        cohort = Cohort(self.prepared, **self.knowledge)
        result = self.attack.plant(model, cohort, updates)
        self.evaluations += cohort.evaluations
        if not isinstance(result, dict) or not all(isinstance(v, Tensor) for v in result.values()):
            raise InvalidOutput("plant() must return a dict of tensors")
        self.planted.append(Planted(model, result, self.shape.clients))
        return "planted", {}, {"planted": {name: v.detach().cpu() for name, v in result.items()}}

    def run(self, message: Message) -> Reply:
        """Run `Attack.run` and check what it returns."""
        updates, statistics, shown = self._updates(message)
        if shown and self.knowledge["model"] is not None:
            self.knowledge["model"] = self.knowledge["model"].with_state(parameters=shown)
        seen = Seen(
            updates,
            labels=_to(self.labels, self.device),
            order=_to(self.order, self.device),
            prepared=self.prepared,
            statistics=statistics,
            planted=self.planted,
            candidates=self.candidates,
        )
        observation = Observation(seen, **self.knowledge)
        recovery = self.shape.check(self.attack.run(observation), frozenset({observation.target}))
        evaluations = recovery.model_evaluations
        count = observation.evaluations + self.evaluations if evaluations is None else evaluations
        return "recovery", {"model_evaluations": int(count)}, {"recovery": recovery.tensors()}

    def _updates(self, message: Message) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """Return the rounds' updates, and with the last one its BatchNorm statistics and the model as it was shown."""
        names = sorted((n for n in message.blobs if n.startswith("update")), key=lambda n: int(n[6:]))
        updates, statistics, shown = [], dict[str, Tensor](), dict[str, Tensor]()
        for name in names:
            sent = {k: v.to(self.device, self.dtype) for k, v in message.tensors(name).items()}
            statistics, shown = (_led(sent, lead) for lead in (STATISTICS, SHOWN))
            updates.append({k: v for k, v in sent.items() if not k.startswith((STATISTICS, SHOWN))})
        return updates, statistics, shown


def _led(tensors: Mapping[str, Tensor], lead: str) -> dict[str, Tensor]:
    return {name.removeprefix(lead): value for name, value in tensors.items() if name.startswith(lead)}


@dataclass(frozen=True)
class _Examples:
    """Training data as `leakbench.models.recipe` wants it."""

    images: Any
    labels: Any
    splits: dict[str, Any]
    input_spec: InputSpec
    num_classes: int
    fingerprint: str


def _build(message: Message, *, local: Local) -> Reply:
    """Apply a defense's change of the architecture, then the stage recipe: the one place where both meet."""
    body = message.body
    spec, recipe = InputSpec.model_validate_json(body["input_spec"]), body["recipe"]
    architecture = Architecture.model_validate_json(body["architecture"])
    transform = load_chain(body["defense"], local).model
    classes = body["num_classes"]
    if "seeds" in recipe:
        state = None
    else:
        data = {name: tensor.numpy() for name, tensor in message.tensors("data").items()}
        splits = {name: data[name] for name in ("private", "test")}
        examples = _Examples(data["images"], data["labels"], splits, spec, classes, recipe["fingerprint"])
        last = {}
        for draw in sorted(set(recipe["draws"])):
            for snapshot in train(
                architecture, examples, draw, normalise=recipe["normalise"], last=recipe["stage"], transform=transform
            ):
                last[draw] = snapshot.tensors
        state = {name: torch.cat([last[draw][name] for draw in recipe["draws"]]) for name in last[recipe["draws"][0]]}
    model = build_model(architecture, spec.shape, classes, state=state, seeds=recipe.get("seeds"), transform=transform)
    return "built", {"head": model.head}, {"model": model.tensors()}


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _model(message: Message, chain: DefenseChain, input_shape: tuple[int, ...]) -> Model:
    architecture = Architecture.model_validate_json(message.body["architecture"])
    inserted = message.body["insert"]

    def transform(module: nn.Module) -> nn.Module:
        return with_inserted(chain.model(module), inserted, input_shape)

    state = message.tensors("model")
    return build_model(architecture, input_shape, message.body["num_classes"], state=state, transform=transform)


def _facts(body: Mapping[str, Any]) -> Facts:
    return Facts(
        **{
            **body,
            "granted": frozenset(body["granted"]),
            "protocol": Protocol.model_validate_json(body["protocol"]),
            "client_sizes": None if body["client_sizes"] is None else tuple(body["client_sizes"]),
            "input_spec": InputSpec.model_validate_json(body["input_spec"]),
            "class_prior": None if body["class_prior"] is None else tuple(body["class_prior"]),
            "attribute": None if body["attribute"] is None else AttributeSpec.model_validate_json(body["attribute"]),
        }
    )


# --- errors -------------------------------------------------------------------------------------------------------


def _report(error: Exception) -> dict[str, Any]:
    text = str(error)
    starved = isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text
    status = "oom" if starved else "invalid" if isinstance(error, InvalidOutput) else "error"
    hint = ""
    if isinstance(error, PermissionError):
        hint = " (an entry may read its own file and the installed packages, and write to the working directory only)"
    return {
        "status": status,
        "error": error_line(error) + hint,
        "traceback": traceback.format_exc()[-TRACEBACK_LIMIT:],
    }

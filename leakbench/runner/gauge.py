"""The child's half of a measure: it runs where victims, model and defense are, and returns numbers only."""

from __future__ import annotations

import socket
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.errors import NotApplicable
from leakbench.measures.catalogue import MEASURES
from leakbench.measures.subject import ALL, Clients, Profile, Subject
from leakbench.metrics.stealth import NORMS
from leakbench.randomness import TrialRandom
from leakbench.runner.child import ClientRole, Reply
from leakbench.runner.loading import Local, error_line
from leakbench.runner.wire import Message, send
from leakbench.tasks import AttributeSpec

ENDS = ("values", "low", "high")
"""Tensors of a `Profile`."""


class MeasureRole(ClientRole):
    """The clients of one block under a measure.

    The request is that of `ClientRole`; its body also holds ``attribute`` (JSON of an `AttributeSpec`, or null),
    ``measure`` (name) and ``params``; further blobs are ``truth`` (T,) and ``auxiliary`` (images, labels, seeds, truth
    of trials of the auxiliary split).
    """

    def __init__(self, message: Message, local: Local, sock: socket.socket) -> None:
        spec = MEASURES.get(message.body["measure"])
        # Before the defense is imported, which shares this process.
        self.function = getattr(import_module(f"leakbench.measures.{spec.module}"), spec.name)
        super().__init__(message, local)
        self.sock = sock
        self.attribute = message.body["attribute"]
        self.truth = message.tensors("truth").get("truth")
        self.auxiliary = message.tensors("auxiliary")

    def rehearse(self, _: Message) -> Reply:
        """Compute the first trial's update, so that what the defense does wrong is not the measure's failure."""
        self.subject.part(0, 1).update()
        return "ready", {}, {}

    def measure(self, message: Message) -> Reply:
        """Compute the measure."""
        try:
            found = self.function(self.subject, **message.body["params"])
        except NotApplicable as error:
            return "measured", {"declined": error_line(error)}, {"measured": {}}
        layers = {**self.subject.layers, ALL: tuple(self.model.parameters)}
        sizes = {name: value[0].numel() for name, value in self.model.parameters.items()}
        body = {
            "layers": {layer: [sum(sizes[name] for name in own), self._kind(layer)] for layer, own in layers.items()},
            "quantities": {name: {"layers": list(p.layers), "n": p.n} for name, p in found.items()},
        }
        return "measured", body, {"measured": _tensors(found)}

    def _kind(self, layer: str) -> str | None:
        """Return what a layer does, in one word."""
        if layer == ALL:
            return None
        module = self.model.module.get_submodule(layer)
        if isinstance(module, NORMS):
            return "norm"
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return "convolution"
        return "linear" if isinstance(module, nn.Linear) else "other"

    @cached_property
    def subject(self) -> Subject:
        """The clients; the rehearsal and the measure look at the same."""
        auxiliary = None
        if own := self.auxiliary:
            random = TrialRandom(own["seeds"], device=self.device)
            auxiliary = self._clients(own["images"], own["labels"], random, truth=own.get("truth"))
        return self._clients(
            self.images, self.labels, self.random, order=self.order, truth=self.truth, auxiliary=auxiliary
        )

    def _clients(
        self,
        images: Tensor,
        labels: Tensor,
        random: TrialRandom,
        *,
        order: Tensor | None = None,
        truth: Tensor | None = None,
        auxiliary: Subject | None = None,
    ) -> Subject:
        """Return a subject for uint8 ``images`` (T, K, N, *shape) and ``labels`` (T, K, N)."""

        def report(progress: dict[str, Any]) -> None:
            send(self.sock, "progress", progress)

        flat = torch.cat([images[:, k, :size] for k, size in enumerate(self.sizes)], 1)
        return Subject(
            model=self.model,
            cohort=Clients(protocol=self.protocol, clients=self.clients, sizes=self.sizes, weights=self.weights),
            spec=self.spec,
            normalise=self.normalise,
            images=flat.to(self.device, self.model.dtype) / 255,
            labels=torch.cat([labels[:, k, :size] for k, size in enumerate(self.sizes)], 1).to(self.device),
            random=random,
            order=order,
            truth=truth,
            attribute=None if self.attribute is None else AttributeSpec.model_validate_json(self.attribute),
            auxiliary=auxiliary,
            report=report,
        )


def _tensors(found: dict[str, Profile]) -> dict[str, Tensor]:
    named = {f"{name}/{end}": getattr(profile, end) for name, profile in found.items() for end in ENDS}
    return {name: value.detach().double().cpu() for name, value in named.items() if value is not None}

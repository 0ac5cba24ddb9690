"""The models of a cohort whose server replaced parameters: one for all clients, or one each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from leakbench.models.functional import Model


class Planted:
    """What the clients of one round get.

    Args:
        model: The honest model, M = 1 or T.
        tensors: Replaced parameters by name, with a leading dimension of 1 (one for all) or K (one per client); where
            K = 1, also of T, because then every trial is a client.
        clients: K.
    """

    def __init__(self, model: Model, tensors: Mapping[str, Tensor], clients: int) -> None:
        self.honest = model
        self.tensors = {name: value.to(model.device, model.dtype) for name, value in tensors.items()}
        self.clients = clients

    @property
    def differs(self) -> bool:
        """Whether clients of one trial get different models."""
        return self.clients > 1 and any(len(value) > 1 for value in self.tensors.values())

    def model_of(self, client: int) -> Model:
        """Return what client ``client`` (from 0) gets, M = 1 or T."""
        own = {
            name: value[client : client + 1] if self.clients > 1 and len(value) > 1 else value
            for name, value in self.tensors.items()
        }
        return self.honest.with_state(parameters=own) if own else self.honest

    def mean(self, weights: Tensor) -> Model:
        """Return the mean of what the clients got, by their weights (K,): where an aggregate of weights starts."""
        own = {
            name: torch.tensordot(weights.to(value), value, 1)[None] if self.clients > 1 and len(value) > 1 else value
            for name, value in self.tensors.items()
        }
        return self.honest.with_state(parameters=own)

    def trials(self, first: int, last: int) -> Planted:
        """Return what the clients of trials ``first`` to ``last`` (exclusive) get."""
        own = {k: v[first:last] if self.clients == 1 and len(v) > 1 else v for k, v in self.tensors.items()}
        return Planted(self.honest.trials(first, last), own, self.clients)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """A hash per client, (K,): equal where clients got the same parameters."""
        found = []
        for k in range(self.clients):
            digest = hashlib.sha256()
            for name in sorted(self.tensors):
                value = self.tensors[name]
                own = value[k : k + 1] if self.clients > 1 and len(value) > 1 else value
                digest.update(f"{name} {tuple(own.shape)} ".encode() + own.cpu().contiguous().numpy().tobytes())
            found.append(digest.hexdigest())
        return tuple(found)

    def changed(self) -> dict[str, float]:
        """Return the share of the numbers of each replaced parameter that differ from the honest model's, by name."""
        shares = {}
        for name, value in self.tensors.items():
            old = self.honest.parameters[name]
            paired = self.clients == 1 and len(old) == len(value)
            shares[name] = float((value != (old if paired else old[:1])).double().mean())
        return shares

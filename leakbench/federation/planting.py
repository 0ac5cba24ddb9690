"""The models of a cohort whose server replaced parameters: one for all clients, or one each."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from leakbench.errors import InvalidOutput
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

    @cached_property
    def differs(self) -> bool:
        """Whether clients of one trial get different models."""
        return self.clients > 1 and any(bool((value != value[:1]).any()) for value in self.tensors.values())

    def model_of(self, client: int) -> Model:
        """Return what client ``client`` (from 0) gets, M = 1 or T."""
        own = {
            name: value[client : client + 1] if self._each_its_own(value) else value
            for name, value in self.tensors.items()
        }
        return self.honest.with_state(parameters=own) if own else self.honest

    def mean(self, weights: Tensor) -> Model:
        """Return the mean of what the clients got, by their weights (K,): where an aggregate of weights starts."""
        own = {
            name: torch.tensordot(weights.to(value), value, 1)[None] if self._each_its_own(value) else value
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
        shared, own = hashlib.sha256(), []
        for name, value in sorted(self.tensors.items()):
            if self._each_its_own(value):
                own.append(name)
            else:
                shared.update(_bytes(name, value))
        found = []
        for k in range(self.clients):
            digest = shared.copy()
            for name in own:
                digest.update(_bytes(name, self.tensors[name][k]))
            found.append(digest.hexdigest())
        return tuple(found)

    def _each_its_own(self, value: Tensor) -> bool:
        """Return whether the leading dimension of a tensor counts clients, not trials or one for all."""
        return self.clients > 1 and len(value) > 1


def _bytes(name: str, value: Tensor) -> bytes:
    return f"{name} {tuple(value.shape)} ".encode() + value.cpu().contiguous().numpy().tobytes()


def check_planted(planted: Mapping[str, Tensor], parameters: Mapping[str, Tensor], leading: Collection[int]) -> None:
    """Check what an attack planted.

    Args:
        planted: Replaced parameters by name.
        parameters: The honest model's, (M, *shape) by name.
        leading: The leading dimensions that a replaced one may have.

    Raises:
        InvalidOutput: A name or shape is not the model's, a tensor is not finite, or not for as many as allowed.
    """
    for name, tensor in planted.items():
        if name not in parameters or not tensor.dim() or tensor.shape[1:] != parameters[name].shape[1:]:
            raise InvalidOutput(f"{name!r} with shape {tuple(tensor.shape)} is no model parameter")
        finite = tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
        if tensor.shape[0] not in leading or not finite:
            raise InvalidOutput(f"{name!r} must be finite with a leading dimension in {sorted(leading)}")


def changed(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], clients: int) -> dict[str, float]:
    """Return the share of the numbers of each replaced parameter that differ from the honest model's, by name.

    Args:
        parameters: The honest model's, (M, *shape) by name.
        tensors: What was replaced; see `Planted`.
        clients: K.
    """
    shares = {}
    for name, value in tensors.items():
        old = parameters[name]
        paired = clients == 1 and len(old) == len(value)
        shares[name] = float((value.to(old) != (old if paired else old[:1])).double().mean())
    return shares

"""Clients on real digits for fitted measures: main task parity, attribute "at least five", pure batches."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from leakbench.federation.client import Client
from leakbench.measures.subject import Clients, Subject
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, AttributeSpec, InputSpec, Protocol


def digits():
    """Images (n, 1, 8, 8) in [0, 1] and digits (n,)."""
    data = load_digits()
    return data.images[:, None] / 16, data.target


def subject(
    *,
    images=None,
    digit=None,
    architecture="lenet_zhu",
    batch=4,
    trials=60,
    train=200,
    protocol=None,
    defense=None,
    truth=True,
    **params,
):
    """Return a subject with ``trials`` victims and ``train`` auxiliary trials, of disjoint halves of the examples."""
    if images is None:
        images, digit = digits()
    protocol, rng = protocol or Protocol(), np.random.default_rng(5)
    spec = InputSpec(shape=images.shape[1:])
    model = build_model(Architecture(name=architecture, params=params), spec.shape, 2, seeds=[3])
    client = Client(protocol, batch) if defense is None else Client(protocol, batch, defense)
    count, half = batch * protocol.local_batches, len(images) // 2

    def side(number, first, seed, auxiliary=None):
        has = rng.permutation(np.arange(number) % 2)
        pools = [first + np.flatnonzero((digit[first : first + half] >= 5) == value) for value in (0, 1)]
        rows = np.stack([rng.choice(pools[value], count, replace=False) for value in has])
        seeds = torch.from_numpy(np.random.default_rng(seed).integers(256, size=(number, 32)).astype(np.uint8))
        return Subject(
            model=model,
            cohort=Clients(protocol=protocol, clients=[client], sizes=[count], weights=[count]),
            spec=spec,
            normalise=False,
            images=torch.from_numpy(images[rows]).float(),
            labels=torch.from_numpy(digit[rows] % 2),
            random=TrialRandom(seeds),
            truth=torch.from_numpy(has) if truth else None,
            attribute=AttributeSpec(name="ge5") if truth else None,
            auxiliary=auxiliary,
        )

    return side(trials, half, 1, side(train, 0, 2))

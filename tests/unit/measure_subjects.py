"""Subjects of measures for tests: small float64 nets with private images, and Jacobians by differences."""

from __future__ import annotations

import torch
from plain_client import random

from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.measures.subject import ALL, Clients, Subject
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture, InputSpec, Protocol

C = 5
NETS = {
    "mlp": ("mlp", {"width": 6, "depth": 1}, (1, 4, 4)),
    "lenet": ("lenet_zhu", {}, (1, 6, 6)),
    "resnet20": ("resnet20", {"width": 1}, (1, 8, 8)),
    "convnet": ("convnet", {"width": 1}, (1, 9, 9)),
}


def net(name="mlp", draws=1, dtype=torch.float64):
    """Return a model with parameters and statistics away from their initial zeros and ones."""
    architecture, params, shape = NETS[name]
    model = build_model(Architecture(name=architecture, params=params), shape, C, seeds=range(draws)).to(dtype=dtype)
    stream = torch.Generator().manual_seed(7)

    def moved(value, scale):
        return (
            value + scale * torch.rand(value.shape, generator=stream).to(dtype) if value.is_floating_point() else value
        )

    return model.with_state(
        {k: moved(v, 0.1) for k, v in model.parameters.items()}, {k: moved(v, 0.3) for k, v in model.buffers.items()}
    )


def subject(name="mlp", protocol=None, parts=(), *, trials=2, batch=2, draws=1, dtype=torch.float64, **options):
    """Return a subject whose K clients hold ``batch`` examples per local batch, the last one more where K > 1."""
    protocol = protocol or Protocol()
    model = options.pop("model", None) or net(name, draws, dtype)
    sizes = [batch] * (protocol.clients - 1) + [batch + (protocol.clients > 1)]
    clients = [Client(protocol, size, DefenseChain(parts)) for size in sizes]
    held = [size * protocol.local_batches for size in sizes]
    stream = torch.Generator().manual_seed(11)
    images = torch.rand(trials, sum(held), *model.input_shape, generator=stream, dtype=torch.float64).to(dtype)
    given = {
        "images": images,
        "labels": torch.randint(C, (trials, sum(held)), generator=stream),
        "random": random(trials),
        "spec": InputSpec(shape=model.input_shape, mean=(0.4,), std=(0.25,)),
        "normalise": True,
        "cohort": Clients(protocol=protocol, clients=clients, sizes=held, weights=sizes),
    }
    return Subject(model=model, **(given | options))


def differences(sent, images, step=1e-6):
    """Return J (T, P, d) by layer of a function of images (T, n, *shape), by central differences."""
    flat = images.flatten(1)
    columns = []
    for i in range(flat.shape[1]):
        move = torch.zeros_like(flat)
        move[:, i] = step
        ahead, behind = (sent((flat + sign * move).view_as(images)) for sign in (1, -1))
        columns.append({layer: (ahead[layer] - behind[layer]) / (2 * step) for layer in ahead})
    return {layer: torch.stack([column[layer] for column in columns], 2) for layer in columns[0]}


def exact(whose):
    """Return the Jacobian (T, P, d) of a subject by layer and of all of them, by central differences."""
    found = differences(lambda images: whose.by_layer(whose.update(images)), whose.images)
    return found | {ALL: torch.cat(list(found.values()), 1)}


class Explicit(Subject):
    """A subject whose update is a given function of images (T, 1, 1, 1, d), one tensor per layer.

    Args:
        function: Images (T, d) to the update, (T, P_l) by layer.
        images: (T, d).
        auxiliary: A subject whose images and truth tell of an attribute.
    """

    def __init__(self, function, images, auxiliary=None):
        whose = subject(trials=len(images), batch=1)
        super().__init__(
            model=whose.model,
            cohort=whose.cohort,
            spec=whose.spec,
            normalise=False,
            images=images[:, None, None, None],
            labels=whose.labels,
            random=whose.random,
            auxiliary=auxiliary,
        )
        self.function = function
        self.layers = {layer: (layer,) for layer in function(images)}

    def update(self, images=None, labels=None, *, create_graph=False):
        return self.function((self.images if images is None else images).flatten(1))

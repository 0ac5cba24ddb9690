"""The reference for clients: one trial at a time, PyTorch's own modules and optimiser, float64."""

from __future__ import annotations

import importlib

import torch
from torch.nn.functional import cross_entropy

from leakbench.models.catalogue import architecture_spec
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture

C, T, B = 5, 3, 4
NETS = {
    "mlp": ({"width": 6, "depth": 1}, (1, 3, 3)),
    "lenet_zhu": ({}, (1, 5, 5)),
    "convnet": ({"width": 1}, (1, 9, 9)),
}


def make(name="mlp", draws=1):
    """Return a float64 model with parameters and statistics away from their initial zeros and ones."""
    params, shape = NETS[name]
    model = build_model(Architecture(name=name, params=params), shape, C, seeds=range(draws)).to(dtype=torch.float64)
    stream = torch.Generator().manual_seed(7)
    parameters = {k: v + 0.1 * torch.rand(v.shape, generator=stream) for k, v in model.parameters.items()}
    buffers = {k: v + 0.3 if v.is_floating_point() else v + 2 for k, v in model.buffers.items()}
    return model.with_state(parameters, buffers)


def examples(model, count, trials=T):
    stream = torch.Generator().manual_seed(11)
    inputs = torch.randn(trials, count, *model.input_shape, generator=stream, dtype=torch.float64)
    return inputs, torch.randint(C, (trials, count), generator=stream)


def random(trials=T, first=0):
    return TrialRandom(torch.arange(first * 32, (first + trials) * 32).view(trials, 32).to(torch.uint8))


def module(model, trial, training=False):
    """Return the plain PyTorch module with one trial's weights, BatchNorm layers in the given mode."""
    path, _, function = architecture_spec(model.architecture.name).build.partition(":")
    build = getattr(importlib.import_module(path), function)
    net = build(model.input_shape, C, **model.architecture.params).to(torch.float64)
    net.load_state_dict({k: v[min(trial, model.draws - 1)] for k, v in (model.parameters | model.buffers).items()})
    return net.train(training)


def batches_of(protocol, size):
    """Return the local steps' lists of example indices, from the protocol's words."""
    if protocol.batches == "same":
        return [list(range(size))] * protocol.local_steps
    distinct = protocol.batches_per_epoch if protocol.batches == "epochs" else protocol.local_steps
    one_pass = [list(range(i * size, (i + 1) * size)) for i in range(distinct)]
    return one_pass * (protocol.local_steps // distinct)


def train(model, trial, inputs, labels, protocol, batches, **loss):
    """Train one client of one trial; return what it sends and the buffers it is left with."""
    net = module(model, trial, protocol.batch_norm == "train")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    sgd = torch.optim.SGD(
        net.parameters(), lr=protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    for rows in batches:
        sgd.zero_grad()
        cross_entropy(net(inputs[rows]), labels[rows], reduction=protocol.reduction, **loss).backward()
        if protocol.sends != "gradient":
            sgd.step()
    with torch.no_grad():
        sent = {
            "gradient": lambda n, p: p.grad,
            "delta": lambda n, p: before[n] - p,
            "weights": lambda n, p: p.detach(),
        }[protocol.sends]
        return {n: sent(n, p) for n, p in net.named_parameters()}, dict(net.named_buffers())


def update(model, inputs, labels, protocol, size=B, order=None, **loss):
    """Return what T clients send, tensors (T, *shape) by name; with ``send_buffers`` the buffers as well."""
    rows = []
    for t in range(len(inputs)):
        batches = batches_of(protocol, size) if order is None else order[t].tolist()
        sent, buffers = train(model, t, inputs[t], labels[t], protocol, batches, **loss)
        rows.append({**sent, **buffers} if protocol.send_buffers else sent)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def close(actual, expected):
    assert actual.keys() == expected.keys()
    # Biases before a BatchNorm have gradient zero up to rounding, so the absolute part is shared by all tensors.
    atol = 1e-11 * max(float(v.abs().max()) for v in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")

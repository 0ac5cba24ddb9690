"""What a harness would hand to an image attack: blocks of real digits on nets of one's choice."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from leakbench import Observation
from leakbench.chain import DefenseChain
from leakbench.facts import Facts
from leakbench.federation.client import Client, ClientState, Received
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel


def digits():
    """Return scikit-learn's digits, (1797, 1, 8, 8) in [0, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.images)[:, None] / 16, torch.tensor(data.target)


def observe(
    *,
    trials=3,
    batch=1,
    net=None,
    own_models=False,
    dtype=torch.float64,
    labels=True,
    budget=None,
    defense=None,
    known=False,
    scale=1.0,
    withheld=(),
    reports=None,
    dataset=None,
    **protocol,
):
    """Return what the attacker sees, the private inputs (T, N, *shape) in [0, 1], and their labels (T, N).

    ``dataset`` is images (n, *shape) in [0, 1] and labels (n,); digits where None. ``known``: whether the attacker
    knows the defense, or chain of them (a tuple).
    """
    images, targets = dataset or digits()
    spec = InputSpec(shape=tuple(images.shape[1:]))
    protocol = Protocol(precision=str(dtype).removeprefix("torch."), **protocol)
    count = batch * protocol.local_batches
    picks = torch.randint(0, 1500, (trials, count), generator=torch.Generator().manual_seed(5))
    inputs, classes = images[picks].to(dtype), targets[picks]
    net = net or Architecture(name="lenet_zhu", init="uniform(0.5)")
    chain = DefenseChain(defense if isinstance(defense, tuple) else (defense,) if defense else ())
    seeds = range(trials if own_models else 1)
    model = build_model(net, spec.shape, 10, seeds=seeds, transform=chain.model).to(dtype=dtype)
    random = TrialRandom(torch.arange(trials * 32).reshape(trials, 32).to(torch.uint8))
    client = Client(protocol, batch, chain)
    state = ClientState()
    shown = client.shown(Received(model=model, state=state), inputs, classes, random=random)
    update = client.update(model, inputs, classes, random=random, state=state)
    facts = Facts(
        granted=ThreatModel(labels=labels, **dict.fromkeys(withheld, False)).granted(),
        protocol=protocol,
        input_spec=spec,
        normalised=False,
        num_classes=10,
        batch_size=batch,
        inputs_per_client=count,
        model_evaluations=budget,
        target="inputs",
    )
    seen = Seen([{n: scale * v for n, v in update.items()}], labels=classes[:, None] if labels else None)
    model = model.with_state(parameters=shown) if shown else model
    report = None if reports is None else reports.append
    chain = chain if known else None
    return Observation(seen, facts=facts, random=random, model=model, report=report, defense=chain), inputs, classes


def psnr(recovered, true):
    """Return the mean PSNR of every trial, the inputs in the order given."""
    error = (recovered.clamp(0, 1).double() - true.double()).square().flatten(2).mean(2)
    return (-10 * error.clamp(min=1e-12).log10()).mean(1)

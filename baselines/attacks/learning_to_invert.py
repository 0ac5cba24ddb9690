"""Learning to Invert: a net that was trained to turn updates into inputs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, NotApplicable, NotGranted, Observation, Recovery, UserError, register

LIMIT = 10.0
"""Largest standardised feature, so that updates of another size cannot overflow the inverter."""
LAYERS = 3
REUSE = 10
"""How many updates are simulated for each auxiliary input, at most."""


@register("learning_to_invert", version=1)
class LearningToInvert(Attack):
    """Learning to Invert: a multilayer perceptron trained on simulated updates of auxiliary data.

    Auxiliary inputs go through the task's own client, the granted defense with fresh randomness included, and a net
    with two hidden layers learns to give them back; its loss is the squared error of each image after the best
    assignment within a batch. As it learns on what the defense lets through, it is the adaptive attack on any defense.

    Sees: updates, weights, number of inputs, auxiliary data (distributed as the private ones), learning rate and number
    of local steps where more than a gradient is sent; the defense where it is granted, else it trains without. Meant
    for `model_draws: one`: an inverter serves one set of weights, and a model per trial costs a training per trial.

    Departures: features are standardised by the simulated updates, since updates of trained nets are tiny, where the
    released code feeds them as they are. Large updates are hashed into `features` entries with random signs; the size
    of the paper's hash was not at hand. All updates are simulated ahead of the training, where the released code draws
    noise and partners anew in each epoch; `simulations` says how many. The paper's sizes are width 3000 (10000 for
    batches of 4), lr 1e-4 and for batches of 4 epochs 5000, on a GPU; the defaults here suit a CPU. The released code
    keeps the epoch that does best on the test images; here the last one counts.

    Args:
        width: Units of each hidden layer.
        epochs: Passes over the simulated updates, no more than the suite's budget has evaluations; the learning rate
            falls to a tenth after three quarters.
        lr: Learning rate of Adam.
        batch: Updates of one training step.
        simulations: Most updates to simulate, at most ten for each auxiliary input; one where there is no defense and
            an update holds one input, as others would be the same.
        features: Entries of an update that the inverter reads; larger updates are hashed.

    Reference: Wu, Chen, Guo, Weinberger, "Learning To Invert: Simple Adaptive Attacks for Gradient Inversion in
    Federated Learning", UAI 2023, arXiv 2210.10880
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size", "weights", "auxiliary"})

    def __init__(
        self,
        *,
        width: int = 500,
        epochs: int = 200,
        lr: float = 1e-3,
        batch: int = 256,
        simulations: int = 10_000,
        features: int = 4096,
    ) -> None:
        if min(width, epochs, batch, simulations, features) < 1 or lr <= 0:
            raise UserError(
                "learning_to_invert: expected width, epochs, batch, simulations, features >= 1 and lr > 0, got "
                f"{width}, {epochs}, {batch}, {simulations}, {features}, {lr}; write learning_to_invert(width=500)"
            )
        self.width = width
        self.epochs = epochs
        self.lr = lr
        self.batch = batch
        self.simulations = simulations
        self.features = features

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Train an inverter for each of the M models; every tensor returned starts with M."""
        if knowledge.sends != "gradient":
            try:
                _ = knowledge.lr, knowledge.local_steps
            except NotGranted as error:
                raise NotApplicable(f"local steps cannot be simulated: {error}") from error
        updates, images = self._simulated(knowledge)
        mean = updates.mean(1, keepdim=True)
        spread = updates.std(1, keepdim=True, correction=0)
        floor = 0.01 * updates.square().mean((1, 2), keepdim=True).sqrt()
        scale = torch.maximum(spread, floor).clamp(min=torch.finfo(torch.float32).tiny)
        features = ((updates - mean) / scale).clamp(-LIMIT, LIMIT)
        sizes = [features.shape[2], self.width, self.width, images[0, 0].numel()]
        net: dict[str, Tensor] = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            for name, rows in ((f"weight{i}", fan_in), (f"bias{i}", 1)):
                net[name] = ((2 * knowledge.rand(rows, fan_out) - 1) / fan_in**0.5).requires_grad_()
        epochs = self.epochs if knowledge.budget is None else min(self.epochs, knowledge.budget)
        optimiser = torch.optim.Adam(net.values(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(0.75 * epochs)], gamma=0.1)
        models = torch.arange(len(features), device=features.device)[:, None]
        for epoch in range(epochs):
            order = knowledge.rand(features.shape[1]).argsort(1)
            for picks in torch.split(order, self.batch, 1):
                loss = matched_error(inverted(net, features[models, picks]), images[models, picks])
                optimiser.zero_grad()
                loss.sum().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            schedule.step()
            knowledge.progress(epoch + 1, epochs, float(loss.detach().mean()))
        return {"mean": mean, "scale": scale} | {name: value.detach() for name, value in net.items()}

    def run(self, observation: Observation) -> Recovery:
        """Apply the inverter to the updates; inputs (T, K * N, *input_shape)."""
        net = dict(observation.prepared)
        mean, scale = net.pop("mean"), net.pop("scale")
        features = ((self._vectors(observation, observation.update)[:, None] - mean) / scale).clamp(-LIMIT, LIMIT)
        pixels = inverted(net, features).reshape(observation.trials, -1, *observation.input_spec.shape)
        low, high = observation.bounds
        return Recovery(inputs=low + (high - low) * pixels, model_evaluations=0)

    def _simulated(self, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
        """Return updates (M, s, features) and the pixels (M, s, K * N, P) behind them."""
        inputs, labels = knowledge.auxiliary
        each, clients = knowledge.inputs_per_client, knowledge.clients
        total, models, count = knowledge.total_inputs, knowledge.trials, len(labels)
        defended = is_defended(knowledge)
        few = not defended and total == 1
        wanted = min(self.simulations, count * (1 if few else REUSE))
        rounds = -(-wanted * total // count)
        shuffled = torch.cat([knowledge.rand(count).argsort(1) for _ in range(rounds)], 1)
        picks = shuffled[:, : wanted * total].reshape(models, wanted, clients, each)
        together = models == 1  # several updates at once need weights that all share
        rows = torch.split(picks[0], 64) if together else [picks[:, i] for i in range(wanted)]
        vectors = []
        for row in rows:
            sent = [knowledge.simulate(inputs[row[:, k]], labels[row[:, k]]) for k in range(clients)]
            mean = {name: torch.stack([one[name] for one in sent]).mean(0) for name in sent[0]}
            vectors.append(self._vectors(knowledge, {name: value.detach() for name, value in mean.items()}))
        updates = torch.cat(vectors)[None] if together else torch.stack(vectors, 1)
        low, high = knowledge.bounds
        pixels = ((inputs - low) / (high - low)).float().flatten(1)
        return updates, pixels[picks.flatten(2)]

    def _vectors(self, knowledge: Knowledge, update: Mapping[str, Tensor]) -> Tensor:
        """Return the update as vectors (T, at most features) of float32."""
        difference = knowledge.difference(update)
        sent = [difference[name] for name in knowledge.model.parameter_names]
        flat = torch.cat([value.flatten(1) for value in sent], 1).float().nan_to_num()
        if flat.shape[1] <= self.features:
            return flat
        generator = torch.Generator().manual_seed(0)  # the same hash in training and use
        place = torch.randint(self.features, flat.shape[1:], generator=generator).to(flat.device)
        sign = 2.0 * torch.randint(2, flat.shape[1:], generator=generator).to(flat) - 1
        return flat.new_zeros(len(flat), self.features).index_add_(1, place, flat * sign)


def is_defended(knowledge: Knowledge) -> bool:
    """Return whether simulated clients defend themselves: they do where the defense is granted."""
    try:
        return bool(knowledge.defense.parts)
    except NotGranted:
        return False


def inverted(net: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return pixels (T, s, n * P) in [0, 1] for features (T, s, f); the net is shared or one for each T."""
    for i in range(LAYERS):
        features = features @ net[f"weight{i}"] + net[f"bias{i}"]
        features = features.relu() if i < LAYERS - 1 else features.sigmoid()
    return features


def matched_error(found: Tensor, images: Tensor) -> Tensor:
    """Return the mean squared error (T,) of images (T, s, n, P) in the best order of what was found (T, s, n * P)."""
    found = found.view_as(images)
    if images.shape[2] > 1:
        cost = torch.cdist(images, found.detach()).square().flatten(0, 1).cpu().numpy()
        order = torch.stack([torch.as_tensor(linear_sum_assignment(matrix)[1]) for matrix in cost])
        index = order.view(*images.shape[:3], 1).to(found.device).expand_as(found)
        found = found.gather(2, index)
    return F.mse_loss(found, images, reduction="none").mean((1, 2, 3))

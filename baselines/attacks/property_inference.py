"""Property inference: a random forest that tells updates of batches with an attribute from those without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

from leakbench import Attack, Knowledge, NotApplicable, NotGranted, Observation, Recovery, UserError, register

MIXES = (0.4, 0.6, 0.8, 1.0)
MOST = 5000
"""Entries of a weight beyond which only maxima of it are read."""
MEMORY = 1 << 25
"""Numbers of the simulated updates held at a time."""
LIMIT = 1e6
"""Largest standardised feature, so that updates of another size stay finite."""


@register("property_inference", version=1)
class PropertyInference(Attack):
    """Property inference: a random forest on what auxiliary batches with and without the attribute do to the weights.

    Half of the simulated clients hold batches of which 40, 60, 80 or all of 100 examples have the attribute, the other
    half none; they are the task's own client, with the granted defense. Read are absolute gradients of the weights, of
    a convolution the largest over the kernel's positions. Each update is scaled to norm 1, so that no learning rate
    matters. The other clients behind an aggregate hold no examples with the attribute.

    Sees: updates, weights, batch size, auxiliary data with the attribute, learning rate and number of local steps where
    more than a gradient is sent; the defense where it is granted.

    A re-implementation from the released code. Departures: all updates belong to the one model of the task, where the
    paper follows a training over thousands of rounds; convolutions with too many channels to be read (their product
    above 5000) are left out as there, but biases are the only other tensors that are. Clients that differ in size are
    simulated with their mean size.

    Args:
        simulations: Updates to simulate, half of them with the attribute.
        mixes: ``paper`` for the shares above in turn, ``task`` for the share that the task declares.
        trees: Trees of the forest.

    Reference: Melis, Song, De Cristofaro, Shmatikov, "Exploiting Unintended Feature Leakage in Collaborative
    Learning", IEEE S&P 2019, arXiv 1805.04049
    """

    recovers = frozenset({"attribute"})
    needs = frozenset({"auxiliary", "batch_size", "weights"})

    def __init__(self, *, simulations: int = 400, mixes: str = "paper", trees: int = 100) -> None:
        if simulations < 20 or trees < 1 or mixes not in ("paper", "task"):
            raise UserError(
                "property_inference: expected simulations >= 20, mixes paper or task, and trees >= 1, got "
                f"{simulations}, {mixes!r}, {trees}; write property_inference(mixes='task')"
            )
        self.simulations = simulations
        self.mixes = mixes
        self.trees = trees

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Return ``features`` (M, s, F) of simulated updates and their ``truth`` (s,)."""
        picks, truth = attribute_picks(knowledge, self.simulations, self.mixes)
        features = simulated(knowledge, picks, lambda _, change: weight_features(change))
        return {"features": features, "truth": truth}

    def run(self, observation: Observation) -> Recovery:
        """Fit the forest to the simulated updates, a forest per model, and ask it about each trial's."""
        features = weight_features(changed(observation, observation.update))

        def forest() -> RandomForestClassifier:
            return RandomForestClassifier(self.trees, min_samples_leaf=5, min_samples_split=5, random_state=0)

        return Recovery(scores=fitted_scores(forest, observation.prepared, features), model_evaluations=0)


def weight_features(change: Mapping[str, Tensor]) -> Tensor:
    """Return absolute entries of the weights of each row's update, (rows, F) float32 of norm 1."""
    parts = []
    for value in change.values():
        entries = value.detach().double().abs().nan_to_num()
        if entries.dim() > 3:  # a convolution
            entries = entries.flatten(3).amax(3).flatten(1)
            parts += [entries] if entries.shape[1] <= MOST else []
        elif entries.dim() > 2:  # a linear layer; its rows are the units
            parts.append(entries.flatten(1) if entries[0].numel() <= MOST else entries.amax(1))
    features = torch.cat(parts, 1)
    largest = features.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.nn.functional.normalize(features / largest, dim=1).float()


# --- shared with the other attacks on one bit ------------------------------------------------------------------------


def attribute_picks(knowledge: Knowledge, simulations: int, mixes: str) -> tuple[Tensor, Tensor]:
    """Return auxiliary examples (M, s, K, N) of simulated clients and whether the first has the attribute, (s,).

    Within a client examples are distinct as long as there are enough of a kind.

    Raises:
        NotApplicable: The auxiliary examples all have the attribute, or none has.
    """
    has = knowledge.auxiliary_attribute
    having, without = has.nonzero()[:, 0], (has == 0).nonzero()[:, 0]
    if min(len(having), len(without)) == 0:
        raise NotApplicable(
            f"{len(having)} auxiliary examples with the attribute and {len(without)} without: need both"
        )
    size, total, clients = knowledge.batch_size, knowledge.inputs_per_client, knowledge.clients
    batches = max(1, total // size)
    shares = MIXES if mixes == "paper" else (knowledge.attribute.mix,)
    spec = knowledge.attribute
    picks = []
    for i in range(simulations):
        share = spec.model_copy(update={"mix": shares[i // 2 % len(shares)]})
        count = share.of_batch(size) if i % 2 == 0 else 0
        others = shuffled(knowledge, without, clients * total)
        own = others[:, :total].reshape(knowledge.trials, batches, -1).clone()
        own[:, :, :count] = shuffled(knowledge, having, batches * count).view(knowledge.trials, batches, count)
        picks.append(torch.cat([own.flatten(1), others[:, total:]], 1).view(knowledge.trials, clients, total))
    truth = (torch.arange(simulations, device=has.device) + 1) % 2
    return torch.stack(picks, 1), truth


def shuffled(knowledge: Knowledge, pool: Tensor, count: int) -> Tensor:
    """Return ``count`` examples out of ``pool`` (n,) in a random order, again from its start when it runs out."""
    order = knowledge.rand(len(pool)).argsort(1)
    return pool[order[:, torch.arange(count, device=pool.device) % len(pool)]]


def changed(knowledge: Knowledge, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `Knowledge.difference` in the order of the model: what was sent may come in another one."""
    difference = knowledge.difference(update)
    return {name: difference[name] for name in knowledge.model.parameter_names}


def simulated(knowledge: Knowledge, picks: Tensor, reduce: Callable[[slice, dict[str, Tensor]], Tensor]) -> Tensor:
    """Return what ``reduce`` keeps of every simulated update, (M, s, F).

    Args:
        knowledge: Of the task.
        picks: (M, s, K, N) auxiliary examples of the clients.
        reduce: Gets which of the s updates, and what they changed, (rows, *shape) by name; rows are these updates where
            M = 1, else the M models. Returns (rows, F).

    Raises:
        NotApplicable: Local steps cannot be simulated.
    """
    if knowledge.sends != "gradient":
        try:
            _ = knowledge.lr, knowledge.local_steps
        except NotGranted as error:
            raise NotApplicable(f"local steps cannot be simulated: {error}") from error
    inputs, labels = knowledge.auxiliary
    models, count, clients, _ = picks.shape
    weights, numel = knowledge.client_weights, sum(value[0].numel() for value in knowledge.model.parameters.values())
    step = max(1, min(64, MEMORY // numel)) if models == 1 else 1  # several at once need weights that all share
    parts = []
    for first in range(0, count, step):
        rows = picks[:, first : first + step].flatten(0, 1)
        change: dict[str, Tensor] = {}
        for k in range(clients):
            sent = changed(knowledge, knowledge.simulate(inputs[rows[:, k]], labels[rows[:, k]]))
            for name, value in sent.items():
                share = float(weights[k]) * value.detach()
                change[name] = change[name] + share if name in change else share
        part = slice(first, min(first + step, count))
        parts.append(reduce(part, change).view(models, part.stop - first, -1))
        knowledge.progress(part.stop, count)
    return torch.cat(parts, 1)


def fitted_scores(classifier: Callable[[], Any], prepared: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return probabilities (T,) by a scikit-learn classifier that is fitted to the simulated updates of each model.

    Args:
        classifier: Makes an unfitted one.
        prepared: ``features`` (M, s, F) and ``truth`` (s,).
        features: (T, F) of the trials.
    """
    known, truth = prepared["features"].double(), prepared["truth"].cpu().numpy()
    mean, spread = known.mean(1, keepdim=True), known.std(1, keepdim=True, correction=0)
    scale = torch.where(spread > 0, spread, 1)
    asked = features.double()[None] if len(known) == 1 else features.double()[:, None]
    asked, known = (((rows - mean) / scale).nan_to_num().clamp(-LIMIT, LIMIT).cpu() for rows in (asked, known))
    scores = [
        classifier().fit(train.numpy(), truth).predict_proba(test.numpy())[:, 1]
        for train, test in zip(known, asked, strict=True)
    ]
    return torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in scores]).clamp(0, 1)

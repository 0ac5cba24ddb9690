"""Learned labels: a regression that was fitted to turn defended updates into label counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from leakbench_baselines.attacks.bias_count import round_to_total
from scipy.stats import gamma
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, NotApplicable, NotGranted, Observation, Recovery, UserError, register

LIMIT = 10.0
"""Largest standardised feature, so that updates of another size cannot overflow the regression."""
REUSE = 5
"""How many updates are simulated for each auxiliary input, at most."""
TOGETHER = 64
TRUST = (0.0, 0.1, 1.0)
"""By what hashed features, which are many, are multiplied beside those of the last layer's rows; the best is taken."""
PENALTIES = tuple(10.0**power for power in range(-2, 6))


@register("learned_labels", version=1)
class LearnedLabels(Attack):
    """Learned labels: label counts by ridge regression on simulated updates of auxiliary data.

    Auxiliary examples go through the task's own client, the granted defense with fresh randomness included. Features of
    an update are the row sums, row norms and bias of the last layer's gradient, each of its rows hashed, the norms of
    all tensors, and all other entries hashed. Its penalties are chosen by leave-one-out. As it is fitted to
    what the defense lets through, it is the adaptive attack on labels for any defense.

    How the private labels were drawn is not known: simulated clients draw theirs from class proportions that are drawn
    from a Dirichlet distribution around the granted prior (else the auxiliary frequencies), nearly that prior itself
    for some and nearly one class for others.

    Sees: updates, weights, number of inputs, auxiliary labelled data, learning rate and number of local steps where
    more than a gradient is sent; the class prior and the defense where granted. Meant for `model_draws: one`: a model
    per trial costs a regression per trial.

    Args:
        simulations: Most updates to simulate, at most five for each auxiliary input.
        row_features: Entries into which a row of the last layer's gradient is hashed.
        rest_features: Entries into which the other tensors are hashed.

    Reference: none; after the auxiliary-data label attacks (Wainakh et al., PoPETs 2022, arXiv 2105.09369) and learned
    inversion (Wu et al., UAI 2023, arXiv 2210.10880)
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"auxiliary", "batch_size", "weights"})

    def __init__(self, *, simulations: int = 4000, row_features: int = 16, rest_features: int = 256) -> None:
        if min(simulations, row_features, rest_features) < 1:
            raise UserError(
                "learned_labels: expected simulations, row_features, rest_features >= 1, got "
                f"{simulations}, {row_features}, {rest_features}; write learned_labels(simulations=4000)"
            )
        self.simulations = simulations
        self.row_features = row_features
        self.rest_features = rest_features

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Fit a regression for each of the M models; every tensor returned starts with M."""
        if knowledge.sends != "gradient":
            try:
                _ = knowledge.lr, knowledge.local_steps
            except NotGranted as error:
                raise NotApplicable(f"local steps cannot be simulated: {error}") from error
        updates, shares = self._simulated(knowledge)
        mean = updates.mean(1, keepdim=True)
        spread = updates.std(1, keepdim=True, correction=0)
        # A feature that hardly varies is rounding errors, not information.
        scale = torch.where(spread > 1e-5 * mean.abs(), spread, torch.inf).clamp(min=1e-300)
        features = ((updates - mean) / scale).clamp(-LIMIT, LIMIT)
        center = shares.mean(1, keepdim=True)
        known = self._known(knowledge)
        best = shares.new_full((len(shares),), torch.inf)
        weight = shares.new_zeros(len(shares), features.shape[2], shares.shape[2])
        for trust in TRUST:
            factor = torch.where(torch.arange(features.shape[2], device=features.device) < known, 1.0, trust)
            found, lost = ridge(features * factor, shares - center)
            weight = torch.where((lost < best)[:, None, None], found * factor[:, None], weight)
            best = torch.minimum(lost, best)
        return {"mean": mean, "scale": scale, "weight": weight, "center": center}

    def run(self, observation: Observation) -> Recovery:
        """Estimate label counts (T, 1, C)."""
        fitted = observation.prepared
        vectors = self._vectors(observation, observation.update)[:, None]
        features = ((vectors - fitted["mean"]) / fitted["scale"]).clamp(-LIMIT, LIMIT)
        share = (features @ fitted["weight"] + fitted["center"])[:, 0]
        return Recovery(label_counts=round_to_total(share, observation.total_inputs)[:, None], model_evaluations=0)

    def _simulated(self, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
        """Return features (M, s, f) of updates and the shares (M, s, C) of the classes behind them, in float64."""
        inputs, labels = knowledge.auxiliary
        sizes = knowledge.client_sizes.tolist()
        weights = knowledge.client_weights.tolist()
        wanted = min(self.simulations, REUSE * len(labels))
        together = TOGETHER if knowledge.trials == 1 else 1  # several updates at once need weights that all share
        vectors, shares = [], []
        for first in range(0, wanted, together):
            rows = min(together, wanted - first)
            sent: dict[str, Tensor] = {}
            counts = torch.zeros((), dtype=torch.float64)
            for size, weight in zip(sizes, weights, strict=True):
                picks = draw_examples(knowledge, labels, rows, size).flatten(0, 1)
                for name, value in knowledge.simulate(inputs[picks], labels[picks]).items():
                    sent[name] = sent.get(name, 0) + weight * value.detach()
                counts = counts + F.one_hot(labels[picks], knowledge.num_classes).double().sum(1)
            models = knowledge.trials
            vectors.append(self._vectors(knowledge, sent).view(models, rows, -1))
            shares.append((counts / sum(sizes)).view(models, rows, -1))
            knowledge.progress(first + rows, wanted)
        return torch.cat(vectors, 1), torch.cat(shares, 1)

    def _known(self, knowledge: Knowledge) -> int:
        """Return how many features come first that are not hashed."""
        names = knowledge.model.parameter_names
        biased = f"{knowledge.model.head}.bias" in names
        return (2 + biased) * knowledge.num_classes + len(names)

    def _vectors(self, knowledge: Knowledge, update: Mapping[str, Tensor]) -> Tensor:
        """Return the features (T, f) of an update, in float64; hashed ones come last."""
        changed = {name: value.double().nan_to_num() for name, value in knowledge.difference(update).items()}
        head = changed.pop(f"{knowledge.model.head}.weight")
        bias = changed.get(f"{knowledge.model.head}.bias")
        parts = [head.sum(2), head.norm(dim=2), *([] if bias is None else [bias])]
        parts.append(torch.stack([value.flatten(1).norm(dim=1) for value in [head, *changed.values()]], 1))
        parts.append(hashed(head, self.row_features).flatten(1))
        if changed:
            rest = torch.cat([value.flatten(1) for value in changed.values()], 1)
            parts.append(hashed(rest, self.rest_features))
        return torch.cat(parts, 1)


def draw_examples(knowledge: Knowledge, labels: Tensor, rows: int, count: int) -> Tensor:
    """Return places (M, rows, ``count``) of auxiliary examples whose classes follow proportions of their own.

    Args:
        knowledge: Its streams give the draws, its prior the mean of the proportions where granted.
        labels: (n,) classes of the auxiliary examples.
        rows: Updates to draw for.
        count: Examples of each.
    """
    members = F.one_hot(labels, knowledge.num_classes).sum(0)
    prior = members.double() / len(labels)
    if knowledge.grants("label_prior"):
        granted = knowledge.class_prior * (members > 0)
        prior = granted / granted.sum() if float(granted.sum()) > 0 else prior
    together = 10 ** (3 * knowledge.rand(rows, 1).double())  # from about one class to about the prior
    uniform = knowledge.rand(rows, knowledge.num_classes).double().clamp(1e-6, 1 - 1e-6)
    shape = (together * prior).clamp(min=1e-3).cpu().numpy()
    mass = torch.from_numpy(gamma.ppf(uniform.cpu().numpy(), shape)).to(prior) * (prior > 0) + 1e-12 * prior
    edges = (mass / mass.sum(2, keepdim=True)).cumsum(2)
    drawn = torch.searchsorted(edges, knowledge.rand(rows, count).double() * edges[..., -1:], right=True)
    owned = members > 0
    drawn = drawn.clamp(max=int(owned.nonzero().max()))
    place = (knowledge.rand(rows, count).double() * members[drawn]).long().minimum(members[drawn] - 1)
    return labels.argsort(stable=True)[(members.cumsum(0) - members)[drawn] + place]


def hashed(values: Tensor, size: int) -> Tensor:
    """Return ``values`` (..., n) as they are, or hashed into ``size`` entries with random signs where n is larger."""
    count = values.shape[-1]
    if count <= size:
        return values
    generator = torch.Generator().manual_seed(0)  # the same hash when fitted and used
    place = torch.randint(size, (count,), generator=generator).to(values.device)
    sign = 2.0 * torch.randint(2, (count,), generator=generator).to(values) - 1
    return values.new_zeros(*values.shape[:-1], size).index_add_(values.dim() - 1, place, values * sign)


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights (M, f, C) of ridge regressions and their mean squared leave-one-out errors (M,).

    The penalty of each is the one with the least error.

    Args:
        features: (M, s, f), centered.
        targets: (M, s, C), centered.
    """
    left, values, right = torch.linalg.svd(features, full_matrices=False)
    moments = left.mT @ targets  # (M, r, C)
    best = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    weights = features.new_zeros(len(features), features.shape[2], targets.shape[2])
    for penalty in PENALTIES:
        kept = values.square() / (values.square() + penalty)  # (M, r)
        residual = targets - left @ (kept[..., None] * moments)
        leverage = (left.square() * kept[:, None]).sum(2) + 1 / features.shape[1]
        error = (residual / (1 - leverage.clamp(max=1 - 1e-6))[..., None]).square().mean((1, 2))
        found = right.mT @ ((values / (values.square() + penalty))[..., None] * moments)
        better = error < best
        best = torch.where(better, error, best)
        weights = torch.where(better[:, None, None], found, weights)
    return weights, best

"""Recovering Labels from local Updates."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.bias_count import round_to_total
from leakbench_baselines.attacks.llg_star import piece_size
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register

CLOSE = 0.1
BOUND = 1e4
TINY = 1e-300


@register("rlu", version=1)
class RLU(Attack):
    """RLU: label counts from the bias gradient and the model's erroneous confidences, followed over local steps.

    The erroneous confidence e of a class is its mean probability for auxiliary examples of other classes; the counts
    are proportional to the positive part of e - db. Over several local steps e changes: the shift of the mean logits mu
    is simulated from the counts, mu <- mu - lr |O|^2 (softmax(mu) - n / N) with O the mean features, and compared with
    that of the returned model, starting from counts by that model's confidences. Labels move from the class that
    overshoots most to the one that undershoots most, one for each distinct batch, until all are within 0.1 or at most
    ``refinements`` times; then the counts follow from e averaged over the simulated steps.

    Sees: the whole update; weights, auxiliary labelled data, batch size, local steps, learning rate.

    A re-implementation. It differs from the released code in that there the simulated logits of all classes are
    compared with one and the same entry of the returned model's, one step is missing from the simulation, and rho (for
    momentum) is taken from another parameter: here classes are compared with themselves after all steps, for plain SGD
    (rho = 1). e is the measured mean of probabilities, which the code replaces by softmax(mu), and over local steps it
    changes in the ratio in which softmax(mu) does. O is the ratio of weight to bias gradient by least squares over
    classes: the plain mean that the code takes has no bound where an entry of the bias gradient is near 0.

    Args:
        refinements: Most moves of labels between classes.

    Reference: Chen, Vikalo, "Recovering Labels from Local Updates in Federated Learning", ICML 2024, arXiv 2405.00955
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"auxiliary", "batch_size", "head_bias", "local_steps", "lr", "weights"})
    reads = ("*",)

    def __init__(self, *, refinements: int = 5) -> None:
        if refinements < 0:
            raise UserError(f"rlu: refinements: expected at least 0, got {refinements}; write rlu(refinements=5)")
        self.refinements = refinements

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure erroneous logits ``mu`` (M, C) and confidences ``e`` (M, C) of the model that is sent out."""
        mu, e = _erroneous(knowledge, {})
        return {"mu": mu, "e": e}

    def run(self, observation: Observation) -> Recovery:
        """Estimate label counts (T, 1, C)."""
        db = observation.mean_head_bias.double()
        total = observation.total_inputs
        confidence = observation.prepared["e"].expand_as(db)
        if observation.local_steps > 1:
            confidence = (confidence * self._drift(observation, db, total)).clamp(max=1)
        return Recovery(label_counts=_counts(confidence, db, total)[:, None])

    def _drift(self, observation: Observation, db: Tensor, total: int) -> Tensor:
        """Return by which factor (T, C) the confidences of the local steps are, on average, those of the first."""
        steps, lr = observation.local_steps, observation.lr
        unit = observation.inputs_per_client // observation.batch_size  # one label in each of the client's batches
        target, late = _erroneous(observation, _returned(observation))
        first = observation.prepared["mu"].expand_as(db)
        features = (db[:, :, None] * observation.mean_head_weight).sum(1) / db.square().sum(1, keepdim=True)
        rate = lr * features.square().sum(1, keepdim=True).nan_to_num(0.0).clamp(max=BOUND)

        def simulate(counts: Tensor) -> tuple[Tensor, Tensor]:
            mu, seen = first, []
            for _ in range(steps):
                seen.append(mu.softmax(1))
                mu = (mu - rate * (seen[-1] - counts / total)).clamp(-BOUND, BOUND)
            return mu, torch.stack(seen).mean(0)

        counts = _counts(late, db, total)
        for _ in range(self.refinements):
            gap = simulate(counts)[0] - target
            over = torch.where(counts >= unit, gap, -torch.inf).argmax(1, keepdim=True)
            under = gap.argmin(1, keepdim=True)
            astray = gap.abs().amax(1, keepdim=True) >= CLOSE
            moves = astray & (gap.gather(1, over) >= 0) & (gap.gather(1, under) < 0) & (counts.gather(1, over) >= unit)
            moved = moves.long() * unit
            counts = counts.scatter_add(1, over, -moved).scatter_add(1, under, moved)
        drift: Tensor = simulate(counts)[1] / first.softmax(1).clamp(min=TINY)
        return drift


def _counts(confidence: Tensor, db: Tensor, total: int) -> Tensor:
    """Return counts (T, C) in proportion to the positive part of what the bias gradient leaves unexplained."""
    counts: Tensor = round_to_total(confidence - db, total)
    return counts


def _returned(observation: Observation) -> dict[str, Tensor]:
    """Return the parameters (T, *shape) of the model that the clients sent back."""
    sent, old = observation.update, observation.model.parameters
    return {name: sent[name] if observation.sends == "weights" else value - sent[name] for name, value in old.items()}


def _erroneous(knowledge: Knowledge, replaced: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean logits and mean probabilities (M, C) in each class over auxiliary examples of other classes.

    Every one of the other classes weighs the same. ``replaced`` are parameters that take the place of the model's.
    """
    inputs, labels = knowledge.auxiliary
    model = knowledge.model.with_state(parameters=replaced)
    parts = (part.expand(model.draws, *part.shape) for part in torch.split(inputs, piece_size(knowledge)))
    logits = torch.cat([knowledge.forward(part, model=model)[0].double() for part in parts], 1)
    members = F.one_hot(labels, knowledge.num_classes).double()  # (n, C)
    owned = (members.sum(0) > 0).double()
    others = owned[:, None] - owned.diag()  # (C, C): which classes weigh in the mean of a class
    weights = (members / members.sum(0).clamp(min=1)) @ (others / others.sum(0).clamp(min=1))
    return (logits * weights).sum(1), (logits.softmax(2) * weights).sum(1)

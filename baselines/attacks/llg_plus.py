"""Label Leakage from Gradients, the variant that studies the model on auxiliary data first."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.llg import extract_counts
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register


@register("llg_plus", version=1)
class LLGPlus(Attack):
    """LLG+: LLG with the impact and the offset of a class measured on auxiliary data.

    `prepare` computes the gradients of batches whose labels are all one class: the class's own row sum gives the
    impact m of one occurrence, the other rows' sums give their offsets s.

    Sees: gradient of the last layer's weight; auxiliary labelled data, batch size, local steps, learning rate.

    Differs from the released code where that mixes units for several local steps: there m of one step is divided by
    their number and s of one step is taken off a sum over all; here m stays and s is multiplied by their number. The
    batches go round the auxiliary examples of a class in their given order, and a class without examples takes no part.

    Args:
        rounds: Batches per class (R).

    Reference: Wainakh, Ventola, Müßig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Mühlhäuser, "User-Level Label
    Leakage from Gradients in Federated Learning", PoPETs 2022, arXiv 2105.09369
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"auxiliary", "batch_size", "local_steps", "lr", "weights"})
    reads = ("head.weight",)

    def __init__(self, *, rounds: int = 10) -> None:
        if rounds < 1:
            raise UserError(f"llg_plus: rounds: expected at least 1, got {rounds}; write llg_plus(rounds=10)")
        self.rounds = rounds

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure ``impact`` (M,) and ``offset`` (M, C) in units of one local step's gradient."""
        inputs, labels = knowledge.auxiliary
        batch, classes = knowledge.batch_size, knowledge.num_classes
        owned = torch.unique(labels)
        members = [(labels == label).nonzero()[:, 0] for label in owned]
        rounds = []
        for r in range(self.rounds):
            turn = torch.arange(r * batch, (r + 1) * batch, device=labels.device)
            picks = torch.stack([rows[turn % len(rows)] for rows in members])
            rounds.append(_signals(knowledge, inputs[picks], labels[picks]))
            knowledge.progress(r + 1, self.rounds)
        signals = torch.stack(rounds).mean(0)
        own = signals[:, torch.arange(len(owned), device=owned.device), owned]
        others = owned[:, None] != torch.arange(classes, device=owned.device)
        return {
            "impact": own.mean(1) / batch * (1 + 1 / classes),
            "offset": (signals * others).sum(1) / others.sum(0).clamp(min=1),
        }

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        g = observation.head_weight.sum(-1)
        steps, clients = observation.local_steps, observation.clients
        total = observation.inputs_per_client * clients
        # A label counts once in every local step that its example is part of, and the clients' updates are averaged.
        weight = steps * observation.batch_size / total
        impact = (observation.prepared["impact"] * weight).expand(len(g))
        offset = (observation.prepared["offset"] * steps).expand_as(g)
        return Recovery(label_counts=extract_counts(g, impact, total, offset=offset, capped=True)[:, None])


def _signals(knowledge: Knowledge, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the row sums (M, P, C) of the gradients of P batches (P, B, *input_shape)."""
    name, draws = f"{knowledge.model.head}.weight", knowledge.model.draws

    def sums(x: Tensor, y: Tensor) -> Tensor:
        return knowledge.gradients(x, y, names=[name], create_graph=False)[name].sum(-1)

    if draws == 1:  # the batches take the place of the trials
        return sums(inputs, labels)[None]
    return torch.stack(
        [sums(x.expand(draws, *x.shape), y.expand(draws, -1)) for x, y in zip(inputs, labels, strict=True)], 1
    )

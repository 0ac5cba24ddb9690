"""Label Leakage from Gradients, the variant that studies the model on auxiliary data first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from leakbench_baselines.attacks.llg_star import counts_by_impact, impact_and_offset, one_class_signals, piece_size
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register


@register("llg_plus", version=2)
class LLGPlus(Attack):
    """LLG+: LLG with the impact and the offset of a class measured on auxiliary data.

    `prepare` looks at batches whose labels are all one class: the class's own row sum gives the impact m of one
    occurrence, the other rows' sums give their offsets s.

    Sees: gradient of the last layer's weight; auxiliary labelled data, batch size, local steps, learning rate.

    Differs from the released code where that mixes units for several local steps: there m of one step is divided by
    their number and s of one step is taken off a sum over all; here everything is a mean over examples. The batches go
    round the auxiliary examples of a class in their given order, and a class without examples takes no part. An example
    that is in several batches is looked at once, unless BatchNorm makes it depend on the rest of the batch.

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
        """Measure ``impact`` (M,) and ``offset`` (M, C) of the mean over a batch's examples."""
        inputs, labels = knowledge.auxiliary
        per_class = self.rounds * knowledge.batch_size
        owned, members = torch.unique(labels, return_counts=True)
        turn = torch.arange(per_class, device=labels.device) % members[:, None]
        picks = labels.argsort(stable=True)[turn + (members.cumsum(0) - members)[:, None]].flatten()
        times = torch.ones_like(picks)
        if not knowledge.examples_interact:
            picks, times = torch.unique(picks, return_counts=True)
        classes = torch.arange(knowledge.num_classes, device=labels.device)
        share = (labels[picks] == classes[:, None]) * times.double() / per_class
        size = piece_size(knowledge)

        def pieces() -> Iterator[tuple[Tensor, Tensor]]:
            for done in range(0, len(picks), size):
                yield inputs[None, picks[done : done + size]], share[:, done : done + size]
                knowledge.progress(min(done + size, len(picks)), len(picks))

        signals = one_class_signals(knowledge, pieces())
        measured: dict[str, Tensor] = impact_and_offset(signals, torch.isin(classes, owned))
        return measured

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        return Recovery(label_counts=counts_by_impact(observation, capped=True)[:, None])

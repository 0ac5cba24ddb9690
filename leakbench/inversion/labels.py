"""Labels of the candidates: granted, or recovered first by any registered label attack."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench.attack import FACTS, NEEDS, Attack
from leakbench.entries import Call, parse_expression
from leakbench.errors import NotGranted, UserError
from leakbench.knowledge import Knowledge
from leakbench.observation import Observation
from leakbench.runner.loading import load_entry
from leakbench.sources import EntrySource, find_source

JOINT = "joint"
"""Labels are optimised together with the inputs."""
_PREFIX = "labels/"
_GRANTS = NEEDS - FACTS


class LabelSource:
    """Where an inversion has its labels from.

    Args:
        name: `JOINT`, or an expression that names a label attack, e.g. ``llg``; it runs where labels are not granted.

    Raises:
        UserError: There is no such attack, or it recovers no labels.
    """

    def __init__(self, name: str) -> None:
        self.joint = name == JOINT
        self.name = name
        self._attack: Attack | None = None

    @property
    def attack(self) -> Attack:
        """The label attack."""
        if self._attack is None:
            call, source = self._named()
            entry = load_entry({**source.request(), "kind": "attack", "name": source.name, "params": call.params}, {})
            if not isinstance(entry, Attack) or "labels" not in entry.recovers:
                raise UserError(f"labels={self.name!r}: expected 'joint' or an attack that recovers labels, e.g. 'llg'")
            self._attack = entry
        return self._attack

    def check(self) -> None:
        """Look the name up, without importing the entry.

        Raises:
            UserError: It names no installed attack, or several.
        """
        if not self.joint:
            self._named()

    def _named(self) -> tuple[Call, EntrySource]:
        calls = parse_expression(self.name)
        if len(calls) != 1 or calls[0].ref.endswith(".py") or ".py:" in calls[0].ref:
            raise UserError(f"labels={self.name!r}: expected 'joint' or one installed label attack, e.g. 'llg'")
        return calls[0], find_source("attack", calls[0].ref)

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Return what the label attack prepares, under names of its own.

        Raises:
            NotGranted: The label attack needs what the task does not grant.
        """
        if self.joint or knowledge.grants("labels"):
            return {}
        missing = [need for need in sorted(self.attack.needs & _GRANTS) if not knowledge.grants(need)]
        if missing:
            raise NotGranted(f"labels={self.name!r} needs {', '.join(missing)}; give another label attack")
        return {_PREFIX + name: value for name, value in self.attack.prepare(knowledge.asking("labels")).items()}

    def labels(self, observation: Observation) -> Tensor | None:
        """Return labels (T, K * N), or None where they are optimised."""
        if self.joint:
            return None
        try:
            return observation.labels
        except NotGranted:
            pass
        prepared = {k.removeprefix(_PREFIX): v for k, v in observation.prepared.items() if k.startswith(_PREFIX)}
        counts = self.attack.run(observation.asking("labels").with_prepared(prepared)).label_counts
        if counts is None:
            raise UserError(f"labels={self.name!r} returned no label counts")
        return labels_of_counts(counts.sum(1), observation.total_inputs)


def labels_of_counts(counts: Tensor, total: int) -> Tensor:
    """Return labels (T, ``total``), ascending: each class as often as counts (T, C) say.

    Too few are filled up by going through the claimed classes again, commonest first; of too many the rarest are left
    out. Without a claim every label is class 0.
    """
    order = counts.argsort(dim=1, descending=True, stable=True)
    claimed = counts.gather(1, order)
    left = torch.full_like(counts[:, 0], total)
    kept = torch.zeros_like(claimed)
    while bool((left > 0).any()):
        taken = torch.minimum(claimed, (left[:, None] - (claimed.cumsum(1) - claimed)).clamp(min=0))
        none = taken.sum(1) == 0
        taken[:, 0] += torch.where(none, left, 0)
        kept += taken
        left = left - taken.sum(1)
    full = torch.zeros_like(kept).scatter(1, order, kept)
    classes = torch.arange(counts.shape[1], device=counts.device).repeat(len(counts))
    return classes.repeat_interleave(full.flatten()).view(len(counts), total)

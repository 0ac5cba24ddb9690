"""Label Leakage from Gradients, the variant that studies the model on dummies first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from leakbench_baselines.attacks.llg import extract_counts
from leakbench_baselines.attacks.random_image import uniform_pixels
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register


def piece_size(knowledge: Knowledge) -> int:
    """Return how many examples to run at once: the client's batch where examples of a batch depend on each other.

    Otherwise as many as fit in memory, by their shape alone: a trial must not depend on the others of its block.
    """
    return (
        knowledge.batch_size if knowledge.examples_interact else max(1, 2**17 // math.prod(knowledge.input_spec.shape))
    )


def one_class_signals(knowledge: Knowledge, pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Measure the class signals of undefended batches that hold one class only.

    An example x with label c adds (p_j(x) - [j = c]) * (sum of x's features) to the signal of class j, so one pass over
    the examples serves all batches and labels, and no gradient is formed.

    Args:
        knowledge: What holds the model.
        pieces: Inputs (M or 1, n, *input_shape) with their shares (C, n) in the mean over
            the batches of a class; a class's shares sum to 1, or to 0 if it has no batches.

    Returns:
        (M, C, C) float64: row c holds the mean signals of the batches labelled c, for a loss that is averaged.
    """
    draws = knowledge.model.draws
    signals = torch.zeros((), dtype=torch.float64, device=knowledge.model.device)
    for inputs, share in pieces:
        logits, features = knowledge.forward(inputs.expand(draws, *inputs.shape[1:]))
        mass = features.double().sum(-1)
        signals = signals + share @ (logits.double().softmax(-1) * mass[..., None]) - (mass @ share.T).diag_embed()
    return signals


def impact_and_offset(signals: Tensor, owned: Tensor) -> dict[str, Tensor]:
    """Return ``impact`` (M,) of a whole batch of a class on its signal, and ``offset`` (M, C) by the other classes.

    Args:
        signals: (M, C, C) of `one_class_signals`.
        owned: (C,) which classes there were batches of.
    """
    classes = len(owned)
    others = owned[:, None] & ~torch.eye(classes, dtype=torch.bool, device=owned.device)
    return {
        "impact": signals.diagonal(dim1=1, dim2=2)[:, owned].mean(1) * (1 + 1 / classes),
        "offset": (signals * others).sum(1) / others.sum(0).clamp(min=1),
    }


def counts_by_impact(observation: Observation, *, capped: bool) -> Tensor:
    """Extract label counts (T, C) with the prepared ``impact`` and ``offset``."""
    g = observation.mean_head_weight.sum(-1)
    total = observation.total_inputs
    # The signal is a mean over all examples behind the update: an occurrence is one of them, an offset is one for all.
    impact = (observation.prepared["impact"] / total).expand(len(g))
    offset = observation.prepared["offset"].expand_as(g)
    counts: Tensor = extract_counts(g, impact, total, offset=offset, capped=capped)
    return counts


@register("llg_star", version=1)
class LLGStar(Attack):
    """LLG*: LLG with the impact and the offset of a class measured on dummies.

    `prepare` looks at batches of dummies that are all labelled as one class: the class's own row sum gives the impact m
    of one occurrence, the other rows' sums give their offsets s. A class whose row sum is negative counts once; the
    rest goes, label by label, to the class of least remaining signal.

    Sees: gradient of the last layer's weight; weights, batch size, local steps, learning rate.

    Differs from the released code where that mixes units for several local steps: there m of one step is divided by
    their number and s of one step is taken off a sum over all; here everything is a mean over examples. Random dummies
    are uniform over the valid pixels (there: integers up to 2**24, which saturate any net), and the same ones carry
    every label in turn. Constant dummies are all alike, so that one round of them is enough. The authors chose zeros
    for MNIST and CelebA, ones for CIFAR-100 and random dummies for SVHN, all on a sigmoid net; the default here suits
    ReLU nets too, whose features are small or nil for a constant image.

    Args:
        dummies: Pixels of a dummy: ``zeros``, ``ones`` (least and greatest valid value) or ``random``.
        rounds: Batches per class (R) of random dummies.

    Reference: Wainakh, Ventola, Müßig, Keim, Garcia Cordero, Zimmer, Grube, Kersting, Mühlhäuser, "User-Level Label
    Leakage from Gradients in Federated Learning", PoPETs 2022, arXiv 2105.09369
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "local_steps", "lr", "weights"})
    reads = ("head.weight",)

    def __init__(self, *, dummies: str = "random", rounds: int = 10) -> None:
        if dummies not in ("zeros", "ones", "random"):
            raise UserError(f"llg_star: dummies: expected 'zeros', 'ones' or 'random', got {dummies!r}; write one")
        if rounds < 1:
            raise UserError(f"llg_star: rounds: expected at least 1, got {rounds}; write llg_star(rounds=10)")
        self.dummies = dummies
        self.rounds = rounds

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure ``impact`` (M,) and ``offset`` (M, C) of the mean over a batch's examples."""
        classes = knowledge.num_classes
        device = knowledge.model.device
        signals = one_class_signals(knowledge, self._pieces(knowledge))
        return impact_and_offset(signals, torch.ones(classes, dtype=torch.bool, device=device))

    def _pieces(self, knowledge: Knowledge) -> Iterator[tuple[Tensor, Tensor]]:
        model = knowledge.model
        low, high = (bound.to(model.device, model.dtype) for bound in knowledge.bounds)
        alike = self.dummies != "random"
        # Without BatchNorm, dummies that are alike also pass alike.
        count = 1 if alike and not knowledge.examples_interact else knowledge.batch_size
        rounds = 1 if alike else self.rounds
        share = torch.full((knowledge.num_classes, count), 1 / (rounds * count), dtype=torch.float64)
        for done in range(rounds):
            if alike:
                dummies = (low if self.dummies == "zeros" else high).expand(1, count, *model.input_shape)
            else:
                dummies = uniform_pixels(knowledge, count, model.dtype)
            yield dummies, share.to(model.device)
            knowledge.progress(done + 1, rounds)

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        return Recovery(label_counts=counts_by_impact(observation, capped=False)[:, None])

"""How well label counts were recovered: pure functions over trials.

Every function takes true and recovered counts, int64 (T, K, C), and returns (T,) float64: the value of each client,
averaged over the K clients. Formulas and sources are in `leakbench.metrics.METRICS`. A batch is a multiset, so order
never counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leakbench.errors import InvalidOutput


def _over_clients(values: Tensor) -> Tensor:
    return values.double().mean(dim=1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, and 0 where whole is 0."""
    return torch.where(whole > 0, part.double() / whole.clamp(min=1).double(), 0.0)


def _hits(true: Tensor, recovered: Tensor) -> Tensor:
    return torch.minimum(true, recovered).sum(dim=-1)


def instance_recall(true: Tensor, recovered: Tensor) -> Tensor:
    """Share of the true labels that were claimed, with multiplicity (LLG's attack success rate).

    Divided by max(N, M), not N: an attack that claims more labels than there are would otherwise reach 1 for nothing.
    While M <= N it is the recall, and with M = N all definitions in use agree.
    """
    return _over_clients(_ratio(_hits(true, recovered), torch.maximum(true.sum(dim=-1), recovered.sum(dim=-1))))


def instance_precision(true: Tensor, recovered: Tensor) -> Tensor:
    """Share of the claimed labels that are true, with multiplicity; equals the recall when M = N."""
    return _over_clients(_ratio(_hits(true, recovered), recovered.sum(dim=-1)))


def irec(true: Tensor, recovered: Tensor) -> Tensor:
    """IRec: hits over N, whatever was claimed beside them: only to compare with papers. The recall while M <= N."""
    return _over_clients(_ratio(_hits(true, recovered), true.sum(dim=-1)))


def count_exact_match(true: Tensor, recovered: Tensor) -> Tensor:
    """1 where every count is right, else 0."""
    return _over_clients((true == recovered).all(dim=-1))


def _presence(true: Tensor, recovered: Tensor) -> tuple[Tensor, Tensor]:
    both = ((true > 0) & (recovered > 0)).sum(dim=-1)
    return _ratio(both, (recovered > 0).sum(dim=-1)), _ratio(both, (true > 0).sum(dim=-1))


def presence_precision(true: Tensor, recovered: Tensor) -> Tensor:
    """Share of the claimed classes that are present."""
    return _over_clients(_presence(true, recovered)[0])


def presence_recall(true: Tensor, recovered: Tensor) -> Tensor:
    """Share of the present classes that are claimed."""
    return _over_clients(_presence(true, recovered)[1])


def presence_f1(true: Tensor, recovered: Tensor) -> Tensor:
    """Harmonic mean of presence precision and recall; 0 where both are."""
    precision, recall = _presence(true, recovered)
    total = precision + recall
    return _over_clients(torch.where(total > 0, 2 * precision * recall / total.clamp(min=1e-300), 0.0))


def set_exact_match(true: Tensor, recovered: Tensor) -> Tensor:
    """1 where the claimed classes are the present ones, else 0."""
    return _over_clients(((true > 0) == (recovered > 0)).all(dim=-1))


def class_accuracy(true: Tensor, recovered: Tensor) -> Tensor:
    """LeAcc: share of all classes whose presence is right. Absent ones count as hits: only to compare with papers."""
    return _over_clients(((true > 0) == (recovered > 0)).double().mean(dim=-1))


def count_accuracy(true: Tensor, recovered: Tensor) -> Tensor:
    """LnAcc: share of all classes whose count is right. Absent ones count as hits: only to compare with papers."""
    return _over_clients((true == recovered).double().mean(dim=-1))


def count_accuracy_present(true: Tensor, recovered: Tensor) -> Tensor:
    """Share of right counts among the classes that are present or claimed."""
    relevant = (true > 0) | (recovered > 0)
    return _over_clients(_ratio(((true == recovered) & relevant).sum(dim=-1), relevant.sum(dim=-1)))


def l1_count_error(true: Tensor, recovered: Tensor) -> Tensor:
    """Sum of absolute count errors over N; lower is better."""
    return _over_clients(_ratio((true - recovered).abs().sum(dim=-1), true.sum(dim=-1)))


def total_variation(true: Tensor, recovered: Tensor) -> Tensor:
    """Total variation between the two label distributions; 1, the worst, where nothing is claimed."""
    claimed = recovered.sum(dim=-1)
    p, q = _ratio(true, true.sum(dim=-1, keepdim=True)), _ratio(recovered, claimed.unsqueeze(-1))
    return _over_clients(torch.where(claimed > 0, (p - q).abs().sum(dim=-1) / 2, 1.0))


LABEL_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        instance_recall,
        instance_precision,
        irec,
        count_exact_match,
        presence_precision,
        presence_recall,
        presence_f1,
        set_exact_match,
        class_accuracy,
        count_accuracy,
        count_accuracy_present,
        l1_count_error,
        total_variation,
    )
}
"""The label metrics by name."""


def score_labels(true: Tensor, recovered: Tensor) -> dict[str, Tensor]:
    """Score recovered label counts with every label metric.

    Args:
        true: (T, K, C) int64 counts of each client's labels.
        recovered: (T, K, C) int64 claimed counts, or (T, 1, C) where the attack claims the union of the clients; it is
            then scored against the sum over clients.

    Returns:
        (T,) float64 per metric name.

    Raises:
        InvalidOutput: The claim has another shape or a negative count.
    """
    trials, _, classes = true.shape
    if recovered.shape != true.shape and recovered.shape != (trials, 1, classes):
        raise InvalidOutput(
            f"label counts: expected shape {tuple(true.shape)} or {(trials, 1, classes)}, got {tuple(recovered.shape)}"
        )
    if bool((recovered < 0).any()):
        raise InvalidOutput("label counts: expected counts of at least 0, got a negative one")
    if recovered.shape[1] != true.shape[1]:
        true = true.sum(dim=1, keepdim=True)
    return {name: metric(true, recovered) for name, metric in LABEL_METRICS.items()}

"""What a suite says of federated training, by which a defense's utility is measured. No torch here.

All defenses get the same rounds, clients, seeds and learning rates to choose from: an equal budget.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from leakbench.parts import Axis, Part, axis
from leakbench.tasks import Architecture, Protocol

SLOTS = 1 << 16
"""Trial numbers of a federation; see `leakbench.utility.kept.Kept.trial`."""
IID = "iid"
"""The partition that gives every client as many examples, drawn uniformly."""


def dirichlet_alpha(partition: str) -> float | None:
    """Return alpha of ``dirichlet(alpha)``, None of ``iid``.

    Raises:
        ValueError: It is neither.
    """
    if partition == IID:
        return None
    inner = re.fullmatch(r"dirichlet\((\d+\.?\d*|\.\d+)\)", partition.replace(" ", ""))
    if inner is None or float(inner[1]) <= 0:
        raise ValueError(f"partition: expected iid or dirichlet(ALPHA), e.g. dirichlet(0.5); got {partition!r}")
    return float(inner[1])


def _spelled(partition: str) -> str:
    """Return the one spelling of a partition, so that equal ones have equal hashes."""
    alpha = dirichlet_alpha(partition)
    return IID if alpha is None else f"dirichlet({alpha:g})"


Partition = Annotated[str, AfterValidator(_spelled)]
_Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], axis(), Field(min_length=1)]


class UtilityGrid(Part):
    """Federated trainings from scratch: the product of the axes, under every defense, learning rate and seed."""

    dataset: Axis[str]
    """Names in leakbench.data or ``.npz`` files. Training and the choice of the learning rate use the private split,
    accuracy the test split."""
    architecture: Annotated[tuple[Architecture, ...], axis("name"), Field(min_length=1)]
    """Names, or mappings with name, init, params."""
    protocol: Annotated[tuple[Protocol, ...], axis("sends"), Field(min_length=1)] = (Protocol(),)
    """What a client does in a round and sends, as in a task; its ``lr`` is replaced by those of the training. With
    ``sends: gradient`` the server takes the step."""
    partition: Axis[Partition] = (IID, "dirichlet(0.5)", "dirichlet(0.1)")
    """How examples are spread over clients: ``iid``, or ``dirichlet(alpha)``: a class's over the clients in
    proportions ~ symmetric Dirichlet(alpha) (Yurochkin et al. 2019, arXiv 1905.12022)."""
    defenses: Annotated[tuple[str, ...], axis()] = ()
    """Defense expressions; empty for those of the suite's grids. The undefended client is always trained, too."""
    clients: Annotated[int, Field(ge=1)] = 10
    """Clients; all take part in every round, weighted by their numbers of examples."""
    rounds: Annotated[int, Field(ge=1)]
    """Rounds."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per local batch (B)."""
    lr: _Rates = (0.1,)
    """Learning rates to choose from, for every defense and partition by itself: that of the best accuracy on a
    held-out part of the private split, with the first seed. Of equal ones the first."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Repetitions: another init, partition and order of examples each, the same for all defenses."""
    holdout: Annotated[float, Field(ge=0.01, lt=1)] = 0.1
    """Share of the private split that is held out; at least 50 examples are."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Rounds between evaluations; the last round is always evaluated."""
    normalise: bool = True
    """Whether inputs are normalised."""
    keep: Annotated[int, Field(ge=0)] = 2
    """Pairs (round, client) of each training whose update is kept, for attacks at stage ``in_training``."""

    @model_validator(mode="after")
    def _a_round_is_one_of_every_client(self) -> UtilityGrid:
        for protocol in self.protocol:
            if protocol.clients > 1 or protocol.rounds > 1 or protocol.secure_aggregation:
                raise ValueError(
                    "protocol: expected what one client does in one round; write clients and rounds beside protocol"
                )
            if protocol.batch_norm == "train" and not protocol.send_buffers:
                raise ValueError(
                    "protocol: batch_norm: train needs send_buffers: true, or the server's net has no running "
                    "statistics to be evaluated with"
                )
        if self.keep > self.clients * self.rounds:
            raise ValueError(f"keep: expected at most clients * rounds, {self.clients * self.rounds}, got {self.keep}")
        return self

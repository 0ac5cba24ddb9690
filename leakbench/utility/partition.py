"""Who holds which examples in a federated training, and in which order they come. No torch here.

Every draw is keyed by the season and by names that hold no defense and no learning rate: comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leakbench import keys
from leakbench.data.loading import Dataset
from leakbench.data.sampling import Uniforms, proportions
from leakbench.errors import Unavailable
from leakbench.utility.spec import dirichlet_alpha

Ints = npt.NDArray[np.int64]

LEAST = 10
"""Fewest examples of a client; a partition with fewer is drawn anew (as Li et al. 2022, arXiv 2102.02079)."""
LEAST_HELD = 50
"""Fewest examples by which learning rates are chosen."""
MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Shares:
    """The private split, cut.

    Args:
        holdout: int64 indices into the dataset, by which learning rates are chosen.
        clients: int64 indices of every client's examples.
    """

    holdout: Ints
    clients: list[Ints]

    @property
    def sizes(self) -> list[int]:
        """Numbers of examples, (K,)."""
        return [len(rows) for rows in self.clients]


def cut(data: Dataset, partition: str, *, clients: int, holdout: float, seed: int, key: bytes) -> Shares:
    """Hold a share of the private split out and spread the rest over clients.

    What is held out depends on the dataset and the share alone, the rest on the partition, clients and seed, too.

    Args:
        data: The dataset.
        partition: ``iid``: sizes as equal as whole numbers allow; ``dirichlet(alpha)``: each class's examples in
            proportions ~ symmetric Dirichlet(alpha) over the clients.
        clients: K.
        holdout: Share of the private split; at least `LEAST_HELD` examples are held out.
        seed: Number of the repetition.
        key: The season's key.

    Raises:
        Unavailable: There are too few examples for so many clients.
    """
    rows = data.rows("private")
    names: tuple[object, ...] = (data.fingerprint, holdout)
    shuffled = _shuffled(rows, keys.derive(key, "utility-holdout", *names))
    held = max(LEAST_HELD, round(holdout * len(rows)))
    left, alpha = np.sort(shuffled[held:]), dirichlet_alpha(partition)
    if len(left) < LEAST * clients:
        raise Unavailable(
            f"{data.spec.name}: expected at least {LEAST} examples for each of {clients} clients, got {len(left)} for "
            "all; lower clients or holdout"
        )
    names = (*names, partition, clients, seed)
    if alpha is None:
        return Shares(
            shuffled[:held], np.array_split(_shuffled(left, keys.derive(key, "utility-iid", *names)), clients)
        )
    for draw in range(MOST_DRAWS):
        own = _label_skew(left, data.labels[left], alpha, clients, keys.derive(key, "utility-skew", *names, draw))
        if min(map(len, own)) >= LEAST:
            return Shares(shuffled[:held], own)
    raise Unavailable(
        f"{data.spec.name}: {partition} left a client with less than {LEAST} examples {MOST_DRAWS} times; lower "
        "clients or raise alpha"
    )


def _label_skew(rows: Ints, labels: Ints, alpha: float, clients: int, key: bytes) -> list[Ints]:
    """Spread each class's rows over clients in Dirichlet proportions."""
    present = np.unique(labels)
    shares = proportions(alpha, Uniforms(key), len(present), clients)
    own: list[list[Ints]] = [[] for _ in range(clients)]
    for label, share in zip(present, shares, strict=True):
        members = _shuffled(rows[labels == label], keys.derive(key, "class", int(label)))
        ends = np.rint(np.cumsum(share)[:-1] * len(members)).astype(np.int64)
        for mine, part in zip(own, np.split(members, ends), strict=True):
            mine.append(part)
    return [np.concatenate(parts) for parts in own]


def batches(shares: Shares, count: int, rounds: int, names: Sequence[object], key: bytes) -> Ints:
    """Return which examples every client takes in every round, int64 (rounds, K, count) indices into the dataset.

    A client goes through its examples in a random order, again and again, each time in another one; where it has fewer
    than ``count``, some come more than once in a round.

    Args:
        shares: Who holds which.
        count: Examples of a round (N).
        rounds: Rounds.
        names: What the order belongs to, beside the client.
        key: The season's key.
    """
    taken = np.empty((rounds, len(shares.clients), count), dtype=np.int64)
    for k, rows in enumerate(shares.clients):
        turns = -(-rounds * count // len(rows))
        passes = [_shuffled(rows, keys.derive(key, "utility-order", *names, k, turn)) for turn in range(turns)]
        taken[:, k] = np.concatenate(passes)[: rounds * count].reshape(rounds, count)
    return taken


def _shuffled(rows: Ints, key: bytes) -> Ints:
    """Return ``rows`` in a random order; raw words, since shuffles change with NumPy."""
    words = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(len(rows))
    return np.asarray(rows[np.argsort(words, kind="stable")])

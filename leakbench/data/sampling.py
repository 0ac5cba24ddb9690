"""Drawing the private batches of a trial, and label counts under the same law for chance levels.

A bit generator's raw words are fixed by NumPy's compatibility policy (NEP 19) while the methods of ``Generator`` are
not, so everything here maps raw words of Philox by hand: victims do not change with a NumPy release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leakbench import keys
from leakbench.data.loading import Dataset
from leakbench.errors import Unavailable
from leakbench.tasks import BatchSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PADDING = -1
"""Index and label of an example that a client of a cohort of unequal sizes lacks."""

_ANY = -1
_CHUNK_WORDS = 2_000_000


@dataclass(frozen=True, eq=False)
class Victims:
    """The private examples of T trials with K clients; a client's N = S * B examples are its S batches in order.

    Args:
        indices: int64 (T, K, N) into the dataset, distinct within a trial.
        inputs: uint8 (T, K, N, *shape).
        labels: int64 (T, K, N).

    N is the largest client's; what a smaller one lacks has index and label `PADDING`, and black inputs.
    """

    indices: Ints
    inputs: npt.NDArray[np.uint8]
    labels: Ints

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """Which examples there are, bool (K * N,); the same in every trial."""
        return np.asarray(self.indices[0] != PADDING).reshape(-1)


class _Uniforms:
    """A stream of uniforms in [0, 1) with 53 bits."""

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(key=int.from_bytes(key[:16], "little"))

    def __call__(self, *shape: int) -> Floats:
        words = np.asarray(self._bits.random_raw(int(np.prod(shape))), dtype=np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


class _Pool:
    """The examples of a split that a trial has not used yet, by class."""

    def __init__(self, members: list[Ints]) -> None:
        self.members = members
        self.left = np.array([len(m) for m in members], dtype=np.int64)
        self._moved: dict[tuple[int, int], int] = {}

    def take(self, label: int, u: float, v: float) -> int:
        """Remove and return one example of class ``label``, or of the whole pool if none is left or any will do."""
        if label == _ANY or self.left[label] == 0:
            ends = np.cumsum(self.left)
            label = int(np.searchsorted(ends, int(u * ends[-1]), side="right"))
        # Fisher-Yates on a list that is only written down where it was changed.
        last = int(self.left[label]) - 1
        position = int(v * (last + 1))
        taken = self._moved.get((label, position), position)
        self._moved[label, position] = self._moved.get((label, last), last)
        self.left[label] = last
        return int(self.members[label][taken])


def draw_victims(
    dataset: Dataset,
    batch: BatchSpec,
    *,
    clients: int,
    local_batches: int,
    trials: Sequence[int],
    key: bytes,
    split: str = "private",
) -> Victims:
    """Draw the private examples of some trials.

    A trial's examples depend on ``key``, the dataset's fingerprint, ``split``, ``batch``, ``clients``,
    ``local_batches`` and the trial's number, and on nothing else: not on which other trials are drawn, and not on
    model, attack or defense, so comparisons are paired. Within a trial every example is used once, across clients and
    batches. Where a class has no unused example left, the example comes from all that are left.

    The samplers, over the classes that the split holds:
        ``iid``: examples uniformly. ``unique``: B different classes in each batch. ``unbalanced``: floor(B/2) examples
        of class a, floor(B/4) of class b != a, the rest iid, with one (a, b) for all batches of a client (Wainakh et
        al. 2022, arXiv 2105.09369; there the rest has uniform labels). ``single_class``: one class, uniform, for all
        batches of a client. ``balanced``: the same ``classes`` distinct classes, uniform, in all batches of a client, B
        examples spread over them as evenly as whole numbers allow. ``dirichlet``: labels from a client's proportions ~
        symmetric Dirichlet(alpha).

    Args:
        dataset: Where the examples come from.
        batch: Batch size (B) and sampler.
        clients: Clients behind one update (K).
        local_batches: Distinct batches per client (S).
        trials: Trial numbers, length T.
        key: The season's key.
        split: Which split to draw from.

    Raises:
        Unavailable: The split holds fewer examples or classes than one trial needs.
    """
    rows = dataset.rows(split)
    specs = [batch.of_client(k) for k in range(clients)]
    total = sum(spec.size for spec in specs) * local_batches
    if total > len(rows):
        raise Unavailable(
            f"batch larger than its split: expected at most {len(rows)} examples in {split!r} of "
            f"{dataset.spec.name}, got {clients} clients x {local_batches} batches x "
            f"{'/'.join(map(str, batch.sizes or (batch.size,)))} = {total}; "
            "lower the batch size, local_steps or clients"
        )
    labels = dataset.labels[rows]
    members = [rows[labels == c] for c in range(dataset.num_classes)]
    present = np.flatnonzero([len(m) for m in members])
    for spec in set(specs):
        _check_classes(spec, len(present), f"{split!r} of {dataset.spec.name}")
    names = (dataset.fingerprint, split, batch.content(), clients, local_batches)
    indices = np.full((len(trials), clients, local_batches * batch.size), PADDING)
    for t, trial in enumerate(trials):
        uniforms = _Uniforms(keys.derive(key, "victim", *names, int(trial)))
        pool = _Pool(members)
        for k, spec in enumerate(specs):
            own = _draw_client(spec, pool, present, local_batches, uniforms, f"client {k + 1} of {clients}")
            indices[t, k, : len(own)] = own
    inputs, drawn = dataset.images[indices], dataset.labels[indices]
    inputs[indices == PADDING], drawn[indices == PADDING] = 0, PADDING
    return Victims(indices=indices, inputs=inputs, labels=drawn)


def draw_label_counts(
    batch: BatchSpec,
    class_prior: Floats,
    *,
    clients: int = 1,
    local_batches: int = 1,
    draws: int,
    key: bytes,
) -> Ints:
    """Draw label counts under the law of `draw_victims`, for chance levels.

    The pool is infinite: examples are drawn with replacement, classes never run out.

    Args:
        batch: Batch size (B) and sampler.
        class_prior: Class frequencies of the split, (C,).
        clients: Clients whose labels are counted together; 1 gives the counts of one client.
        local_batches: Distinct batches per client (S).
        draws: Number of draws.
        key: Chance levels are public: `leakbench.keys.PUBLIC_KEY`.

    Returns:
        int64 (draws, C); each row sums to clients * S * B.

    Raises:
        Unavailable: The prior has fewer classes than a batch needs.
    """
    prior = np.asarray(class_prior, dtype=np.float64)
    present = np.flatnonzero(prior)
    _check_classes(batch, len(present), "the class prior")
    uniforms = _Uniforms(keys.derive(key, "label_counts", batch.content(), clients, local_batches))
    counts = np.empty((draws * clients, len(present)), dtype=np.int64)
    step = max(1, _CHUNK_WORDS // (local_batches * max(batch.size, len(present))))
    for start in range(0, len(counts), step):
        chunk = counts[start : start + step]
        chunk[:] = _counts(batch, prior[present] / prior.sum(), len(chunk), local_batches, uniforms)
    full = np.zeros((draws, len(prior)), dtype=np.int64)
    full[:, present] = counts.reshape(draws, clients, len(present)).sum(axis=1)
    return full


def _check_classes(batch: BatchSpec, present: int, where: str) -> None:
    needed = {
        "unique": batch.size,
        "unbalanced": 2 if batch.size >= 4 else 1,
        "balanced": batch.classes or 1,
    }.get(batch.sampler, 1)
    if needed > present:
        lower = "classes" if batch.sampler == "balanced" else "the batch size"
        raise Unavailable(
            f"sampler {batch.sampler} with batch size {batch.size}: expected at least {needed} classes in {where}, "
            f"got {present}; lower {lower} or use sampler iid"
        )


def _draw_client(
    batch: BatchSpec, pool: _Pool, present: Ints, local_batches: int, uniforms: _Uniforms, who: str
) -> Ints:
    """Return the examples of one client of a trial, (S * B,)."""
    taken = np.empty((local_batches, batch.size), dtype=np.int64)
    order = present[np.argsort(uniforms(len(present)), kind="stable")]
    cdf = None if batch.alpha is None else _proportions(batch.alpha, uniforms, 1, len(present))[0].cumsum()
    for s in range(local_batches):
        wanted = np.full(batch.size, _ANY)
        if batch.sampler == "unique":
            order = present[np.argsort(uniforms(len(present)), kind="stable")]
            wanted = order[pool.left[order] > 0][: batch.size]
            if len(wanted) < batch.size:
                raise Unavailable(
                    f"sampler unique: expected {batch.size} classes with unused examples for batch {s + 1} of "
                    f"{local_batches} of {who}, got {len(wanted)}; "
                    "lower the batch size, local_steps or clients"
                )
        elif batch.sampler == "unbalanced":
            half, quarter = batch.size // 2, batch.size // 4
            wanted[:half] = order[0]
            wanted[half : half + quarter] = order[min(1, len(order) - 1)]
        elif batch.sampler == "single_class":
            wanted[:] = order[0]
        elif batch.classes is not None:
            wanted = order[np.arange(batch.size) % batch.classes]
        elif cdf is not None:
            drawn = np.searchsorted(cdf, uniforms(batch.size), side="right")
            wanted = present[np.minimum(drawn, len(present) - 1)]
        for i, (u, v) in enumerate(uniforms(batch.size, 2)):
            taken[s, i] = pool.take(int(wanted[i]), u, v)
    return taken.reshape(-1)


def _counts(batch: BatchSpec, prior: Floats, draws: int, local_batches: int, uniforms: _Uniforms) -> Ints:
    """Return label counts of ``draws`` clients, (draws, classes that are present)."""
    classes, size = len(prior), local_batches * batch.size
    counts = np.zeros((draws, classes), dtype=np.int64)
    each = np.arange(draws)
    if batch.sampler == "unique":
        order = uniforms(draws * local_batches, classes).argpartition(batch.size - 1, axis=1)[:, : batch.size]
        return _tally(order.reshape(draws, size), classes)
    if batch.sampler == "single_class":
        counts[each, (uniforms(draws) * classes).astype(np.int64)] = size
        return counts
    if batch.classes is not None:
        order = uniforms(draws, classes).argsort(axis=1)
        np.put_along_axis(counts, order, np.bincount(np.arange(batch.size) % batch.classes, minlength=classes), axis=1)
        return counts * local_batches
    if batch.alpha is not None:
        cdf = _proportions(batch.alpha, uniforms, draws, classes).cumsum(axis=1)
        # One sorted array for all rows: row r's distribution function is shifted to [r, r + 1).
        shifted = (np.minimum(cdf, np.nextafter(1.0, 0.0)) + each[:, None]).ravel()
        found = np.searchsorted(shifted, uniforms(draws, size) + each[:, None], side="right")
        return _tally(np.minimum(found - each[:, None] * classes, classes - 1), classes)
    fixed = 0
    if batch.sampler == "unbalanced":
        half, quarter = batch.size // 2, batch.size // 4
        first = (uniforms(draws) * classes).astype(np.int64)
        second = (uniforms(draws) * (classes - 1)).astype(np.int64)
        counts[each, first] += half * local_batches
        counts[each, (second + (second >= first)) % classes] += quarter * local_batches
        fixed = (half + quarter) * local_batches
    free = np.searchsorted(prior.cumsum(), uniforms(draws, size - fixed), side="right")
    return counts + _tally(np.minimum(free, classes - 1), classes)


def _tally(labels: Ints, classes: int) -> Ints:
    """Count each row's labels: (R, n) -> (R, classes)."""
    rows = np.arange(len(labels))[:, None] * classes
    return np.bincount((labels + rows).ravel(), minlength=len(labels) * classes).reshape(len(labels), classes)


def _proportions(alpha: float, uniforms: _Uniforms, rows: int, classes: int) -> Floats:
    """Draw from the symmetric Dirichlet(alpha), (rows, classes).

    Normalised Gamma(alpha) variables, each Gamma(alpha + 1) * U^(1/alpha) in logarithms, since for a small alpha most
    of them are below the smallest float.
    """
    from scipy.special import gammaincinv

    u, v = uniforms(2, rows, classes)
    # 1 - v is in (0, 1], where the logarithm is finite.
    logs = np.log(np.maximum(gammaincinv(alpha + 1, u), np.finfo(np.float64).tiny)) + np.log1p(-v) / alpha
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))

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
from leakbench.tasks import AttributeSpec, BatchSpec, Task

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PADDING = -1
"""Index and label of an example that a client of a cohort of unequal sizes lacks."""

_ANY = -1
_CHUNK_WORDS = 2_000_000


@dataclass(frozen=True, eq=False)
class Candidates:
    """The one example of each trial of which membership is asked.

    Args:
        indices: int64 (T,) into the dataset.
        inputs: uint8 (T, *shape).
        labels: int64 (T,).
    """

    indices: Ints
    inputs: npt.NDArray[np.uint8]
    labels: Ints


@dataclass(frozen=True, eq=False)
class Victims:
    """The private examples of T trials with K clients; a client's N = S * B examples are its S batches in order.

    Args:
        indices: int64 (T, K, N) into the dataset, distinct within a trial.
        inputs: uint8 (T, K, N, *shape).
        labels: int64 (T, K, N).
        truth: int64 (T,): 1 where the first client has the attribute or the candidate, 0 where not; None where neither
            is asked.
        candidates: Of whom membership is asked.

    N is the largest client's; what a smaller one lacks has index and label `PADDING`, and black inputs.
    """

    indices: Ints
    inputs: npt.NDArray[np.uint8]
    labels: Ints
    truth: Ints | None = None
    candidates: Candidates | None = None

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """Which examples there are, bool (K * N,); the same in every trial."""
        return np.asarray(self.indices[0] != PADDING).reshape(-1)


class Uniforms:
    """A stream of uniforms in [0, 1) with 53 bits.

    Args:
        key: What it depends on; see `leakbench.keys.derive`.
    """

    def __init__(self, key: bytes) -> None:
        self._bits = np.random.Philox(key=int.from_bytes(key[:16], "little"))

    def __call__(self, *shape: int) -> Floats:
        """Return the next ones, of this shape."""
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


def draw_task(dataset: Dataset, task: Task, *, trials: Sequence[int], key: bytes, split: str = "private") -> Victims:
    """Draw what the clients of a task hold; see `draw_victims`.

    Args:
        dataset: The task's.
        task: The task.
        trials: Trial numbers, length T.
        key: The season's key.
        split: Which split to draw from.
    """
    return draw_victims(
        dataset,
        task.batch,
        clients=task.protocol.clients,
        local_batches=task.protocol.local_batches,
        trials=trials,
        key=key,
        split=split,
        attribute=task.attribute,
        membership=task.target == "membership",
    )


def draw_victims(
    dataset: Dataset,
    batch: BatchSpec,
    *,
    clients: int,
    local_batches: int,
    trials: Sequence[int],
    key: bytes,
    split: str = "private",
    attribute: AttributeSpec | None = None,
    membership: bool = False,
) -> Victims:
    """Draw the private examples of some trials.

    A trial's examples depend on ``key``, the dataset's fingerprint, ``split``, ``batch``, ``clients``,
    ``local_batches``, the bit that is asked for and the trial's number, and on nothing else: not on which other trials
    are drawn, and not on model, attack or defense, so comparisons are paired. Within a trial every example is used
    once, across clients and batches. Where a class has no unused example left, the example comes from all that are
    left.

    The samplers, over the classes that the split holds:
        ``iid``: examples uniformly. ``unique``: B different classes in each batch. ``unbalanced``: floor(B/2) examples
        of class a, floor(B/4) of class b != a, the rest iid, with one (a, b) for all batches of a client (Wainakh et
        al. 2022, arXiv 2105.09369; there the rest has uniform labels). ``single_class``: one class, uniform, for all
        batches of a client. ``balanced``: the same ``classes`` distinct classes, uniform, in all batches of a client, B
        examples spread over them as evenly as whole numbers allow. ``dirichlet``: labels from a client's proportions ~
        symmetric Dirichlet(alpha).

    With an ``attribute`` a fair coin decides each trial's truth. Heads: ``attribute.of_batch(B)`` examples of every
    batch of the first client have it and the rest do not. Tails: none does. Other clients' examples never do.
    With ``membership`` the batches are drawn first; then a fair coin decides whether the candidate is one of the first
    client's examples, uniformly, or an example of the split that no client has.

    Args:
        dataset: Where the examples come from.
        batch: Batch size (B) and sampler.
        clients: Clients behind one update (K).
        local_batches: Distinct batches per client (S).
        trials: Trial numbers, length T.
        key: The season's key.
        split: Which split to draw from.
        attribute: What is asked of the first client; `Task` sees to it that the sampler is ``iid`` then.
        membership: Whether it is asked of whom a candidate is.

    Raises:
        Unavailable: The split holds fewer examples or classes than one trial needs.
        UserError: The dataset does not have the attribute.
    """
    rows = dataset.rows(split)
    specs = [batch.of_client(k) for k in range(clients)]
    total = sum(spec.size for spec in specs) * local_batches + membership
    if total > len(rows):
        raise Unavailable(
            f"batch larger than its split: expected at most {len(rows)} examples in {split!r} of "
            f"{dataset.spec.name}, got {clients} clients x {local_batches} batches x "
            f"{'/'.join(map(str, batch.sizes or (batch.size,)))}{' + a candidate' * membership} = {total}; "
            "lower the batch size, local_steps or clients"
        )
    groups, kinds = (
        (dataset.labels, dataset.num_classes) if attribute is None else (dataset.has(attribute).astype(np.int64), 2)
    )
    members = [rows[groups[rows] == group] for group in range(kinds)]
    present = np.flatnonzero([len(m) for m in members])
    for spec in set(specs):
        _check_classes(spec, len(present), f"{split!r} of {dataset.spec.name}")
    names: tuple[object, ...] = (dataset.fingerprint, split, batch.content(), clients, local_batches)
    if attribute is not None:
        _check_attribute(attribute, members, specs, local_batches, f"{split!r} of {dataset.spec.name}")
        names += (attribute.content(),)
    if membership:
        names += ("membership",)
    indices = np.full((len(trials), clients, local_batches * batch.size), PADDING)
    truth, asked = np.zeros(len(trials), dtype=np.int64), np.zeros(len(trials), dtype=np.int64)
    for t, trial in enumerate(trials):
        uniforms = Uniforms(keys.derive(key, "victim", *names, int(trial)))
        pool = _Pool(members)
        if attribute is not None:
            truth[t] = uniforms(1)[0] < 0.5
        for k, spec in enumerate(specs):
            with_it = None if attribute is None else attribute.of_batch(spec.size) * int(truth[t] and k == 0)
            who = f"client {k + 1} of {clients}"
            own = _draw_client(spec, pool, present, local_batches, uniforms, who, with_it)
            indices[t, k, : len(own)] = own
        if membership:
            coin, u, v = uniforms(3)
            truth[t] = coin < 0.5
            asked[t] = indices[t, 0, int(u * specs[0].size * local_batches)] if truth[t] else pool.take(_ANY, u, v)
    inputs, drawn = dataset.images[indices], dataset.labels[indices]
    inputs[indices == PADDING], drawn[indices == PADDING] = 0, PADDING
    return Victims(
        indices=indices,
        inputs=inputs,
        labels=drawn,
        truth=truth if membership or attribute is not None else None,
        candidates=Candidates(asked, dataset.images[asked], dataset.labels[asked]) if membership else None,
    )


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
    uniforms = Uniforms(keys.derive(key, "label_counts", batch.content(), clients, local_batches))
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


def _check_attribute(
    attribute: AttributeSpec, members: Sequence[Ints], specs: Sequence[BatchSpec], local_batches: int, where: str
) -> None:
    without, having = (len(rows) for rows in members)
    needed = attribute.of_batch(specs[0].size) * local_batches
    total = sum(spec.size for spec in specs) * local_batches
    if having < needed or without < total:
        raise Unavailable(
            f"attribute {attribute.name} = {attribute.value}: expected at least {needed} examples with it and {total} "
            f"without in {where}, got {having} and {without}; lower the batch size, local_steps or clients, or choose "
            "another value"
        )


def _draw_client(
    batch: BatchSpec,
    pool: _Pool,
    present: Ints,
    local_batches: int,
    uniforms: Uniforms,
    who: str,
    with_it: int | None,
) -> Ints:
    """Return the examples of one client of a trial, (S * B,); ``with_it`` of a batch are of group 1, others of 0."""
    taken = np.empty((local_batches, batch.size), dtype=np.int64)
    order = present[np.argsort(uniforms(len(present)), kind="stable")]
    cdf = None if batch.alpha is None else proportions(batch.alpha, uniforms, 1, len(present))[0].cumsum()
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
        elif with_it is not None:
            wanted = (np.arange(batch.size) < with_it).astype(np.int64)
        elif cdf is not None:
            drawn = np.searchsorted(cdf, uniforms(batch.size), side="right")
            wanted = present[np.minimum(drawn, len(present) - 1)]
        for i, (u, v) in enumerate(uniforms(batch.size, 2)):
            taken[s, i] = pool.take(int(wanted[i]), u, v)
    return taken.reshape(-1)


def _counts(batch: BatchSpec, prior: Floats, draws: int, local_batches: int, uniforms: Uniforms) -> Ints:
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
        cdf = proportions(batch.alpha, uniforms, draws, classes).cumsum(axis=1)
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


def proportions(alpha: float, uniforms: Uniforms, rows: int, classes: int) -> Floats:
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

"""What label metrics reach without any update: the better of a prior-drawn and the best constant guess."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from leakbench.keys import PUBLIC_KEY, seed
from leakbench.metrics import METRICS
from leakbench.metrics.labels import score_labels

CHANCE_DRAWS = 10_000
"""How many batches callers of `label_chance` should draw."""

_CHUNK = 1_000  # draws scored at a time, so that 1,000 classes stay under 100 MB


def label_chance(
    counts_sampler: NDArray[np.int64], class_prior: NDArray[np.float64], n_labels: int
) -> dict[str, float]:
    """Return the chance level of every label metric for one sampler.

    It is the best mean over the draws that any of these guesses reaches: one drawn from the prior, and constants. The
    greedy constant is the best one for instance recall, since the k-th label of class c gains exactly
    P(n_c >= k), which falls with k. The other constants are best, or nearly so, for other metrics.

    Args:
        counts_sampler: (draws, C) true counts of batches drawn with the sampler, `CHANCE_DRAWS` of them.
        class_prior: (C,) class frequencies that an adversary would draw from.
        n_labels: N, labels per batch.

    Returns:
        Chance level per metric name.
    """
    draws, classes = counts_sampler.shape
    rng = np.random.default_rng(seed(PUBLIC_KEY, "label chance", classes, n_labels))
    prior = np.asarray(class_prior, dtype=np.float64)
    guesses = [rng.multinomial(n_labels, prior / prior.sum(), size=draws), *_constants(counts_sampler, n_labels)]
    levels = [_mean_scores(counts_sampler, guess) for guess in guesses]
    return {
        name: (max if METRICS[name].higher_is_better else min)(level[name] for level in levels) for name in levels[0]
    }


def greedy_counts(counts_sampler: NDArray[np.int64], n_labels: int) -> NDArray[np.int64]:
    """Return the constant guess of size N with the best expected instance recall, (C,)."""
    classes = counts_sampler.shape[1]
    gains = np.stack([(counts_sampler >= k).mean(axis=0) for k in range(1, int(counts_sampler.max()) + 1)])
    best = np.argsort(-gains, axis=None, kind="stable")[:n_labels]
    return np.bincount(best % classes, minlength=classes)


def _constants(counts: NDArray[np.int64], n_labels: int) -> list[NDArray[np.int64]]:
    vectors, frequency = np.unique(counts, axis=0, return_counts=True)
    share = np.stack([(counts == k).mean(axis=0) for k in range(int(counts.max()) + 1)])
    likeliest = np.zeros(counts.shape[1], dtype=np.int64)
    likeliest[(counts > 0).mean(axis=0).argmax()] = 1
    return [
        greedy_counts(counts, n_labels),
        np.ones(counts.shape[1], dtype=np.int64),
        vectors[frequency.argmax()],
        share.argmax(axis=0),
        np.median(counts, axis=0).astype(np.int64),
        likeliest,
    ]


def _mean_scores(counts: NDArray[np.int64], guess: NDArray[np.int64]) -> dict[str, float]:
    guesses = np.broadcast_to(guess, counts.shape)
    totals: dict[str, float] = {}
    for start in range(0, len(counts), _CHUNK):
        part = slice(start, start + _CHUNK)
        true, recovered = (torch.from_numpy(a[part].astype(np.int64)).unsqueeze(1) for a in (counts, guesses))
        for name, values in score_labels(true, recovered).items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    return {name: total / len(counts) for name, total in totals.items()}

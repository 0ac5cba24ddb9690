"""What fitted measures share: both sides' observations, the truth, and profiles with intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from leakbench.board.stats import Interval, bootstrap
from leakbench.errors import NotApplicable
from leakbench.measures.features import Floats, Map, observe
from leakbench.measures.subject import Profile, Subject

FEWEST = 10
"""Trials that there must be on either side; of each kind where there are two."""
VALIDATION = 0.2
"""Share of the auxiliary trials, the last ones, that calibrates and chooses rules."""


def auxiliary(subject: Subject, train: int) -> Subject:
    """Return the first ``train`` auxiliary trials.

    Raises:
        NotApplicable: There are fewer than `FEWEST`, or so few victims.
    """
    public = None if subject.auxiliary is None else subject.auxiliary.part(0, train)
    if public is None or min(public.trials, subject.trials) < FEWEST:
        found = f"{0 if public is None else public.trials} and {subject.trials}"
        raise NotApplicable(f"needs at least {FEWEST} auxiliary and as many held-out trials, got {found}")
    return public


def both_sides(
    subject: Subject, train: int, maps: Mapping[str, Map], *, steps: int, whole: Collection[str] = ()
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Observe the auxiliary trials and, behind them, the victims: (train + T, ...) each.

    Args:
        subject: With auxiliary trials.
        train: How many of these.
        maps: See `observe`.
        steps: Work that follows, in the progress's units.
        whole: See `observe`.

    Raises:
        NotApplicable: There are too few trials.
    """
    public = auxiliary(subject, train)
    total = public.trials + subject.trials + steps
    fit = observe(public, maps, whole=whole, report=lambda done: subject.progress(done, total))
    held_out = observe(subject, maps, whole=whole, report=lambda done: subject.progress(public.trials + done, total))
    return {
        name: {layer: np.concatenate([fit[name][layer], held_out[name][layer]]) for layer in fit[name]} for name in maps
    }


def truths(subject: Subject, train: int) -> NDArray[np.int64]:
    """Return whether each of ``train`` auxiliary trials and, behind them, each victim has the attribute.

    Raises:
        NotApplicable: Nobody asks for an attribute, or fewer than `FEWEST` trials have or lack it on either side.
    """
    found = []
    for side, own in {"auxiliary": auxiliary(subject, train), "held-out": subject}.items():
        if own.truth is None:
            raise NotApplicable("needs a task that asks for an attribute")
        truth = own.truth.cpu().numpy().astype(np.int64)
        if (got := int(min(truth.sum(), len(truth) - truth.sum()))) < FEWEST:
            raise NotApplicable(f"needs {FEWEST} {side} trials with the attribute and as many without, got {got}")
        found.append(truth)
    return np.concatenate(found)


def distinct(subject: Subject, train: int) -> NDArray[np.int64]:
    """Return the places, among auxiliary trials and victims, of those that share no image with one before."""
    seen: set[bytes] = set()
    kept = []
    for own in (auxiliary(subject, train), subject):
        for trial in own.images.cpu().numpy():
            images = {image.tobytes() for image in trial}
            if seen.isdisjoint(images):
                kept.append(True)
                seen |= images
            else:
                kept.append(False)
    return np.flatnonzero(kept)


def sides(trials: int) -> tuple[int, int]:
    """Return the auxiliary trials that rules are fitted to, and those that calibrate them."""
    validation = max(1, round(VALIDATION * trials))
    return trials - validation, validation


def mean_with_interval(per_trial: Floats, *names: object) -> Interval:
    """Return the mean (n,) with its 95% bootstrap interval over trials; ``names`` seed the resampling."""
    return bootstrap(per_trial, range(len(per_trial)), *names)


def profile(
    layers: tuple[str, ...], values: list[float], ends: list[tuple[float, float]] | None = None, *, n: int
) -> Profile:
    """Return a `Profile` of fitted values, with intervals where there are ``ends``."""
    low, high = (None, None) if ends is None else torch.tensor(ends, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return Profile(layers, torch.tensor(values, dtype=torch.float64), low, high, n)


def interval_profile(intervals: Mapping[str, Interval], *, n: int) -> Profile:
    """Return the `Profile` of one interval per layer."""
    values = list(intervals.values())
    return profile(tuple(intervals), [v.mean for v in values], [(v.low, v.high) for v in values], n=n)

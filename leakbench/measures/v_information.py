"""V-information of an attribute: bits that a family of classifiers gets from a layer's update, on held-out trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leakbench.board.stats import Interval
from leakbench.errors import UserError
from leakbench.measures.families import FAMILIES, View, calibrated
from leakbench.measures.features import Floats, directed, matrix, moduli
from leakbench.measures.fitted import both_sides, interval_profile, mean_with_interval, sides, truths
from leakbench.measures.subject import ALL, Profile, Subject

SKETCH, SIDE = 2048, 64
"""Numbers of a layer's sketch; outputs of its sketched matrix, and the root of its numbers."""


@dataclass(frozen=True)
class Rung:
    """What one family gets.

    Args:
        bits: (T,) pointwise V-information of the held-out trials; the mean is the estimate.
        validation: Mean over the calibration rows, which rungs are chosen by.
    """

    bits: Floats
    validation: float


def v_information(
    subject: Subject, *, train: int = 512, families: str = "logistic,forest,mlp,conv"
) -> dict[str, Profile]:
    """Measure how many bits about the attribute each layer gives to classifiers that were fitted to auxiliary trials.

    I_V = H_V(p) - H_V(p | g_l), where H_V(p) is 1 bit, because truths are fair coins, and H_V(p | g_l) the
    cross-entropy of the calibrated classifier on the victims. It may be negative by chance. Trials that calibrate may
    share images with those that were fitted to; victims share none with either.

    Args:
        subject: With truth, and auxiliary trials.
        train: Auxiliary trials; four in five are fitted to, the rest calibrate and choose.
        families: Rungs of the ladder, with commas between.

    Raises:
        UserError: A family is unknown.
        NotApplicable: There are too few trials with or without the attribute.
    """
    rungs = [name.strip() for name in families.split(",")]
    for name in rungs:
        if name not in FAMILIES:
            raise UserError(f"families {families!r}: expected some of {','.join(FAMILIES)}, got {name!r}; correct it")
    truth = truths(subject, train)
    held_out = truth[-subject.trials :]
    known = truth[: -subject.trials]
    fit, _ = sides(len(known))
    maps = {"signed": directed(SKETCH), "moduli": moduli, "matrix": matrix(SIDE)}
    seen = both_sides(subject, train, maps, steps=len(subject.layers) + 1)
    layers = {layer: [layer] for layer in subject.layers} | {ALL: list(subject.layers)}
    found: dict[str, dict[str, Interval]] = {f"v_information_{name}": {} for name in FAMILIES}
    found["v_information"] = {}
    for done, (layer, members) in enumerate(layers.items()):
        signed, sizes, matrices = ([seen[name][member] for member in members] for name in maps)
        ladder = climb(View.of(signed, sizes, matrices, known, fit), held_out, rungs)
        for name, rung in ladder.items():
            found[f"v_information_{name}"][layer] = mean_with_interval(rung.bits, "v_information", layer, name)
        best = chosen(ladder)
        found["v_information"][layer] = found[f"v_information_{best}"][layer]
        subject.progress(len(truth) + done + 1, len(truth) + len(layers))
    return {name: interval_profile(intervals, n=subject.trials) for name, intervals in found.items()}


def climb(view: View, held_out: NDArray[np.int64], rungs: list[str]) -> dict[str, Rung]:
    """Fit and calibrate families to a view, and score them.

    Args:
        view: Whose last rows are the held-out trials.
        held_out: (T,) their truth.
        rungs: Names of `FAMILIES`.
    """
    check = view.truth[view.fit :]
    ladder = {}
    for name in rungs:
        odds = calibrated(FAMILIES[name](view), view)
        ladder[name] = Rung(
            bits=1 - _bits(odds[len(view.truth) :], held_out),
            validation=float(1 - _bits(odds[view.fit : len(view.truth)], check).mean()),
        )
    return ladder


def chosen(ladder: Mapping[str, Rung]) -> str:
    """Return the rung that is best on the calibration rows, never on the held-out ones."""
    return max(ladder, key=lambda name: ladder[name].validation)


def _bits(odds: Floats, truth: NDArray[np.int64]) -> Floats:
    return np.asarray(np.logaddexp(0, np.where(truth == 1, -odds, odds)) / np.log(2))

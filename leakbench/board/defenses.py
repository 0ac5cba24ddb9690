"""Defenses on a task: what is left of the undefended leakage under the worst attack, and who may be ranked with it.

Privacy is 1 - (L - floor) / (undefended - floor), in [0, 1]: L is the worst mean over attacks on the defense,
undefended the worst mean without one, and the floor what is had without the update: chance (labels, inference) or the
best floor (inputs), or what an attack reaches where nothing is sent (`leakbench.autoleak.CONTROL`), whichever is more.
Static privacy is the same of those attacks alone that the defense does not name, on both sides: what they reach
undefended is its undefended level, so that who changes nothing has neither privacy nor a gap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.autoleak import CONTROL, family
from leakbench.board.columns import DEFENSE_KEYS, TASK_KEYS, Cell, entry_parameters
from leakbench.board.score import build_cells, plain
from leakbench.board.stats import MIN_PAIRS, ends, resamples, separable
from leakbench.stage import IN_TRAINING

TABLE_KEYS = ("season", "season_commitment", "benchmark_version", "lane", "target", "dataset", "dataset_fingerprint")
"""What a table of defenses shares."""

MIN_SPAN = {"labels": 0.05, "inputs": 1.0, "attribute": 0.05, "membership": 0.05}
"""Least distance of the undefended level to the floor, dB for inputs: below it every defense would look perfect."""

STANDING_COLUMNS = {
    "defense_label": "defense with its notable parameters",
    "role": "defense, none (nobody defends) or control (nothing is sent)",
    "curve": "defense without its strength",
    "strength": "swept parameters, more is stronger, JSON; null: none, or no number",
    "attacks": "attacks that counted",
    "worst_attack": "attack of the worst mean",
    "worst": "worst mean of the ranking metric over attacks",
    "ci_low": "lower end of its 95% interval",
    "ci_high": "upper end of its 95% interval",
    "floor": "what is had without the update",
    "floor_source": "reference; reference, no control run; or the attack that reached it where nothing is sent",
    "undefended": "worst mean where nobody defends",
    "undefended_attack": "attack that reached it",
    "informative": "whether undefended is far enough above the floor; other tasks are left out of what follows",
    "privacy": "1 - (worst - floor) / (undefended - floor), in [0, 1], over common trials",
    "privacy_low": "lower end of its 95% interval, the attacks held fixed",
    "privacy_high": "upper end of its 95% interval",
    "static_attack": "worst attack that the defense does not name",
    "privacy_static": "privacy under attacks that it does not name, of what they reach undefended; null: nothing",
    "adaptive_attack": "worst attack that the defense names",
    "privacy_adaptive": "privacy under attacks that it names",
    "gap": "privacy_static - privacy: what rested on attackers not knowing; null: no named attack counted",
    "gap_low": "lower end of its 95% interval",
    "gap_high": "upper end of its 95% interval",
    "warnings": "reasons to doubt the privacy; null: none",
    "unranked_because": "why it is listed without a rank; null: ranked",
}
"""The columns that follow `TASK_KEYS` and `DEFENSE_KEYS`."""

_COMPARED = tuple(key for key in TASK_KEYS if key not in ("lane", "checkpoint"))


@dataclass
class Standing:
    """One defense on one task.

    Args:
        keys: Values of `TASK_KEYS` and `DEFENSE_KEYS`.
        line: Values of `STANDING_COLUMNS`.
        curve: What it shares with the same defense at other strengths.
        strength: Swept parameters, more is stronger; None where there are none.
        worst: Values of the worst attack by trial.
        draws: (R,) privacy in every resample of the table's trials; empty where there is no privacy.
        in_training: Whether what it sent in a federated training was attacked.
        columns: What rows of the task say of net and protocol, by column.
    """

    keys: dict[str, Any]
    line: dict[str, Any]
    curve: tuple[Any, ...]
    strength: tuple[float, ...] | None
    worst: pd.Series[float] | None = None
    paired: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)
    draws: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
    in_training: bool = False
    columns: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def table(self) -> tuple[Any, ...]:
        """Values of `TABLE_KEYS`."""
        return tuple(self.keys[key] for key in TABLE_KEYS)

    @property
    def defense(self) -> tuple[Any, ...]:
        """Values of `DEFENSE_KEYS`."""
        return tuple(self.keys[key] for key in DEFENSE_KEYS)


def defenses(rows: pd.DataFrame, recovers: Mapping[str, Collection[str]] | None = None) -> pd.DataFrame:
    """Return one line per task and defense.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them. Rows without an attack are left out.
        recovers: Targets of attacks by name, so that a defense is not asked for attacks of another target. An attack
            that is neither there nor in the rows is asked for on every task.

    Returns:
        `TASK_KEYS`, `DEFENSE_KEYS` and `STANDING_COLUMNS`, by task, the best privacy first.
    """
    return standings_frame(standings(rows, recovers))


def standings_frame(found: Sequence[Standing]) -> pd.DataFrame:
    """Return standings as lines; see `defenses`."""
    columns = [*TASK_KEYS, *DEFENSE_KEYS, *STANDING_COLUMNS]
    frame = pd.DataFrame([one.keys | one.line for one in found], columns=columns)
    order = ["task", "task_hash", "season", "privacy", *DEFENSE_KEYS]
    return frame.sort_values(order, ascending=[key != "privacy" for key in order], kind="stable", ignore_index=True)


def standings(rows: pd.DataFrame, recovers: Mapping[str, Collection[str]] | None = None) -> list[Standing]:
    """Return every defense on every task; see `defenses`.

    A defense that brings weights of its own (a change of the model) is compared, on task and victims, with the
    undefended client where its weights are the only ones.
    """
    rows = rows.dropna(subset=["attack"])
    known = {name: set(targets) for name, targets in (recovers or {}).items()}
    for name, target in rows[["attack", "target"]].drop_duplicates().itertuples(index=False):
        known.setdefault(name, set()).add(target)
    declared = {
        tuple(plain(line[key]) for key in DEFENSE_KEYS): line
        for line in rows.drop_duplicates(list(DEFENSE_KEYS)).to_dict("records")
    }
    found: list[Standing] = []
    for cells in comparable(build_cells(rows)):
        found += _task(cells, declared, known)
    tasks = {
        str(line["task_hash"]): {str(key): plain(value) for key, value in line.items()}
        for line in rows.drop_duplicates("task_hash").to_dict("records")
    }
    for one in found:
        one.columns = tasks[one.keys["task_hash"]]
        one.in_training = one.columns["stage"] == IN_TRAINING
    tables: dict[tuple[Any, ...], list[Standing]] = {}
    for one in found:
        tables.setdefault(one.table, []).append(one)
    for members in tables.values():
        _resample(members)
    _warn_of_masking(found)
    return found


def comparable(cells: list[Cell]) -> Iterator[list[Cell]]:
    """Yield the cells of every task that are compared; weights of a defense's own with the only undefended ones."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.keys[key] for key in _COMPARED), []).append(cell)
    for group in groups.values():
        undefended = {cell.keys["checkpoint"] for cell in group if cell.keys["defense"] == "none"}
        parts: dict[Any, list[Cell]] = {}
        for cell in group:
            weights = cell.keys["checkpoint"]
            if weights not in undefended and len(undefended) == 1:
                (weights,) = undefended
            parts.setdefault(weights, []).append(cell)
        yield from parts.values()


def _worst(cells: list[Cell]) -> Cell | None:
    counted = [cell for cell in cells if len(cell.tried) and not np.isnan(cell.score.mean)]
    return max(counted, key=lambda cell: (cell.score.mean, _label(cell)), default=None)


def _label(cell: Cell) -> str:
    return str(cell.rows["attack_label"][0])


def by_trial(cell: Cell, values: NDArray[np.float64]) -> pd.Series[float]:
    """Return values of a cell's rows that count by number of the trial."""
    series = pd.Series(values, index=pd.Index(cell.tried["trial"], name="trial"))
    return series if series.index.is_unique else series.groupby(level=0).mean()


def _values(cell: Cell) -> pd.Series[float]:
    return by_trial(cell, cell.values(cell.metric))


def _task(
    cells: list[Cell], declared: Mapping[tuple[Any, ...], Mapping[Any, Any]], known: Mapping[str, set[str]]
) -> list[Standing]:
    """Return the standings on one task."""
    chains: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        chains.setdefault(tuple(cell.keys[key] for key in DEFENSE_KEYS), []).append(cell)
    plainly = [cell for cell in cells if cell.keys["defense"] == "none"]
    undefended = _worst(plainly)
    nothing = _worst([cell for cell in cells if cell.keys["defense"] == CONTROL])
    lane = next((cell.keys["lane"] for cell in cells if cell.keys["lane"] is not None), None)
    weights = (plainly or cells)[0].keys["checkpoint"]
    floor, source = None, None
    if undefended is not None:
        source = "reference, no control run" if nothing is None else "reference"
        floor = by_trial(undefended, undefended.reference(undefended.metric))
        if nothing is not None and nothing.score.mean > floor.mean():
            floor, source = _values(nothing), _label(nothing)
    found = []
    for key, own in chains.items():
        said = declared[key]
        named = _named(said)
        worst = _worst(own)
        static = _worst([cell for cell in own if cell.keys["attack"] not in named])
        adaptive = _worst([cell for cell in own if cell.keys["attack"] in named])
        curve, strength, unswept = curve_of(said)
        line: dict[str, Any] = dict.fromkeys(STANDING_COLUMNS) | {
            "defense_label": said["defense_label"],
            "role": {"none": "none", CONTROL: "control"}.get(key[0], "defense"),
            "curve": unswept,
            "strength": json.dumps(strength) if strength else None,
            "attacks": sum(len(cell.tried) > 0 for cell in own),
            "informative": False,
            "worst": np.nan,
            "privacy": np.nan,
            **dict.fromkeys(("ci_low", "ci_high", "floor", "undefended", "privacy_low", "privacy_high"), np.nan),
            **dict.fromkeys(("privacy_static", "privacy_adaptive", "gap", "gap_low", "gap_high"), np.nan),
        }
        keys = own[0].keys | {"lane": lane, "checkpoint": weights}
        one = Standing({k: keys[k] for k in (*TASK_KEYS, *DEFENSE_KEYS)}, line, curve, strength)
        if worst is not None:
            line |= {"worst_attack": _label(worst), "worst": worst.score.mean}
            line |= {"ci_low": worst.score.low, "ci_high": worst.score.high}
            one.worst = _values(worst)
        if undefended is not None and floor is not None:
            line |= {"undefended": undefended.score.mean, "undefended_attack": _label(undefended)}
            line |= {"floor": float(floor.mean()), "floor_source": source}
            line["informative"] = _informative(undefended, floor)
            unaware = _worst([cell for cell in plainly if cell.keys["attack"] not in named])
            shown = [("privacy", worst, undefended), ("privacy_adaptive", adaptive, undefended)]
            if unaware is not None and _informative(unaware, floor):
                shown.append(("privacy_static", static, unaware))
            for name, most, reached in shown if line["informative"] else ():
                if most is not None:
                    columns = {"value": _values(most), "undefended": _values(reached), "floor": floor}
                    one.paired[name] = pd.DataFrame(columns).dropna()
        if named:
            line["static_attack"] = None if static is None else _label(static)
            line["adaptive_attack"] = None if adaptive is None else _label(adaptive)
        if line["role"] == "defense":
            line["unranked_because"] = "; ".join(_problems(own, plainly, named, known)) or None
            line["warnings"] = "; ".join(_warnings(own)) or None
        found.append(one)
    return found


def _named(said: Mapping[Any, Any]) -> set[str]:
    return {name for part in json.loads(said["defense_adaptive"]) for name in part}


def _informative(undefended: Cell, floor: pd.Series[float]) -> bool:
    level, target = _values(undefended), str(undefended.keys["target"])
    if not level.mean() - floor.mean() >= MIN_SPAN[target]:
        return False
    return len(level) < MIN_PAIRS or separable(level, floor)


def _problems(own: list[Cell], plainly: list[Cell], named: set[str], known: Mapping[str, set[str]]) -> list[str]:
    """Return why a defense cannot be ranked on a task."""
    target = own[0].keys["target"]
    problems = list(dict.fromkeys(cell.defense_note for cell in own if cell.defense_note))
    failed = [cell for cell in own if cell.count("ok") < len(cell.tried) or cell.count("unavailable")]
    problems += sorted({f"failed: {_label(cell)}" for cell in failed})
    asked = {name for name in named if target in known.get(name, {target})}
    if not asked:
        problems.append(f"names no attack on {target} that knows it")
    ran = {cell.keys["attack"] for cell in own}
    problems += [f"not run: {name}" for name in sorted(asked - ran)]
    # What the task does not admit, and nobody can run, is no gap, as long as another that knows the defense was run.
    if not any(cell.keys["attack"] in asked and cell.count("ok") for cell in own):
        failing = {cell.keys["attack"] for cell in failed}
        problems += [f"not applicable: {name}" for name in sorted(asked & ran - failing)]
    here = {_label(cell) for cell in own}
    problems += [f"not run: {label}" for label in sorted({_label(cell) for cell in plainly} - here - asked)]
    if _worst(plainly) is None:
        problems.append("no undefended run")
    return problems


def _warnings(own: list[Cell]) -> list[str]:
    families = {family(str(cell.keys["attack"])) for cell in own if len(cell.tried)} - {"floor"}
    return [f"one attack family only: {families.pop()}"] if len(families) == 1 else []


def curve_of(said: Mapping[Any, Any]) -> tuple[tuple[Any, ...], tuple[float, ...] | None, str]:
    """Return what a defense shares with itself at other strengths, its strengths (more is stronger), and its label.

    Args:
        said: A row with `DEFENSE_KEYS`, ``defense_label`` and ``defense_strength``.
    """
    parts = entry_parameters(said["defense_params"])
    swept = json.loads(said["defense_strength"])
    rest: list[dict[str, Any]] = [dict(part) for part in parts]
    strength: list[float] = []
    numbers = True
    label = str(said["defense_label"])
    for part, way in zip(rest, swept, strict=False):
        if way is None:
            continue
        value = part.pop(way[0], None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            numbers = False
        else:
            strength.append(float(value) if way[1] == "higher" else -float(value))
        label = re.sub(rf"(?<=[(\s]){way[0]}=[^,()]*(, )?", "", label, count=1).replace(", )", ")").replace("()", "")
    key = (said["defense"], plain(said["defense_version"]), plain(said["defense_source_sha256"]), json.dumps(rest))
    return key, tuple(strength) if numbers and strength else None, label


# --- intervals --------------------------------------------------------------------------------------------------------


def _resample(members: list[Standing]) -> None:
    """Fill in privacy with its interval: all of a table from the same resamples, so that differences are paired.

    A resample draws numbers of trials; a trial's victims on several tasks are drawn together.
    """
    trials = sorted({trial for one in members for part in one.paired.values() for trial in part.index})
    if not trials:
        return
    drawn = np.concatenate(list(resamples(len(trials))))
    place = {trial: i for i, trial in enumerate(trials)}
    for one in members:
        draws = {}
        for name, part in one.paired.items():
            if part.empty:
                continue
            one.line[name] = float(_privacy(part.to_numpy().mean(0)))
            weights = drawn[:, [place[trial] for trial in part.index]]
            total = weights.sum(1, keepdims=True)
            means = np.where(total > 0, weights @ part.to_numpy() / np.maximum(total, 1), part.to_numpy().mean(0))
            values = _privacy(means.T)
            draws[name] = np.where(np.isnan(values), one.line[name], values)
        if "privacy" not in draws:
            continue
        one.draws = draws["privacy"]
        enough = len(one.paired["privacy"]) > 1
        one.line["privacy_low"], one.line["privacy_high"] = ends(one.draws) if enough else (np.nan, np.nan)
        if {"privacy_static", "privacy_adaptive"} <= draws.keys():
            one.line["gap"] = one.line["privacy_static"] - one.line["privacy"]
            if enough:
                gaps = draws["privacy_static"] - draws["privacy"]
                one.line["gap_low"], one.line["gap_high"] = ends(gaps)


def _privacy(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return privacy from means of the worst attack, the undefended level and the floor, (3, ...)."""
    span = means[1] - means[2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(span > 0, np.clip((means[1] - means[0]) / span, 0, 1), np.nan)


def _warn_of_masking(found: list[Standing]) -> None:
    """Note where a stronger setting leaks more than a weaker one: it may hide a gradient, not what is in it."""
    curves: dict[tuple[Any, ...], list[Standing]] = {}
    for one in found:
        if one.strength is not None and one.worst is not None:
            task = tuple(one.keys[key] for key in TASK_KEYS)
            curves.setdefault((task, one.curve), []).append(one)
    for settings in curves.values():
        for strong in settings:
            for weak in settings:
                if not _stronger(strong, weak) or strong.worst is None or weak.worst is None:
                    continue
                if strong.line["worst"] > weak.line["worst"] and separable(strong.worst, weak.worst):
                    text = f"leaks more than {weak.line['defense_label']} (masking?)"
                    strong.line["warnings"] = "; ".join(filter(None, (strong.line["warnings"], text)))


def _stronger(a: Standing, b: Standing) -> bool:
    if a.strength is None or b.strength is None or a.strength == b.strength:
        return False
    return all(x >= y for x, y in zip(a.strength, b.strength, strict=True))

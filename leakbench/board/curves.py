"""Defenses of a lane: privacy over its tasks against the accuracy it costs, strength by strength, and who leads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.board.autoleak import autoleak, members, overlap
from leakbench.board.cohorts import with_cohorts
from leakbench.board.columns import DEFENSE_KEYS, DEMONSTRATION_DATASETS
from leakbench.board.costs import COST_COLUMNS, Costs
from leakbench.board.defenses import TABLE_KEYS, Standing, standings, standings_frame
from leakbench.board.stats import MIN_PAIRS, ends

CLASSES = (1, 2, 5)
"""Points of accuracy that a defense may cost."""

WIDEST = 0.5
"""Points that the interval of the drop may be wide in the class of one point."""

COARSE = DEMONSTRATION_DATASETS | {"mnist"}
"""Datasets on which one point tells nothing apart."""

ENOUGH_STRENGTHS = 5
"""Fewest strengths of a whole curve."""

SETTING_COLUMNS = {
    "defense_label": "defense with its notable parameters",
    "role": "defense, none (nobody defends) or control (nothing is sent)",
    "curve": "defense without its strength",
    "strength": "swept parameters, more is stronger, JSON; null: none",
    "tasks": "informative tasks on which it was attacked",
    "of_tasks": "informative tasks of the table",
    "dropped": "tasks left out: undefended, no attack gets far enough above the floor",
    "privacy": "mean over these tasks of the privacy under the worst attack; over those in_training where that is less",
    "privacy_low": "lower end of its 95% interval; numbers of trials are resampled, for all tasks and defenses alike",
    "privacy_high": "upper end of its 95% interval",
    "privacy_static": "the same under attacks that the defense does not name",
    "worst_task": "task of least privacy",
    "worst_task_privacy": "privacy there",
    "worst_attack": "worst attack there",
    "trials": "distinct numbers of trials",
    "warnings": "reasons to doubt the privacy; null: none",
    "unranked_because": "why it is listed without a rank; null: ranked",
    **COST_COLUMNS,
}
"""The columns that follow `TABLE_KEYS` and `DEFENSE_KEYS`."""

RANKING_COLUMNS = {
    "curve": "defense without its strength",
    "settings": "strengths that were attacked and trained, and may be ranked",
    **{
        key: text
        for points in CLASSES
        for key, text in {
            f"privacy_at_{points}": f"best privacy at no more than {points} points lost; null: no such setting",
            f"low_at_{points}": "lower end of its 95% interval",
            f"high_at_{points}": "upper end of its 95% interval",
            f"setting_at_{points}": "the setting",
            f"sure_at_{points}": "whether the interval of its drop ends within these points too",
            f"rank_at_{points}": "1 for the best and those that cannot be told from it, and so on",
        }.items()
    },
    "hypervolume": "area below the points (utility, privacy) of its settings, from (0, 0)",
    "hypervolume_low": "lower end of its 95% interval",
    "hypervolume_high": "upper end of its 95% interval",
    "partial": f"whether there are fewer than {ENOUGH_STRENGTHS} strengths",
    "no_class_because": "settings that are in no class, and why; null: none",
    "unranked_because": "why it has no rank; null: it has",
}
"""The columns that follow `TABLE_KEYS` and the keys of the defense."""

CURVE_KEYS = ("defense", "defense_version", "defense_source_sha256")


@dataclass
class Setting:
    """A defense at one strength on the tasks of a table.

    Args:
        keys: Values of `TABLE_KEYS` and `DEFENSE_KEYS`.
        line: Values of `SETTING_COLUMNS`.
        curve: What it shares with the same defense at other strengths.
        strength: Swept parameters, more is stronger; None where there are none.
        draws: (R,) privacy by resample; empty where there is none.
        utility: (R,) utility by resample; empty where there is none.
    """

    keys: dict[str, Any]
    line: dict[str, Any]
    curve: tuple[Any, ...]
    strength: tuple[float, ...] | None
    draws: NDArray[np.float64]
    utility: NDArray[np.float64]

    @property
    def table(self) -> tuple[Any, ...]:
        """Values of `TABLE_KEYS`."""
        return tuple(self.keys[key] for key in TABLE_KEYS)


def settings(found: Sequence[Standing], utility: pd.DataFrame | None = None) -> list[Setting]:
    """Return every defense of every table, a task counting as much as any other.

    Args:
        found: What `leakbench.board.defenses.standings` returns.
        utility: Federated trainings as `leakbench.results.load_utility` returns them.
    """
    groups: dict[tuple[Any, ...], list[Standing]] = {}
    for one in found:
        groups.setdefault((one.table, one.defense), []).append(one)
    informative = Counter(one.table for one in found if one.line["informative"] and one.line["role"] == "none")
    all_tasks = Counter(one.table for one in found if one.line["role"] == "none")
    costs = Costs(utility)
    tasks: dict[Any, list[dict[str, Any]]] = {}
    for one in found:
        if one.line["role"] == "none":
            tasks.setdefault(one.table, []).append(one.columns)
    return [
        _setting(own, informative[table], all_tasks[table] - informative[table], costs, tasks.get(table, []))
        for (table, _), own in groups.items()
    ]


def settings_frame(found: Sequence[Setting]) -> pd.DataFrame:
    """Return settings as lines: `TABLE_KEYS`, `DEFENSE_KEYS` and `SETTING_COLUMNS`, by table, curve and strength."""
    ordered = sorted(found, key=lambda one: (repr(one.table), repr(one.curve), one.strength or ()))
    columns = [*TABLE_KEYS, *DEFENSE_KEYS, *SETTING_COLUMNS]
    return pd.DataFrame([one.keys | one.line for one in ordered], columns=columns)


def _setting(
    own: list[Standing], tasks: int, dropped: int, costs: Costs, attacked: Sequence[Mapping[str, Any]]
) -> Setting:
    """Return what the standings of one defense on a table's tasks come to."""
    first = own[0]
    counted = [one for one in own if one.line["informative"]]
    scored = [one for one in counted if len(one.draws)]
    keys = {key: first.keys[key] for key in (*TABLE_KEYS, *DEFENSE_KEYS)}
    line: dict[str, Any] = dict.fromkeys(SETTING_COLUMNS) | {
        **{key: first.line[key] for key in ("defense_label", "role", "curve", "strength")},
        "tasks": len(scored),
        "of_tasks": tasks,
        "dropped": dropped,
        **dict.fromkeys(("privacy", "privacy_low", "privacy_high", "privacy_static", "worst_task_privacy"), np.nan),
    }
    draws = np.empty(0)
    if scored:
        # What it sent in training is no task among others: who behaves there only when attacked is worth what is there.
        kinds = [[one for one in scored if one.in_training is kind] for kind in {one.in_training for one in scored}]
        draws = np.min([np.mean([one.draws for one in kind], axis=0) for kind in kinds], axis=0)
        worst = min(scored, key=lambda one: (one.line["privacy"], one.keys["task"]))
        trials = {trial for one in scored for trial in one.paired["privacy"].index}
        line |= {
            # NaN where it is unknown on some task
            **{name: _least(kinds, name) for name in ("privacy", "privacy_static")},
            "worst_task": worst.keys["task"],
            "worst_task_privacy": worst.line["privacy"],
            "worst_attack": worst.line["worst_attack"],
            "trials": len(trials),
        }
        if len(trials) > 1:
            line["privacy_low"], line["privacy_high"] = ends(draws)
    if line["role"] == "defense":
        line["warnings"] = _joined(own, "warnings")
        # On a task that tells nothing nobody is asked to have been run.
        problems = [_joined(counted, "unranked_because")]
        problems += [f"run on {len(scored)} of {tasks} informative tasks"] * (len(scored) < tasks)
        problems += ["no informative task"] * (tasks == 0)
        line["unranked_because"] = "; ".join(filter(None, problems)) or None
    cost, shares = costs.of(keys, attacked)
    return Setting(keys, line | cost, first.curve, first.strength, draws, shares)


def _least(kinds: Sequence[Sequence[Standing]], column: str) -> float:
    """Return the mean over tasks, of the kind where it is least."""
    return float(np.min([np.mean([one.line[column] for one in kind]) for kind in kinds]))


def _joined(own: Sequence[Standing], column: str) -> str | None:
    texts = [text for one in own for text in (one.line[column] or "").split("; ") if text]
    return "; ".join(dict.fromkeys(texts)) or None


# --- ranking ----------------------------------------------------------------------------------------------------------


def ranking(found: Sequence[Setting]) -> pd.DataFrame:
    """Return one line per table and curve: `TABLE_KEYS`, `CURVE_KEYS` and `RANKING_COLUMNS`, best at two points first.

    Args:
        found: What `settings` returns.
    """
    tables: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Setting]]] = {}
    for one in found:
        if one.line["role"] == "defense":
            tables.setdefault(one.table, {}).setdefault(one.curve, []).append(one)
    lines = [line for table in sorted(tables, key=repr) for line in _table(tables[table])]
    return pd.DataFrame(lines, columns=[*TABLE_KEYS, *CURVE_KEYS, *RANKING_COLUMNS])


def _table(curves: Mapping[tuple[Any, ...], list[Setting]]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    best: list[dict[int, Setting | None]] = []
    for own in curves.values():
        usable = [one for one in own if one.line["unranked_because"] is None and one.line["no_utility_because"] is None]
        usable = [one for one in usable if len(one.draws)]
        reasons = [one.line["unranked_because"] or one.line["no_utility_because"] or "" for one in own]
        line: dict[str, Any] = {key: own[0].keys[key] for key in (*TABLE_KEYS, *CURVE_KEYS)}
        line |= {"curve": own[0].line["curve"], "settings": len(usable), "partial": len(usable) < ENOUGH_STRENGTHS}
        line["unranked_because"] = None if usable else "; ".join(dict.fromkeys(filter(None, reasons)))
        left = [one.line for one in usable if one.line["no_class_because"]]
        line["no_class_because"] = "; ".join(f"{o['defense_label']}: {o['no_class_because']}" for o in left) or None
        chosen = {points: _best(usable, points) for points in CLASSES}
        for points, one in chosen.items():
            line |= {f"privacy_at_{points}": np.nan, f"rank_at_{points}": np.nan, f"setting_at_{points}": None}
            line[f"sure_at_{points}"] = None if one is None else bool(one.line["drop_high"] <= points)
            if one is not None:
                line[f"setting_at_{points}"] = one.line["defense_label"]
                for name, key in (("privacy", "privacy"), ("low", "privacy_low"), ("high", "privacy_high")):
                    line[f"{name}_at_{points}"] = one.line[key]
        if usable:
            draws = np.array([one.draws for one in usable]).T
            shares = np.array([one.utility for one in usable]).T
            volumes = hypervolume(shares, draws)
            points_of = np.array([[one.line["utility"], one.line["privacy"]] for one in usable]).T
            line["hypervolume"] = float(hypervolume(*points_of))
            line["hypervolume_low"], line["hypervolume_high"] = ends(volumes)
        lines.append(line)
        best.append(chosen)
    for points in CLASSES:
        entrants = [(i, one) for i, chosen in enumerate(best) if (one := chosen[points]) is not None]
        entrants.sort(key=lambda entrant: (-entrant[1].line["privacy"], entrant[1].line["defense_label"]))
        for (i, _), rank in zip(entrants, _groups([one for _, one in entrants]), strict=True):
            lines[i][f"rank_at_{points}"] = rank

    def order(line: Mapping[str, Any]) -> tuple[Any, ...]:
        values = [line["privacy_at_2"], line["privacy_at_5"], line.get("hypervolume", np.nan)]
        return (*(np.inf if pd.isna(value) else -value for value in values), line["curve"], line["defense"])

    return sorted(lines, key=order)


def _best(usable: Sequence[Setting], points: int) -> Setting | None:
    """Return the setting of best privacy that loses no more than some points of accuracy, and never failed to train."""
    allowed = [one for one in usable if one.line["drop"] <= points and one.line["no_class_because"] is None]
    if points == min(CLASSES):
        allowed = [one for one in allowed if one.line["drop_high"] - one.line["drop_low"] < WIDEST]
        allowed = [one for one in allowed if one.keys["dataset"] not in COARSE]
    return max(allowed, key=lambda one: (one.line["privacy"], -one.line["drop"]), default=None)


def _groups(entrants: Sequence[Setting]) -> list[int]:
    """Return rank groups, best first: who can be told from the leader of a group opens the next one and leads it."""
    groups: list[int] = []
    leader = 0
    for i, one in enumerate(entrants):
        if i and _separable(entrants[leader], one):
            leader = i
        groups.append((groups[-1] + (leader == i)) if groups else 1)
    return groups


def _separable(a: Setting, b: Setting) -> bool:
    if min(a.line["trials"], b.line["trials"]) < MIN_PAIRS:
        return False
    low, high = ends(a.draws - b.draws)
    return low > 0 or high < 0


def hypervolume(utility: NDArray[np.float64], privacy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area of the union of the rectangles from (0, 0) to each point, without a hull.

    Args:
        utility: (..., n) in [0, 1].
        privacy: (..., n) in [0, 1].
    """
    order = np.argsort(-utility, axis=-1, kind="stable")
    across = np.take_along_axis(utility, order, -1)
    height = np.maximum.accumulate(np.take_along_axis(privacy, order, -1), axis=-1)
    steps = across - np.concatenate([across[..., 1:], np.zeros_like(across[..., :1])], axis=-1)
    area: NDArray[np.float64] = (steps * height).sum(-1)
    return area


def board(
    rows: pd.DataFrame, utility: pd.DataFrame | None = None, recovers: Mapping[str, Collection[str]] | None = None
) -> dict[str, pd.DataFrame]:
    """Return the tables of the board of defenses by name, from rows of attacks and of federated trainings.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them.
        utility: See `settings`.
        recovers: See `leakbench.board.defenses.defenses`.

    Returns:
        ``ranking``, ``settings``, ``tasks``, and ``autoleak``, ``members`` and ``overlap``, see
        `leakbench.board.autoleak`.
    """
    found = standings(with_cohorts(rows), recovers)
    own = settings(found, utility)
    return {
        "ranking": ranking(own),
        "settings": settings_frame(own),
        "tasks": standings_frame(found),
        "autoleak": autoleak(rows),
        "members": members(rows),
        "overlap": overlap(rows),
    }

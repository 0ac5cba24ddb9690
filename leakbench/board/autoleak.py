"""What AutoLeak found: the worst mean of its members, the worst in each trial, and what every member adds.

The headline is the worst mean. The maximum over members in each trial knows the truth, as no attacker does, and grows
with members even on noise: beside it stands the same maximum over the same members where nothing is sent. Where some
members were not run there is no score, and where less than half of them were, no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.autoleak import CONTROL, ENSEMBLES
from leakbench.board.columns import ATTACK_KEYS, DEFENSE_KEYS, TASK_KEYS, Cell
from leakbench.board.defenses import by_trial, comparable
from leakbench.board.score import build_cells
from leakbench.board.stats import bootstrap

AUTOLEAK_COLUMNS = {
    "defense_label": "defense with its notable parameters",
    "members": "members that counted",
    "of_members": "members of the ensemble",
    "declined": "members that were run, and are not applicable; null: none",
    "missing": "members that were not run; null: none",
    "complete": "whether all were run: otherwise what follows is no score of AutoLeak",
    "older": "members of which rows of an older version, or of another source, are left out; null: none",
    "worst_member": "member of the worst mean",
    "worst": "headline: worst mean of the ranking metric over members",
    "ci_low": "lower end of its 95% interval",
    "ci_high": "upper end of its 95% interval",
    "reference": "mean chance (labels) or floor (inputs)",
    "maximum": "mean over trials of the maximum over members, an oracle's choice",
    "maximum_low": "lower end of its 95% interval",
    "maximum_high": "upper end of its 95% interval",
    "maximum_floor": f"the same maximum over the same members on {CONTROL}; null: not run there",
    "by_member": "trials in which each member was the first to reach the maximum, JSON",
    "trials": "trials that all members have in common",
}
"""The columns that follow `TASK_KEYS` and `DEFENSE_KEYS`."""

MEMBER_COLUMNS = {
    "target": "what is to be recovered",
    "member": "expression",
    "cells": f"pairs of task and defense on which it counted, {CONTROL} left out",
    "worst_in": "those in which it has the worst mean",
    "worst_drop": "mean drop of the worst mean when it is left out, over the cells",
    "worst_drop_most": "largest such drop",
    "worst_drop_where": "task and defense of the largest drop; null: no drop",
    "maximum_drop": "mean drop of the maximum in each trial when it is left out",
    "maximum_drop_floor": f"the same on {CONTROL}: what a member adds that only guesses",
    "adds": "whether it adds anything: some worst mean drops, or the maximum drops more than on the control; "
    "null: not known, as there is no control",
}
"""The columns of `members`."""

OVERLAP_COLUMNS = {
    "target": "what is to be recovered",
    "member": "a member",
    "other": "another",
    "trials": "trials, over cells that both ran on, in which the member is above chance or floor",
    "share": "share of them in which the other is at least as good",
}
"""The columns of `overlap`."""


@dataclass(frozen=True)
class _Block:
    """Members against one defense on one task: values (trials x members), and the reference (trials,).

    Besides, members that are not applicable, and those of which rows of an older version were left out.
    """

    cells: list[Cell]
    values: pd.DataFrame
    reference: pd.Series[float]
    declined: tuple[str, ...] = ()
    older: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        return {key: self.cells[0].keys[key] for key in (*TASK_KEYS, *DEFENSE_KEYS)}

    @property
    def label(self) -> str:
        return str(self.cells[0].rows["defense_label"][0])

    @property
    def control(self) -> bool:
        return bool(self.cells[0].keys["defense"] == CONTROL)

    def means(self) -> pd.Series[float]:
        """Return the mean of every member over its own trials."""
        return pd.Series({_name(cell): cell.score.mean for cell in self.cells})

    def without(self, member: str) -> tuple[float, float]:
        """Return the drop of the worst mean, and of the maximum, when a member is left out; to the reference at most.

        Where nobody else is left, guessing is.
        """
        means, rest = self.means(), self.values.drop(columns=member)
        others = float(means.drop(member).max()) if len(means) > 1 else float(self.reference.mean())
        maximum = rest.max(axis=1) if rest.shape[1] else self.reference
        return max(float(means.max()) - others, 0.0), float((self.values.max(axis=1) - maximum).clip(lower=0).mean())


def _blocks(rows: pd.DataFrame) -> Iterator[list[_Block]]:
    """Yield the blocks of every task."""
    rows = rows.dropna(subset=["attack"])
    kept = pd.Series(False, index=rows.index)
    for target, ensemble in ENSEMBLES.items():
        worked = rows["budget_model_evaluations"].isna() | (rows["budget_model_evaluations"] >= ensemble.evaluations)
        kept |= (rows["target"] == target) & rows["attack_label"].isin(ensemble.members) & worked
    rows = rows[kept]
    for task in comparable(build_cells(rows)):
        current, older = _newest(task, rows["utc"].to_numpy())
        chains: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in current:
            chains.setdefault(tuple(cell.keys[key] for key in DEFENSE_KEYS), []).append(cell)
        blocks = []
        for own in chains.values():
            order = ENSEMBLES[own[0].keys["target"]].members
            own = sorted(own, key=lambda cell: order.index(_name(cell)))
            cells = [cell for cell in own if len(cell.tried)]
            declined = tuple(_name(c) for c in own if c.count("not_applicable") and not len(c.tried))
            if not cells or 2 * (len(cells) + len(declined)) < len(order):
                continue
            values = {_name(c): by_trial(c, c.values(c.metric)) for c in cells}
            reference = pd.concat([by_trial(c, c.reference(c.metric)) for c in cells], axis=1).max(axis=1)
            # Without an interval over the same trials there is no maximum in each.
            table = pd.concat(values, axis=1).dropna()
            blocks.append(_Block(cells, table, reference.reindex(table.index), declined, older))
        if blocks:
            yield blocks


def _name(cell: Cell) -> str:
    return str(cell.rows["attack_label"][0])


def _newest(task: list[Cell], utc: NDArray[Any]) -> tuple[list[Cell], tuple[str, ...]]:
    """Return the cells of the newest version of every member on a task, and the members that have older ones.

    Versions of a member share its label. Of sources with the same version the one that ran last is the newest.
    """
    entries: dict[str, dict[tuple[Any, ...], list[Cell]]] = {}
    for cell in task:
        entry = tuple(cell.keys[key] for key in ATTACK_KEYS)
        entries.setdefault(_name(cell), {}).setdefault(entry, []).append(cell)

    def age(cells: list[Cell]) -> tuple[Any, ...]:
        return cells[0].keys["attack_version"] or 0, max(utc[cell.places].max() for cell in cells)

    current = [cell for own in entries.values() for cell in max(own.values(), key=age)]
    return current, tuple(sorted(name for name, own in entries.items() if len(own) > 1))


def autoleak(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per task and defense that members of AutoLeak were run against.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them; those of a smaller budget are left out.

    Returns:
        `TASK_KEYS`, `DEFENSE_KEYS` and `AUTOLEAK_COLUMNS`, the worst leak of a task first.
    """
    lines = []
    for blocks in _blocks(rows):
        control = next((block for block in blocks if block.control), None)
        lines += [_line(block, control) for block in blocks]
    frame = pd.DataFrame(lines, columns=[*TASK_KEYS, *DEFENSE_KEYS, *AUTOLEAK_COLUMNS])
    order = ["task", "task_hash", "season", "worst", *DEFENSE_KEYS]
    return frame.sort_values(order, ascending=[key != "worst" for key in order], kind="stable", ignore_index=True)


def _line(block: _Block, control: _Block | None) -> dict[str, Any]:
    expected = ENSEMBLES[block.keys["target"]].members
    present = list(block.values.columns)
    missing = [member for member in expected if member not in (*present, *block.declined)]
    means = block.means()
    worst = block.cells[int(np.argmax(means.to_numpy()))]
    highest = block.values.max(axis=1)
    interval = bootstrap(highest.to_numpy(), highest.index.tolist())
    first = block.values.to_numpy().argmax(axis=1) if len(highest) else np.empty(0, dtype=int)
    same = control is not None and set(present) <= set(control.values.columns)
    return block.keys | {
        "defense_label": block.label,
        "members": len(present),
        "of_members": len(expected),
        "declined": ", ".join(block.declined) or None,
        "missing": ", ".join(missing) or None,
        "complete": not missing,
        "older": ", ".join(block.older) or None,
        "worst_member": _name(worst),
        "worst": worst.score.mean,
        "ci_low": worst.score.low,
        "ci_high": worst.score.high,
        "reference": float(block.reference.mean()),
        "maximum": interval.mean,
        "maximum_low": interval.low,
        "maximum_high": interval.high,
        "maximum_floor": float(control.values[present].max(axis=1).mean()) if control is not None and same else np.nan,
        "by_member": json.dumps({name: int((first == i).sum()) for i, name in enumerate(present)}),
        "trials": len(highest),
    }


def members(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what every member adds: one line per target and member that was run; `MEMBER_COLUMNS`.

    Args:
        rows: See `autoleak`.
    """
    every = [block for blocks in _blocks(rows) for block in blocks]
    lines = []
    for target, ensemble in ENSEMBLES.items():
        for member in ensemble.members:
            own = [b for b in every if b.keys["target"] == target and member in b.values.columns]
            cells = [block for block in own if not block.control]
            if not cells:
                continue
            drops = np.array([block.without(member) for block in cells])
            floors = [block.without(member)[1] for block in own if block.control]
            most = int(drops[:, 0].argmax())
            floor = float(np.mean(floors)) if floors else np.nan
            beyond = float(drops[:, 1].mean()) > floor
            where = f"{cells[most].keys['task']} vs {cells[most].label}"
            line = {
                "target": target,
                "member": member,
                "cells": len(cells),
                "worst_in": sum(block.means().idxmax() == member for block in cells),
                "worst_drop": drops[:, 0].mean(),
                "worst_drop_most": drops[most, 0],
                "worst_drop_where": where if drops[most, 0] > 0 else None,
                "maximum_drop": drops[:, 1].mean(),
                "maximum_drop_floor": floor,
                "adds": bool(drops[most, 0] > 0 or beyond) if floors else None,
            }
            lines.append(line)
    return pd.DataFrame(lines, columns=list(MEMBER_COLUMNS)).astype({"adds": object})


def overlap(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how often another member does as well: one line per ordered pair of members; `OVERLAP_COLUMNS`.

    Args:
        rows: See `autoleak`.
    """
    every = [block for blocks in _blocks(rows) for block in blocks if not block.control]
    lines = []
    for target, ensemble in ENSEMBLES.items():
        for member in ensemble.members:
            for other in ensemble.members:
                both = [b for b in every if b.keys["target"] == target and {member, other} <= set(b.values.columns)]
                if member == other or not both:
                    continue
                parts = [block.values[block.values[member] > block.reference] for block in both]
                found = pd.concat([part[other] >= part[member] for part in parts])
                share = float(found.mean()) if len(found) else np.nan
                lines.append(dict(zip(OVERLAP_COLUMNS, (target, member, other, len(found), share), strict=True)))
    return pd.DataFrame(lines, columns=list(OVERLAP_COLUMNS))

"""What a defense costs: trainings at the learning rate it chose, each beside the undefended one of the same seed.

Pure functions of rows; no torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from leakbench.board.columns import DEFENSE_KEYS

SETTING = (
    *("season", "season_commitment", "benchmark_version", "dataset", "dataset_fingerprint", "normalise"),
    *("architecture", "architecture_init", "architecture_params", "batch_size", "sends", "local_steps", "momentum"),
    *("weight_decay", "reduction", "batches", "batches_per_epoch", "batch_norm", "send_buffers", "precision"),
    *("clients", "rounds", "holdout", "lr_grid", "planned_seeds", "evaluate_every", "partition"),
)
"""What a defended training has in common with the undefended one that it is compared with."""

TARGET_SHARE = 0.95
"""Share of the undefended accuracy that counts as having got there."""

CLEAR = 0.05
"""By how much undefended accuracy has to exceed chance for there to be something to lose."""

NUMBERS = ("drop", "utility", "rounds_to_target", "client_time_ratio", "upload_ratio")
COMPARED = (*NUMBERS, "utility_note")
"""Columns that `compared` adds: points of accuracy lost; (accuracy - chance) / (undefended - chance) in [0, 1], 0 of a
defense of which a training failed; rounds to 95% of the undefended accuracy, null: never; client seconds and upload
bytes as multiples of the undefended training's. Each against the undefended training of the same setting and seed,
client seconds at the same learning rate, too; null: there is none, it failed, or it is not clearly above chance (at
least `CLEAR`). Which of these, and how many trainings failed, is in ``utility_note``; null: nothing to note."""


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep, of rows of the same training, the latest."""
    same = [*SETTING, *DEFENSE_KEYS, "lr", "seed"]
    return rows.sort_values("utc", kind="stable").drop_duplicates(same, keep="last").sort_index()


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at the learning rate that each defense chose: the best on what was held out, with the first seed.

    Of equally good ones that of more seeds, then the lowest.
    """
    kept = []
    for _, own in rows.groupby([*SETTING, *DEFENSE_KEYS], dropna=False, sort=False):
        first = own[own["seed"] == own["seed"].min()]
        seeds = own.groupby("lr")["seed"].count()
        order = first.assign(_seeds=first["lr"].map(seeds)).sort_values(
            ["accuracy_holdout", "_seeds", "lr"], ascending=[False, False, True], kind="stable", na_position="last"
        )
        kept.append(own[own["lr"] == order["lr"].iloc[0]])
    return pd.concat(kept).sort_index() if kept else rows


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `chosen` learning rates with the columns of `COMPARED`."""
    every = latest(rows)
    found = chosen(every).reset_index(drop=True)
    keys = [*SETTING, "seed"]
    twin = _undefended(found, found, keys, ["status", "error", "accuracy", "upload_bytes"])
    trained, clear = twin["status"] == "ok", twin["accuracy"] - found["accuracy_chance"] >= CLEAR
    level = twin["accuracy"].where(trained & clear)
    # The scale is fixed by training without a defense; one that cannot always be trained with is of no use.
    gained = (found["accuracy"] - found["accuracy_chance"]) / (level - found["accuracy_chance"])
    groups = (found["status"] != "ok").groupby([found[key] for key in (*SETTING, *DEFENSE_KEYS)], dropna=False)
    failed, seeds = groups.transform("sum"), groups.transform("size")
    useless = (failed > 0) & (found["defense"] != "none")
    same_rate = _undefended(every[every["status"] == "ok"], found, [*keys, "lr"], ["client_seconds"])
    columns: dict[str, Any] = {
        "drop": 100 * (level - found["accuracy"]),
        "utility": gained.clip(0, 1).mask(useless & level.notna(), 0.0),
        "rounds_to_target": [
            _reached(curve, TARGET_SHARE * goal) for curve, goal in zip(found["curve"], level, strict=True)
        ],
        "client_time_ratio": found["client_seconds"] / same_rate["client_seconds"],
        "upload_ratio": found["upload_bytes"] / twin["upload_bytes"].where(trained),
    }
    notes = pd.Series(None, index=found.index, dtype=object)
    notes[useless] = [f"{a} of {b} trainings failed" for a, b in zip(failed[useless], seeds[useless], strict=True)]
    notes[~clear] = [
        f"without a defense {100 * accuracy:.1f}% is not clearly above chance, {100 * chance:.1f}%"
        for accuracy, chance in zip(twin["accuracy"][~clear], found["accuracy_chance"][~clear], strict=True)
    ]
    notes[~trained] = [f"the undefended training failed: {error}" for error in twin["error"][~trained]]
    notes[twin["status"].isna()] = "there is no undefended training"
    return found.assign(**columns, utility_note=notes)


def _undefended(rows: pd.DataFrame, found: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """Return the undefended training's values for every row of ``found``, null where there is none."""
    own = rows.loc[rows["defense"] == "none", [*keys, *values]].drop_duplicates(keys)
    return found[keys].merge(own, on=keys, how="left")


def _reached(curve: str | None, goal: float) -> float:
    """Return after how many rounds an accuracy was first reached; NaN: never, or the goal is not known."""
    if curve is None or math.isnan(goal):
        return math.nan
    return next((float(done) for done, accuracy in json.loads(curve) if accuracy >= goal), math.nan)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line per setting and defense: means over seeds, with intervals of accuracy and drop.

    Args:
        rows: What `compared` returns.

    Returns:
        `SETTING` and `DEFENSE_KEYS`, ``defense_label``, ``defense_strength``, ``lr``, ``seeds``, ``failed``, means of
        ``accuracy`` and of `NUMBERS` (of ``rounds_to_target`` null where one seed never got there), ``utility_note``,
        the greatest ``epsilon``, and the ends of the 95% t-intervals over seeds of accuracy and drop, null with one
        seed.
    """
    lines = []
    for keys, own in rows.groupby([*SETTING, *DEFENSE_KEYS, "lr"], dropna=False, sort=False):
        line: dict[str, Any] = dict(zip((*SETTING, *DEFENSE_KEYS, "lr"), keys, strict=True))
        line |= {name: own[name].iloc[0] for name in ("defense_label", "defense_strength")}
        line |= {"seeds": len(own), "failed": int((own["status"] != "ok").sum())}
        line |= {name: own[name].mean(skipna=name != "rounds_to_target") for name in ("accuracy", *NUMBERS)}
        line["epsilon"] = own["epsilon"].max()
        errors = own.loc[own["status"] != "ok", "error"]
        line["utility_note"] = "; ".join(own["utility_note"].dropna().unique()) or None
        line["error"] = None if errors.empty else errors.iloc[0]
        for name in ("accuracy", "drop"):
            line[f"{name}_low"], line[f"{name}_high"] = interval(own[name].to_list())
        lines.append(line)
    board = pd.DataFrame(lines).assign(_defended=lambda frame: frame["defense"] != "none")
    return board.sort_values([*SETTING, "_defended", "defense_label"], kind="stable").drop(columns="_defended")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the 95% t-interval of a mean; NaN with less than two values."""
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) < 2:
        return math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return float(known.mean()) - half, float(known.mean()) + half


def lines(summary: pd.DataFrame) -> list[str]:
    """Return `table` as plain text, one block per dataset, net and protocol."""
    text: list[str] = []
    block = [name for name in SETTING if name != "partition"]
    for keys, own in summary.groupby(block, dropna=False, sort=False):
        at = dict(zip(block, keys, strict=True))
        steps = "" if at["sends"] == "gradient" else f" of {at['local_steps']} steps"
        text += [
            "",
            f"{at['dataset']}, {at['architecture']}, {at['clients']} clients, {at['rounds']} rounds, "
            f"{at['sends']}{steps}, B={at['batch_size']}",
        ]
        shown = [[*_HEADINGS], *(_cells(line) for line in own.to_dict("records"))]
        widths = [max(len(row[i]) for row in shown) for i in range(len(_HEADINGS))]
        for row in shown:
            cells = [c.ljust(w) if i < _LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            text.append("  ".join(cells).rstrip())
        noted: dict[tuple[str, str], list[str]] = {}
        for line in own.to_dict("records"):
            if line["utility_note"] is not None:
                noted.setdefault((line["partition"], line["utility_note"]), []).append(line["defense_label"])
        text += [f"  {partition}, {', '.join(who)}: {note}" for (partition, note), who in noted.items()]
    return text[1:]


_HEADINGS = (
    "partition",
    "defense",
    "lr",
    "accuracy %",
    "points lost",
    "rounds",
    "time x",
    "upload x",
    "epsilon",
    "seeds",
)
_LEFT = 2


def _cells(line: Mapping[Any, Any]) -> list[str]:
    failed = f", {line['failed']} failed" if line["failed"] else ""
    return [
        line["partition"],
        line["defense_label"],
        f"{line['lr']:g}",
        _with_interval(line, "accuracy", 100),
        "" if line["defense"] == "none" else _with_interval(line, "drop", 1),
        _number(line["rounds_to_target"], 0),
        _number(line["client_time_ratio"], 2),
        _number(line["upload_ratio"], 2),
        _number(line["epsilon"], 1),
        f"{line['seeds']}{failed}",
    ]


def _with_interval(line: Mapping[Any, Any], name: str, scale: float) -> str:
    mean, low, high = (_number(scale * line[key], 1) for key in (name, f"{name}_low", f"{name}_high"))
    if name == "accuracy" and low != "-":
        low, high = (_number(min(max(100 * line[f"{name}_{end}"], 0), 100), 1) for end in ("low", "high"))
    return mean if low == "-" else f"{mean} [{low}, {high}]"


def _number(value: float, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:z.{digits}f}"

"""Secure aggregation as a defense: a cohort behind a sum, beside the same client on its own."""

from __future__ import annotations

import json

import pandas as pd

from leakbench.board.score import group_ids
from leakbench.metrics import headline
from leakbench.results import ROW_FIELDS

COHORT = "secure_aggregation"
"""Name of its lines."""

_OWN = ("lane", "task", "task_hash", "clients", "secure_aggregation", "weighting")
_FIELDS = [field.name for field in ROW_FIELDS]
_ALIKE = tuple(
    name
    for name in _FIELDS[_FIELDS.index("season") : _FIELDS.index("budget_wall_seconds") + 1]
    if name not in (*_OWN, "suite", "decoder", "num_classes", "checkpoint_sha256", "checkpoint_origin")
)
"""What a cohort's task has in common with that of one client."""


def with_cohorts(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, and those of undefended cohorts once more, as rows of a defense on the task of one client.

    Only where that task was run undefended too. What counts is how far an attack gets above chance or the floor, which
    is another for many clients than for one: values are moved to those of the one client's task (labels, inference: the
    same share of what is between chance and all; inputs: the same gain, dB).

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them.
    """
    plainly = rows[(rows["defense"] == "none") & rows["attack"].notna()]
    sums = plainly[plainly["secure_aggregation"] & (plainly["clients"] > 1)]
    alone = plainly[plainly["clients"] == 1]
    if sums.empty or alone.empty:
        return rows
    both = pd.concat([sums, alone])
    ids = group_ids(both, _ALIKE).to_numpy()
    sums, alone = sums.assign(_twin=ids[: len(sums)]), alone.assign(_twin=ids[len(sums) :])
    made = []
    for _, part in sums.groupby(["_twin", "clients"]):
        clients = int(part["clients"].iloc[0])
        one = alone[alone["_twin"] == part["_twin"].iloc[0]]
        if one.empty:
            continue
        spec = headline(str(part["target"].iloc[0]))
        value, own = part[spec.name].astype(float), part[spec.reference].astype(float)
        level = part["trial"].map(one.groupby("trial")[spec.reference].mean()).fillna(one[spec.reference].mean())
        moved = value - own + level if spec.target == "inputs" else level + (value - own) / (1 - own) * (1 - level)
        twin_keys = {key: one[key].iloc[0] for key in _OWN}
        named = sorted(part["attack"].unique())
        # Every attack on a sum was told that it is one: all of them know the defense.
        entry = {
            "defense": COHORT,
            "defense_label": f"{COHORT}(clients={clients})",
            "defense_params": json.dumps({"clients": clients}),
            "defense_strength": json.dumps([["clients", "higher"]]),
            "defense_adaptive": json.dumps([named]),
        }
        made.append(part.assign(**twin_keys, **entry, **{spec.name: moved, spec.reference: level}))
    return pd.concat([rows, *made], ignore_index=True).drop(columns="_twin", errors="ignore") if made else rows

"""The values that columns of rows can have: ranges of numbers, labels, days, and lines of text. No torch here."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from leakbench.metrics import METRICS

Row = Mapping[str, Any]

MOST_TEXT = 10_000
"""Most characters of a text."""

MOST_LIST = 1 << 20
"""Most characters of `_LISTS`."""

_LISTS = ("notes", "planted_tensors", "client_sizes", "curve")
"""Columns of JSON that grow with the model, the clients or the rounds."""

_FIRST_DAY = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_ROUNDING = 1e-5
_SHARE, _POSITIVE = (0.0, 1.0), (0.0, math.inf)
_METRIC_RANGES = {
    "l1_count_error": _POSITIVE,
    "psnr": (0.0, 120.0),
    "ssim": (-1.0, 1.0),
    "lpips": _POSITIVE,
    "feature_distance": (0.0, 2.0),
    "identification_rank": (1.0, math.inf),
    "inference_bits": (1 + math.log2(0.01), 1.0),
    "least_norm_scale": _POSITIVE,
    "logit_spread": _POSITIVE,
    "head_gradient_rank": _POSITIVE,
    "d_snr": _POSITIVE,
    "parameter_distance": _POSITIVE,
}
"""Of the metrics that are no shares."""
_CHANCE = {"inference_accuracy_chance": (0.5, 0.5), "inference_bits_chance": (0.0, 0.0)}
_SHARES = ("inference_truth", "inference_score", "refused", "planted_share")
_COUNTS = (
    *("wall_seconds", "client_seconds", "prepare_seconds", "device_seconds", "peak_memory_bytes", "model_evaluations"),
    *("draw", "distinct_labels", "max_label_count", "identification_gallery"),
    *("upload_bytes", "update_numbers", "epsilon", "rounds_done"),
)
RANGES: dict[str, tuple[float, float]] = {
    **{name: _METRIC_RANGES.get(name, _SHARE) for name in METRICS},
    **{spec.reference: _METRIC_RANGES.get(name, _SHARE) for name, spec in METRICS.items()},
    **_CHANCE,
    **dict.fromkeys(_SHARES, _SHARE),
    **dict.fromkeys(_COUNTS, _POSITIVE),
}
"""Least and greatest value of the numbers of rows, up to rounding; none is infinite."""

_NAMED = ("", "_version", "_source_sha256", "_label")
ENTRIES = tuple(f"{kind}{part}" for kind in ("attack", "defense") for part in (*_NAMED, "_params"))
"""Columns of rows that `shared_labels` reads, besides ``_where``."""


def impossible(table: pa.Table, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the values in rows of one job, of attacks, measures or trainings, that none can have.

    Args:
        table: The rows.
        rows: The same.
    """
    for name, (low, high) in RANGES.items():
        if name in rows[0]:
            least, most = low - _ROUNDING, high + _ROUNDING
            bad = [
                row[name]
                for row in rows
                if row[name] is not None and not (least <= row[name] <= most and math.isfinite(row[name]))
            ]
            if bad:
                between = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
                yield f"{name} = {bad[0]} is no {'share' if (low, high) == _SHARE else f'number {between}'}"
    for column in (name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)):
        for text in filter(None, pc.unique(table[column]).to_pylist()):
            if len(text) > (MOST_LIST if column in _LISTS else MOST_TEXT):
                yield f"{column}: a text of {len(text):,} characters"
            elif not text.isprintable():
                yield f"{column}: {text[:60]!r} is no line of printable text"
    yield from wrong_labels(rows[0])


def wrong_days(table: pa.Table) -> Iterator[str]:
    """Yield what is wrong with the time when rows were written; of any number, also one that is no date of Python."""
    now = dt.datetime.now(dt.UTC)
    first, last = (int(day.timestamp() * 1e6) for day in (_FIRST_DAY, now + dt.timedelta(days=1)))
    times = table["utc"].cast(pa.int64())
    if pc.min(times).as_py() < first or pc.max(times).as_py() > last:
        yield f"utc: expected days from {_FIRST_DAY:%Y-%m-%d} to {now:%Y-%m-%d}, got others"


def wrong_labels(row: Row) -> Iterator[str]:
    """Yield which labels are not those of the names and parameters beside them.

    A label has the parameters that differ from the defaults, so that any of them may be absent, in any order.
    """
    for kind in ("attack", "measure", "defense"):
        if kind not in row:
            continue
        try:
            params = json.loads(row[f"{kind}_params"])
            parts = params if isinstance(params, list) else [params]
            names = row[kind].split("+") if len(parts) > 1 else [row[kind]]
            right = all(isinstance(part, dict) for part in parts) and _is_label(
                row[f"{kind}_label"], list(zip(names, parts, strict=True))
            )
        except ValueError:
            right = False
        if not right:
            yield f"forged: {kind}_label {row[f'{kind}_label'][:60]!r} is not that of {kind} and {kind}_params"


def shared_labels(rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of jobs whose label is that of other parameters of the same entry, too.

    Args:
        rows: Rows of attacks with `ENTRIES`, and ``_where`` they are.
    """
    for kind in ("attack", "defense"):
        own = [f"{kind}{part}" for part in _NAMED]
        named = rows[[*own, f"{kind}_params", "_where"]].drop_duplicates()
        several = named.groupby(own, dropna=False, sort=False)[f"{kind}_params"].transform("nunique") > 1
        for where in named.loc[several, "_where"].drop_duplicates():
            yield where, f"forged: {kind}_label is that of other {kind}_params in other jobs, too"


def _is_label(label: str, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    (name, params), rest = parts[0], label
    if not rest.startswith(name):
        return False
    rest = rest.removeprefix(name)
    if rest.startswith("("):
        left, rest = {f"{key}={value!r}" for key, value in params.items()}, rest[1:]
        while True:
            here = [text for text in left if rest.startswith((f"{text}, ", f"{text})"))]
            if not here:
                return False
            left -= set(here)
            rest = rest.removeprefix(here[0])
            if rest.startswith(")"):
                rest = rest[1:]
                break
            rest = rest[2:]
    if len(parts) == 1:
        return not rest
    return rest.startswith("+") and _is_label(rest[1:], parts[1:])

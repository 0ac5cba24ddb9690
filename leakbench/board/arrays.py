"""The rows of a cell as arrays: a board has thousands of cells, and pandas takes long to cut a frame into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leakbench.metrics import METRICS


class Rows:
    """Some rows, column by column.

    Args:
        columns: Every one of `COLUMNS`.
        where: Which of their values are meant; None: all.
    """

    TEXTS = ("status", "error", "attack_label", "defense_label", "model_shown", "isolation", "inserted", "attributed")
    """Columns whose nulls are None; in all others they are NaN."""

    COLUMNS = (
        *("draw", "trial", *TEXTS, "planted_share", "refused", "wall_seconds", "inference_truth", "inference_score"),
        *(spec.name for spec in METRICS.values()),
        *(spec.reference for spec in METRICS.values()),
    )
    """What a cell is computed from."""

    def __init__(self, columns: Mapping[str, NDArray[Any]], where: slice | NDArray[np.bool_] | None = None) -> None:
        self._columns, self._where = columns, where

    @classmethod
    def of(cls, frame: pd.DataFrame, order: NDArray[np.intp]) -> Rows:
        """Return the rows of a frame with `COLUMNS` in some order."""
        columns = {}
        kept: NDArray[np.intp] | slice = order
        if (order == np.arange(len(order))).all():
            kept = slice(None)  # nothing is copied
        for name in cls.COLUMNS:
            values = frame[name]
            if name in cls.TEXTS:
                columns[name] = values.astype(object).where(values.notna(), None).to_numpy(object)[kept]
            else:
                whole = name in ("draw", "trial")
                columns[name] = (values.to_numpy() if whole else values.to_numpy(np.float64, na_value=np.nan))[kept]
        return cls(columns)

    def __len__(self) -> int:
        return len(self["trial"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        values = self._columns[name]
        return values if self._where is None else values[self._where]

    def part(self, where: slice | NDArray[np.bool_]) -> Rows:
        """Return some of them, in the same order."""
        whole = self._columns if self._where is None else {name: self[name] for name in self.COLUMNS}
        return Rows(whole, where)

    def known(self, name: str) -> list[Any]:
        """Return the values of one of `TEXTS` that are not null."""
        return [value for value in self[name].tolist() if value is not None]

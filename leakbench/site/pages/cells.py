"""One page per cell: its rows, and the commands that reproduce them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from leakbench.board.columns import Cell
from leakbench.board.lanes import EXACT
from leakbench.site.data import Data, attack_page, cell_page, defense_page, short_label, task_page
from leakbench.site.page import Page
from leakbench.stage import IN_TRAINING
from leakbench.submitting.badges import BADGES

PROVENANCE = (
    *("suite", "leakbench_version", "git_sha", "git_dirty", "code_sha256", "attack_source_sha256"),
    *("defense_source_sha256", "dataset_fingerprint", "checkpoint_origin", "checkpoint_sha256", "host_kind", "device"),
    *("python", "torch", "cuda", "threads", "isolation", "season", "season_commitment", "utc"),
)
"""What is told of a cell's first row."""


SHORT = 16
"""Digits of a job's id that name it among the jobs of a site."""


def row_id(job: str, trial: int) -> str:
    """Return the name of a row as `leakbench reproduce` takes it."""
    return f"{job[:SHORT]}:{trial}"


def pages(data: Data) -> Iterator[Page]:
    """Yield a page per cell of the board."""
    jobs = data.rows["job_id"].astype("category").cat
    ids, number = jobs.categories.to_numpy(object), jobs.codes.to_numpy()
    evaluations = data.rows["model_evaluations"].to_numpy(np.float64, na_value=np.nan)
    firsts = data.rows.iloc[[int(cell.places[0]) for cell in data.cell.values()]]
    provenance = dict(zip(data.cell, firsts[[*PROVENANCE, "stage"]].astype(object).to_dict("records"), strict=True))
    known = data.board.set_index("id")
    by_id = known[["attack_label", "defense_label", "mean", "ci_low", "ci_high", "reference"]].to_dict("index")
    for name, cell in data.cell.items():
        line: dict[Any, Any] = {**cell.keys, **by_id[name]}
        first = provenance[name]
        labels = (
            short_label(cell.keys["attack"], cell.keys["attack_params"]),
            short_label(cell.keys["defense"], cell.keys["defense_params"]),
        )
        own = ids[number[cell.places]]
        run = ["leakbench", "run", str(first["suite"]) or "SUITE", "--attack", labels[0]]
        run += [] if cell.keys["defense"] == "none" else ["--defense", labels[1]]
        run += ["--in-training", "RUN"] if first["stage"] == IN_TRAINING else []
        context = {
            "line": line,
            "badge": data.badge[name],
            "meaning": BADGES[data.badge[name].removesuffix(" disputed")],
            "said": data.statements.about(cell.keys),
            "links": {
                "task": task_page(cell.keys["task"], cell.keys["task_hash"]),
                "attack": attack_page(cell.keys["attack"]),
                "defense": defense_page(cell.keys["defense"]),
            },
            "facts": [(key, "–" if pd.isna(first[key]) else str(first[key])) for key in PROVENANCE],
            "metric": cell.metric,
            "exact": EXACT[cell.keys["target"]],
            "body": _body(cell, own, evaluations[cell.places]),
            "example": row_id(own[0], int(cell.rows["trial"][0])) + data.rows_option(own[0]),
            "command": "\n".join(data.typed(own[0], "attacks") or [shlex.join(run)]),
            "is_digit_scale": cell.keys["target"] == "inputs",
        }
        title = f"{line['attack_label']} on {cell.keys['task']}"
        yield Page(cell_page(name), title, "cell.html", context)


def _body(cell: Cell, jobs: Any, evaluations: Any) -> Markup:
    """Return the lines of the table of rows: written here, since a site has a million of them."""
    rows, spec = cell.rows, cell.metric
    columns = zip(
        rows["trial"].tolist(),
        rows["draw"].tolist(),
        rows["status"].tolist(),
        rows[spec.name].tolist(),
        rows[spec.reference].tolist(),
        rows[EXACT[cell.keys["target"]]].tolist(),
        evaluations.tolist(),
        rows["wall_seconds"].tolist(),
        jobs.tolist(),
        rows["error"].tolist(),
        strict=True,
    )
    safe = {
        text: str(escape(text))
        for text in {*rows["status"].tolist(), *(job[:SHORT] for job in jobs.tolist()), *rows["error"].tolist()}
    }
    lines = [
        f'<tr id="t{trial}-{draw}"><th scope="row">{trial}</th><td>{draw}</td><td>{safe[status]}</td>'
        f"{_number(value)}{_number(reference)}{_number(exact)}{_number(count)}{_number(seconds)}"
        f'<td class="x"><code>{safe[job[:SHORT]]}:{trial}</code></td>'
        f'<td class="x">{"" if error is None else safe[error]}</td></tr>'
        for trial, draw, status, value, reference, exact, count, seconds, job, error in columns
    ]
    return Markup("\n".join(lines))  # noqa: S704 (numbers, and texts that went through escape)


def _number(value: float) -> str:
    """Return a place of the table, with the value itself where it is shown rounded."""
    shown = "–" if value != value else f"{value:.4g}"
    exact = "" if value != value or float(shown) == value else f' data-v="{value!r}"'
    return f"<td{exact}>{shown}</td>"

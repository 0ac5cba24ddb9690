"""A paper's figures beside leakbench's own: what a reference file says, and the table of the comparison. No torch here.

A reference file, ``tasks/references/<suite>.yaml``, belongs to a suite. It holds figures that were read in a paper, in
released code or in released logs, each with where it was read; cells of the suite without a figure are in the table all
the same, with an empty reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from leakbench.board.claims import Claim, summary, verdicts
from leakbench.board.reproduction import NO_FIGURE, claims_markdown, to_json, to_markdown
from leakbench.board.stats import bootstrap
from leakbench.errors import UserError, unknown
from leakbench.grids import Cell
from leakbench.lock import tasks_folder
from leakbench.measures.catalogue import MEASURES
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.metrics import METRICS, headline
from leakbench.parts import Part
from leakbench.results import MEASURES_FOLDER, load_measures, load_rows
from leakbench.runner.session import PLAN_FILE, planned_jobs
from leakbench.schema import ROW_FIELDS, task_columns
from leakbench.stage import stage_order
from leakbench.suites import read_yaml

Where = dict[str, str | int | float | bool | None]
"""Values by row column."""

COLUMNS = {
    "setting": "what was measured: the reference file's words, or the task's id",
    "task": "task id",
    "attack": "attack, with parameters that differ from the defaults",
    "defense": "defense, with its strength",
    "metric": "name of the metric",
    "reference": "the paper's or released figure; empty where none can be backed",
    "tag": "where it was read: LOG (released logs), CODE (released code), READ (a public text)",
    "reference_n": "tries behind it",
    "ours": "mean over the trials",
    "low": "lower end of its 95% interval",
    "high": "upper end",
    "n": "trials behind it",
    "chance": "what a guess reaches without the update",
    "difference": "ours minus reference",
    "tolerance": "largest difference that sampling explains (95%), with the figure's rounding",
    "verdict": "agrees, differs, figure not at hand, or not measured",
    "note": "what is known about the difference, or why nothing was measured",
}
"""The columns of the table."""

_Z = 1.959964  # two-sided 95%
_KEYS = ("task_hash", "task", "attack_label", "defense_label")


class Figure(Part):
    """Figures of one setting."""

    setting: str
    """The setting in words."""
    where: Where
    """The cells it is about, by row columns; together with `References.common`."""
    values: dict[str, float]
    """Reference value by metric."""
    tag: Literal["LOG", "CODE", "READ"]
    """Where it was read."""
    source: str
    """File or page."""
    tries: Annotated[int, Field(ge=1)]
    """Trials behind it."""
    decimals: Annotated[int, Field(ge=0)] = 3
    """Decimals it is printed with; half a unit of the last is added to the tolerance."""
    note: str = ""
    """What explains a difference, from the facts of the released code."""


class References(Part):
    """A reference file."""

    paper: str
    """Authors, title, venue."""
    provenance: str
    """How the figures came here."""
    quick: list[Where]
    """What ``--quick`` keeps: cells that agree with any of these."""
    quick_trials: Annotated[int, Field(ge=1)] | None = None
    """Trials per cell with ``--quick``; as the suite has it where None."""
    common: Where = Field(default_factory=dict)
    """Columns that all figures share."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics of the cells without a figure; the target's headline where empty."""
    figures: list[Figure] = Field(default_factory=list)
    """The figures."""
    claims: list[Claim] = Field(default_factory=list)
    """Statements of the work that are tested against measures."""


def reference_paths() -> dict[str, Path]:
    """Return the reference files by the name of their suite."""
    return {path.stem: path for path in sorted((tasks_folder() / "references").glob("*.yaml"))}


def load_references(name: str) -> References:
    """Load the reference file of a suite.

    Raises:
        UserError: There is none, or a key, column, metric or value in it is wrong.
    """
    paths = reference_paths()
    if name not in paths:
        raise unknown("paper to reproduce", name, paths)
    path = paths[name]
    try:
        references = References.model_validate(read_yaml(path))
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise UserError(
            f"{path}: {where}: {detail['msg']}, got {str(detail['input'])[:60]!r}; correct the file"
        ) from None
    columns = {field.name for field in (*ROW_FIELDS, *MEASURE_FIELDS)}
    conditions = (
        references.common,
        *references.quick,
        *(figure.where for figure in references.figures),
        *(claim.where for claim in references.claims),
    )
    for key in (key for condition in conditions for key in condition):
        if key not in columns:
            raise UserError(f"{path}: {unknown('row column', key, columns)}")
    for metric in (*references.metrics, *(metric for figure in references.figures for metric in figure.values)):
        if metric not in METRICS:
            raise UserError(f"{path}: {unknown('metric', metric, METRICS)}")
    told = {quantity.name for name in MEASURES for quantity in MEASURES.get(name).quantities} | set(METRICS)
    for quantity in (quantity for claim in references.claims for quantity in claim.quantities):
        if quantity not in told:
            raise UserError(f"{path}: {unknown('quantity', quantity, told)}")
    return references


def is_quick(cell: Cell, references: References) -> bool:
    """Whether ``--quick`` keeps the cell."""
    kind = cell.attack.description.kind  # attack or measure
    row = {**task_columns(cell.task), kind: cell.attack.name, "defense": "+".join(d.name for d in cell.defense)}
    return any(all(row.get(key) == value for key, value in where.items()) for where in references.quick)


def compare(rows: pd.DataFrame, references: References, *, whole: bool = True) -> pd.DataFrame:
    """Return one line per figure, and of every cell without a figure one per metric to show.

    A figure agrees if it differs from ours by no more than sampling explains: 1.96 standard deviations of the
    difference of two means with our spread of trials and, where it can be told, of models, plus the figure's rounding.

    Args:
        rows: Result rows as `leakbench.results.load_rows` gives them.
        references: The figures.
        whole: Whether figures of settings that are not among the rows have a line, too.

    Returns:
        `COLUMNS`; the lines with figures first, setting by setting in their order.
    """
    cells = [part for _, part in rows.groupby(list(_KEYS), sort=False, dropna=False)]
    cells.sort(key=lambda part: _place(part.iloc[0]))
    lines: list[dict[str, Any]] = []
    used: set[int] = set()
    for figure in references.figures:
        where = {**references.common, **figure.where}
        matching = [i for i, part in enumerate(cells) if _matches(part.iloc[0], where)]
        used.update(matching)
        lines += [_line(cells[i], metric, figure) for i in matching for metric in figure.values]
        if whole and not matching:
            lines += [_unmeasured(figure, metric) for metric in figure.values]
    order = {figure.setting: i for i, figure in reversed(list(enumerate(references.figures)))}
    lines.sort(key=lambda line: order[line["setting"]])
    for i, part in enumerate(cells):
        if i not in used:
            shown = references.metrics or [headline(part["target"].iloc[0]).name]
            lines += [_line(part, metric, None) for metric in shown]
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _place(row: pd.Series[Any]) -> tuple[Any, ...]:
    """Return where a cell stands among others: by net, stage, steps, sampler, batch size, defense, attack."""
    net = (row["dataset"], row["architecture"], row["architecture_params"])
    return (
        *net,
        stage_order(row["stage"]),
        row["local_steps"],
        row["sampler"],
        row["batch_size"],
        row["defense_label"],
        row["attack_label"],
    )


def _matches(row: pd.Series[Any], where: Mapping[str, Any]) -> bool:
    return all(pd.isna(row[key]) if value is None else row[key] == value for key, value in where.items())


def _unmeasured(figure: Figure, metric: str) -> dict[str, Any]:
    line = {"setting": figure.setting, "attack": figure.where.get("attack"), "metric": metric}
    line |= {"reference": figure.values[metric], "tag": figure.tag, "reference_n": figure.tries}
    return line | {"verdict": "not measured", "note": "no cell of this run is of this setting"}


def _line(part: pd.DataFrame, metric: str, figure: Figure | None) -> dict[str, Any]:
    first = part.iloc[0]
    line: dict[str, Any] = {
        "setting": first["task"] if figure is None else figure.setting,
        "task": first["task"],
        "attack": first["attack_label"],
        "defense": first["defense_label"],
        "metric": metric,
    }
    if figure is not None:
        line |= {"reference": figure.values[metric], "tag": figure.tag, "reference_n": figure.tries}
    values = part[metric].to_numpy(dtype=np.float64, na_value=np.nan)
    if (part["status"] != "ok").any() or np.isnan(values).any():
        status = part.loc[part["status"] != "ok"].iloc[0] if (part["status"] != "ok").any() else first
        return line | {"n": 0, "verdict": "not measured", "note": f"{status['status']}: {status['error']}"}
    mean, low, high = bootstrap(values, range(len(values)))
    line |= {"ours": mean, "low": low, "high": high, "n": len(values), "chance": part[METRICS[metric].reference].mean()}
    if figure is None:
        return line | {"verdict": NO_FIGURE}
    tolerance = _Z * _deviation(values, part["draw"].to_numpy(), figure.tries) + 0.5 * 10.0**-figure.decimals
    difference = mean - figure.values[metric]
    agrees = abs(difference) <= tolerance + 1e-12
    line |= {"difference": difference, "tolerance": tolerance, "verdict": "agrees" if agrees else "differs"}
    return line | {"note": "" if agrees else figure.note}


def _deviation(values: NDArray[np.float64], draws: NDArray[np.int64], tries: int) -> float:
    """Return the standard deviation of our mean minus a mean of ``tries`` trials on one model.

    Where several trials share a model, the spread between models is estimated apart (analysis of variance); where each
    has its own, it is part of the spread of trials; with one model for all it is not known, and counted as none.
    """
    if len(values) < 2:
        return float("nan")
    models, codes = np.unique(draws, return_inverse=True)
    if not 1 < len(models) < len(values):
        return float(values.std(ddof=1) * np.sqrt(1 / len(values) + 1 / tries))
    sizes = np.bincount(codes)
    means = np.bincount(codes, weights=values) / sizes
    within = float(((values - means[codes]) ** 2).sum()) / (len(values) - len(models))
    between = max(0.0, float(means.var(ddof=1)) - within * float((1 / sizes).mean()))
    return float(np.sqrt(between * (1 / len(models) + 1) + within * (1 / len(values) + 1 / tries)))


def tabulate(out: Path, references: References, *, whole: bool = True) -> tuple[pd.DataFrame, list[Path]]:
    """Compare the rows of the last run in a directory, and write the table there.

    Returns:
        The table, and the files it was written to.

    Raises:
        UserError: There is no run, or the files cannot be written.
    """
    rows = load_rows(out)
    table = compare(rows[rows["job_id"].isin(planned_jobs(out))], references, whole=whole)
    return table, write_table(table, references, out)


@dataclass(frozen=True)
class Verdicts:
    """What became of a work's claims.

    Args:
        summary: See `leakbench.board.claims.summary`.
        table: See `leakbench.board.claims.verdicts`.
        paths: The files they were written to.
    """

    summary: pd.DataFrame
    table: pd.DataFrame
    paths: list[Path]


def judge(out: Path, references: References) -> Verdicts:
    """Test the claims on the rows of the last run and the last measures in a directory, and write the tables there.

    Raises:
        UserError: Nothing was measured, or the files cannot be written.
    """
    measured = load_measures(out)
    measured = measured[measured["job_id"].isin(planned_jobs(out / MEASURES_FOLDER))]
    rows = load_rows(out) if (out / PLAN_FILE).is_file() else pd.DataFrame()
    if len(rows):
        rows = rows[rows["job_id"].isin(planned_jobs(out))]
    table = verdicts(references.claims, measured, rows)
    short = summary(references.claims, table)
    both = {"claims": json.loads(to_json(short)), "comparisons": json.loads(to_json(table))}
    texts = {
        "csv": table.to_csv(index=False),
        "json": json.dumps(both, indent=2) + "\n",
        "md": claims_markdown(short, table, references),
    }
    return Verdicts(short, table, _write(texts, out, "claims"))


def write_table(table: pd.DataFrame, references: References, out: Path) -> list[Path]:
    """Write the table beside the rows, as CSV, JSON and Markdown.

    Returns:
        The files.

    Raises:
        UserError: They cannot be written.
    """
    texts = {"csv": table.to_csv(index=False), "json": to_json(table), "md": to_markdown(table, references)}
    return _write(texts, out, "reproduction")


def _write(texts: Mapping[str, str], out: Path, stem: str) -> list[Path]:
    paths = []
    try:
        for suffix, text in texts.items():
            paths.append(out / f"{stem}.{suffix}")
            paths[-1].write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: the table cannot be written ({error.strerror}); use another --out") from None
    return paths

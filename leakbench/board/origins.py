"""What rows were made of: by what command, on what hardware, of what data, how long it took. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from leakbench.compact import FOLDERS, commands_of
from leakbench.errors import UserError
from leakbench.schema import FAILURES
from leakbench.store import COMPACTED, job_files, result_folders

_COLUMNS = (
    *("suite", "benchmark_version", "season", "job_id", "status", "utc", "wall_seconds", "client_seconds"),
    *("host_kind", "device", "threads", "isolation", "torch", "git_sha", "git_dirty"),
    *("dataset", "dataset_fingerprint"),
)
_SETTINGS = ("benchmark_version", "season", "host_kind", "device", "threads", "isolation", "torch")


def origins(results: Sequence[Path]) -> pd.DataFrame:
    """Return a line for every run and kind of rows.

    Args:
        results: Folders of runs, or folders of such folders.

    Returns:
        ``run``, ``rows_of`` (attacks, measures, utility), ``suites``, ``jobs``, ``rows``, ``failed`` (rows),
        ``computing_minutes`` (clients and attacks, or the measure or training, added up over workers),
        ``elapsed_minutes`` (from the first job to the last one), ``from`` and ``to`` (days, UTC), every value of
        the settings ``benchmark_version`` to ``torch``, ``commits``, ``datasets`` with the first digits of their
        fingerprints, and ``commands``.

    Raises:
        UserError: There are no rows, or they are of another schema version.
    """
    lines = [
        _line(folder, kind, part)
        for folder in result_folders(results)
        for kind, part in FOLDERS.items()
        if next(job_files(folder / part), None) is not None
    ]
    if not lines:
        raise UserError(f"no rows under {', '.join(map(str, results))}; make some with: leakbench run quick")
    return pd.DataFrame(lines)


def _line(folder: Path, kind: str, part: str) -> dict[str, Any]:
    paths = dict.fromkeys(job.path for job in job_files(folder / part))
    rows = pd.concat([_read(path) for path in paths], ignore_index=True)
    if kind == "attacks":  # a row has its part of the job's time
        seconds = rows[["wall_seconds", "client_seconds"]].sum().sum()
    else:
        seconds = rows.groupby("job_id")["wall_seconds"].first().sum()
    data = rows[["dataset", "dataset_fingerprint"]].dropna().drop_duplicates().sort_values("dataset")
    commits = rows["git_sha"].str[:10] + rows["git_dirty"].map({True: " with changes"}).fillna("")
    return {
        "run": folder.name,
        "rows_of": kind,
        "suites": _values(rows["suite"]),
        "jobs": rows["job_id"].nunique(),
        "rows": len(rows),
        "failed": int(rows["status"].isin(FAILURES).sum()),
        "computing_minutes": seconds / 60,
        "elapsed_minutes": (rows["utc"].max() - rows["utc"].min()).total_seconds() / 60,
        "from": str(rows["utc"].min().date()),
        "to": str(rows["utc"].max().date()),
        **{name: _values(rows[name]) for name in _SETTINGS},
        "commits": _values(commits),
        "datasets": "; ".join(f"{name} {print_[:10]}" for name, print_ in data.itertuples(index=False)),
        "commands": "; ".join(commands_of(folder / part / COMPACTED)),
    }


def _read(path: Path) -> pd.DataFrame:
    there = set(pq.read_schema(path).names)
    rows: pd.DataFrame = pq.read_table(path, columns=[name for name in _COLUMNS if name in there]).to_pandas()
    return rows


def _values(column: pd.Series[Any]) -> str:
    return "; ".join(sorted(map(str, column.dropna().unique())))


def markdown(lines: pd.DataFrame) -> str:
    """Return the lines as Markdown: a table of what was run, and below it what all of it was run with."""
    text = [
        "| run | rows of | jobs | rows | failed rows | minutes computing | minutes first to last job | made with |",
        "| --- | --- | --: | --: | --: | --: | --: | --- |",
    ]
    for line in lines.to_dict("records"):
        commands = ", ".join(f"`{command}`" for command in line["commands"].split("; ") if command)
        text.append(
            f"| {line['run']} | {line['rows_of']} | {line['jobs']:,} | {line['rows']:,} | {line['failed']:,} "
            f"| {line['computing_minutes']:.1f} | {line['elapsed_minutes']:.1f} | {commands} |"
        )
    text.append("")
    for name in (*_SETTINGS, "commits", "datasets"):
        values = sorted({value for cell in lines[name] for value in cell.split("; ") if value})
        text.append(f"- {name.replace('_', ' ')}: {'; '.join(values)}")
    return "\n".join(text)

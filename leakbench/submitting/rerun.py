"""`leakbench reproduce ROW_ID`: one row's job, run again, and the difference. No torch at import.

A row is named by its job id and, after a colon, its trial: ``3fa9c2...:17``; the first eight digits are enough where
they are of one job only. The whole job is run, since a trial's numbers are those of its block.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from leakbench.entries import EntrySpec, resolve_all
from leakbench.errors import UserError
from leakbench.keys import DEVELOPMENT, Season
from leakbench.measures.catalogue import resolve_measure
from leakbench.metrics import METRICS
from leakbench.runner.plan import Job
from leakbench.schema import BENCHMARK_VERSION, SCHEMA_VERSION
from leakbench.sources import Kind, sources
from leakbench.store import any_job_files, read_jobs, stores
from leakbench.submitting.identity import Row, task_of

ROW_ID = re.compile(r"([0-9a-f]{8,64})(?::(\d{1,9}))?")
RTOL, ATOL = 1e-4, 1e-6
"""Tolerance where hardware, threads, torch or leakbench's code differ: that of `tests/unit/test_laws.py`."""
SAME_MACHINE = ("host_kind", "device", "threads", "torch", "code_sha256")
"""Columns that have to agree for rows to be equal bit by bit."""

_METRICS = tuple(name for s in METRICS.values() for name in (s.name, s.reference))
_COMPARED = (*_METRICS, "inference_truth", "inference_score", "distinct_labels", "max_label_count")
_MEASURED = ("value", "low", "high")


@dataclass(frozen=True)
class Line:
    """One number, then and now.

    Args:
        trial: Trial; None: of the whole block.
        metric: Its name.
        then: In the row.
        now: In the rerun.
        tolerance: Greatest difference that is none.
        agrees: Whether they agree.
    """

    trial: int | None
    metric: str
    then: Any
    now: Any
    tolerance: float
    agrees: bool


@dataclass(frozen=True)
class Rerun:
    """What came of running a job again.

    Args:
        row_id: What was asked for.
        label: The job.
        differs: Columns of `SAME_MACHINE` that differ: (name, then, now).
        lines: Every number.
    """

    row_id: str
    label: str
    differs: list[tuple[str, str, str]]
    lines: list[Line]

    @property
    def agrees(self) -> bool:
        """Whether every number does."""
        return all(line.agrees for line in self.lines)

    def content(self) -> dict[str, Any]:
        """Return it as a JSON-able mapping."""
        return {
            "row": self.row_id,
            "job": self.label,
            "agrees": self.agrees,
            "differs": [dict(zip(("column", "then", "now"), item, strict=True)) for item in self.differs],
            "numbers": [vars(line) for line in self.lines],
        }


def is_row_id(text: str) -> bool:
    """Whether a word names a row rather than a paper."""
    return re.fullmatch(r"[0-9a-f]{8,64}(:.*)?", text) is not None


def find_job(row_id: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of the job that a row id names.

    Raises:
        UserError: There is none, or several.
    """
    match = ROW_ID.fullmatch(row_id)
    if match is None:
        raise UserError(f"row {row_id!r}: expected JOB or JOB:TRIAL, e.g. 3fa9c2d1:17; see: leakbench rows runs/quick")
    places = [store for folder in folders for store in stores(folder)]
    found = {job.job_id: job for store in places for job in any_job_files(store) if job.job_id.startswith(match[1])}
    if not found:
        listed = ", ".join(map(str, folders)) or "runs, results"
        raise UserError(f"row {row_id}: no such job under {listed}; name the folder: --rows DIR")
    if len(found) > 1:
        raise UserError(
            f"row {row_id}: expected one job, got {len(found)}; type more of: {', '.join(sorted(found)[:3])}"
        )
    (wanted,) = found.values()
    if wanted.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"row {row_id}: of schema version {wanted.schema_version}, this leakbench has {SCHEMA_VERSION}; check out "
            "the version that made it"
        )
    ((_, table),) = read_jobs([wanted])
    rows: list[dict[str, Any]] = table.to_pylist()
    if match[2] is not None and int(match[2]) not in {row.get("trial") for row in rows}:
        first, last = rows[0]["block_start"], rows[0]["block_stop"] - 1
        raise UserError(f"row {row_id}: the job holds the trials {first} to {last}")
    return rows


def job_of(row: Row, *, entries: Sequence[str] = (), season: Season = DEVELOPMENT) -> Job:
    """Rebuild the job of a row.

    Args:
        row: The row, of an attack or a measure.
        entries: ``FILE:CLASS`` of entries that are not installed.
        season: Season of the row.

    Raises:
        UserError: The row contradicts itself, or its entries, code or season are not at hand.
    """
    try:
        task = task_of(row)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"row of job {row['job_id'][:12]}: {error}; see: leakbench verify") from None
    if season.commitment != row["season_commitment"]:
        raise UserError(
            f"row of season {row['season']!r}: expected its key, got that of {season.name!r}; "
            f"type --season-key {row['season']}.key (a season's key is published when it closes)"
        )
    measuring = "measure" in row
    chain = [] if row["defense"] == "none" else row["defense"].split("+")
    kinds: list[tuple[Kind, str]] = [("defense", name) for name in chain]
    for kind, name in kinds if measuring else [("attack", row["attack"]), *kinds]:
        if name not in sources(kind) and not any(_stem(entry) == name for entry in entries):
            raise UserError(
                f"row of job {row['job_id'][:12]}: {kind} {name!r} is not installed; it was run from a file, name "
                f"that: --entry path/to/{name}.py"
            )
    params = json.loads(row["defense_params"])
    texts = [_expression(n, p, entries) for n, p in zip(chain, [params] if len(chain) == 1 else params, strict=True)]
    defense_text = "+".join(texts) or "none"
    if measuring:
        attack = resolve_measure(_expression(row["measure"], json.loads(row["measure_params"]), ()))
        defense = resolve_all([("defense", defense_text)])["defense", defense_text]
    else:
        attack_text = _expression(row["attack"], json.loads(row["attack_params"]), entries)
        known = resolve_all([("attack", attack_text), ("defense", defense_text)])
        (attack,), defense = known["attack", attack_text], known["defense", defense_text]
    budgets = [(row.get("budget_wall_seconds"), row.get("budget_model_evaluations"))]
    if measuring:
        from leakbench.submitting.identity import suite_budgets

        budgets = suite_budgets()
    jobs = [
        Job(
            suite=row["suite"],
            task=task,
            attack=attack,
            defense=defense,
            start=row["block_start"],
            stop=row["block_stop"],
            model_draws=row["model_draws"],
            threads=row["threads"],
            wall_seconds=seconds,
            model_evaluations=evaluations,
            season=season,
        )
        for seconds, evaluations in budgets
    ]
    for job in jobs:
        if job.id == row["job_id"]:
            return job
    raise UserError(f"job {row['job_id'][:12]} cannot be run again here: {_why(row, attack, defense, measuring)}")


def _stem(entry: str) -> str:
    return Path(entry.partition(".py")[0]).name


def _expression(name: str, params: Mapping[str, Any], entries: Sequence[str]) -> str:
    """Return the expression of an entry, by file where one of ``entries`` has its name."""
    ref = next((entry for entry in entries if _stem(entry) == name), name)
    return f"{ref}({', '.join(f'{key}={value!r}' for key, value in params.items())})"


def _why(row: Row, attack: EntrySpec, defense: Sequence[EntrySpec], measuring: bool) -> str:
    """Return the likeliest reason why a job has another id than its row."""
    if row["benchmark_version"] != BENCHMARK_VERSION or row["schema_version"] != SCHEMA_VERSION:
        then = f"benchmark {row['benchmark_version']}, schema {row['schema_version']}"
        return f"it is of {then}, this leakbench has {BENCHMARK_VERSION} and {SCHEMA_VERSION}; check out that version"
    if not measuring and row["attack_source_sha256"] != attack.description.source_sha256:
        return f"the code of attack {row['attack']} has changed since; check out {row['git_sha'] or 'its version'}"
    hashes = "+".join(part.description.source_sha256 or "" for part in defense)
    if defense and row["defense_source_sha256"] != hashes:
        return f"the code of defense {row['defense']} has changed since; check out {row['git_sha'] or 'its version'}"
    return "its columns do not lead to its id; an entry it uses has changed, or see: leakbench verify"


def rerun(
    row_id: str,
    folders: Sequence[Path],
    *,
    entries: Sequence[str] = (),
    season: Season = DEVELOPMENT,
    isolation: str = "auto",
    device: str = "cpu",
) -> Rerun:
    """Run the job of a row again and compare.

    Args:
        row_id: Job id or its first digits, with ``:TRIAL`` to compare one trial only.
        folders: Where to look for the row.
        entries: ``FILE:CLASS`` of entries that are not installed.
        season: Season of the row.
        isolation: As of `leakbench run`.
        device: Where to compute.

    Raises:
        UserError: There is no such row, or it cannot be run again here.
    """
    then = find_job(row_id, folders)
    if "attack" not in then[0] and "measure" not in then[0]:
        raise UserError(
            f"row {row_id} is of a training of `leakbench utility`; run that command again in another --out"
        )
    job = job_of(then[0], entries=entries, season=season)
    from leakbench.runner.execute import Runner

    kind = Runner
    if "measure" in then[0]:
        from leakbench.runner.measure import MeasureRunner

        kind = MeasureRunner
    files = sorted({f for e in (job.attack, *job.defense) if e.source is not None for f in e.source.files})
    with tempfile.TemporaryDirectory() as folder:
        with kind(Path(folder), season=season, isolation=isolation, device=device, files=files) as runner:
            runner.preflight([job])
            outcome = runner.run(job)
        now: list[dict[str, Any]] = pq.read_table(outcome.path).to_pylist()
    _, _, trial = row_id.partition(":")
    return compare(row_id, job.label, then, now, None if not trial else int(trial))


def compare(row_id: str, label: str, then: Sequence[Row], now: Sequence[Row], trial: int | None = None) -> Rerun:
    """Compare the rows of a job with those of its rerun.

    Args:
        row_id: What was asked for.
        label: The job.
        then: Its rows.
        now: Those of the rerun.
        trial: Compare this trial only.
    """
    differs = [(name, str(then[0][name]), str(now[0][name])) for name in SAME_MACHINE if then[0][name] != now[0][name]]
    exact = not differs
    numbers = _MEASURED if "measure" in then[0] else _COMPARED
    rerun = {_key(row): row for row in now}
    lines: list[Line] = []
    for row in then:
        if trial is not None and row["trial"] != trial:
            continue
        again = rerun.get(_key(row), {})
        lines += _lines(row, again, numbers, exact=exact)
    return Rerun(row_id, label, differs, lines)


def _key(row: Row) -> tuple[Any, ...]:
    return row["trial"], row.get("quantity"), row.get("layer")


def _lines(row: Row, again: Row, numbers: Sequence[str], *, exact: bool) -> Iterator[Line]:
    where = f"{row['quantity']} of {row['layer']}: " if "quantity" in row else ""
    status = again.get("status", "no row")
    yield Line(row["trial"], f"{where}status", row["status"], status, 0.0, row["status"] == status)
    for name in numbers:
        old, new = row[name], again.get(name)
        if old is None and new is None:
            continue
        tolerance = 0.0 if exact or not isinstance(old, float) else ATOL + RTOL * abs(old)
        agrees = old == new or (
            isinstance(old, float)
            and isinstance(new, float)
            and (abs(old - new) <= tolerance or (math.isnan(old) and math.isnan(new)))
        )
        yield Line(row["trial"], where + name, old, new, tolerance, agrees)


def text(found: Rerun, most: int = 40) -> list[str]:
    """Return the comparison as lines; means over trials where several were compared."""
    lines = [found.label]
    if found.differs:
        lines += [f"  {name}: then {then}, now {now}" for name, then, now in found.differs]
        lines.append(f"  so numbers may differ by {ATOL:g} + {RTOL:g} of their size; an attack of many steps by more")
    else:
        lines.append("  same kind of machine, threads, torch and code: numbers have to be equal, bit by bit")
    off = [line for line in found.lines if not line.agrees]
    shown = found.lines if len(found.lines) <= most else off[:most]
    for line in shown:
        mark = "agrees " if line.agrees else "DIFFERS"
        trial = "" if line.trial is None else f"trial {line.trial} "
        number = isinstance(line.then, float) and isinstance(line.now, float)
        gap = f", difference {line.now - line.then:+.3g}, tolerance {line.tolerance:.3g}" if number else ""
        lines.append(f"  {mark} {trial}{line.metric}: then {_short(line.then)}, now {_short(line.now)}{gap}")
    count = len(found.lines)
    lines.append(f"{count - len(off)} of {count} values agree" + (f", {len(off)} differ" if off else ""))
    return lines


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)

"""From a row back to its task and job, so that hashes can be computed again. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any, Literal

from pydantic import ValidationError

from leakbench.errors import UserError
from leakbench.grids import Budget
from leakbench.parts import content_hash
from leakbench.schema import DEFENDED, THREAT_COLUMNS, task_columns
from leakbench.sources import Kind, find_source, sources
from leakbench.suites import read_suite, suite_paths
from leakbench.tasks import Architecture, AttributeSpec, BatchSpec, Protocol, Task, ThreatModel

Row = Mapping[str, Any]

TASK_COLUMNS = tuple(task_columns(Task(dataset="digits", architecture=Architecture(name="mlp"))))
"""The columns that a task alone decides."""


def architecture_of(row: Row) -> Architecture:
    """Rebuild the architecture of a row from its columns."""
    params = json.loads(row["architecture_params"])
    return Architecture(name=row["architecture"], init=row["architecture_init"], params=params)


def task_of(row: Row) -> Task:
    """Rebuild the task of a row from its columns.

    Raises:
        ValueError: They describe none, or another than the row's hash.
    """
    threat = {n: row[THREAT_COLUMNS.get(n, f"knows_{n}")] for n in ThreatModel.model_fields}
    sizes = row["batch_sizes"]
    try:
        task = Task(
            dataset=row["dataset"],
            normalise=row["normalise"],
            architecture=architecture_of(row),
            stage=row["stage"],
            batch=BatchSpec(
                size=row["batch_size"],
                sampler=row["sampler"],
                alpha=row["sampler_alpha"],
                classes=row["sampler_classes"],
                sizes=None if sizes is None else tuple(json.loads(sizes)),
            ),
            protocol=Protocol(**{name: row[name] for name in Protocol.model_fields}),
            threat_model=ThreatModel(**threat),
            target=row["target"],
            attribute=None
            if row["attribute"] is None
            else AttributeSpec(name=row["attribute"], value=row["attribute_value"], mix=row["attribute_mix"]),
            version=row["task_version"],
        )
    except ValidationError as error:
        detail = error.errors()[0]
        raise ValueError(
            f"its columns describe no task: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        ) from None
    if task.hash != row["task_hash"]:
        raise ValueError(
            f"task_hash is {row['task_hash'][:12]}..., but the task in its columns has {task.hash[:12]}...: one of "
            "them was changed"
        )
    return task


def wrong_task_columns(row: Row, task: Task) -> list[str]:
    """Return the columns of a row that its task would fill otherwise."""
    expected = task_columns(task)
    if row.get("model_shown") == DEFENDED:
        expected["lane"] = None
    return [name for name, value in expected.items() if name in row and row[name] != value]


def entry_parts(row: Row, kind: str) -> Iterator[list[dict[str, Any]]]:
    """Yield what the parts of an entry or chain may be: name, version, params, source hash.

    A row holds the greatest version of a chain only, so each part may have any version up to it.
    """
    names = [] if row[kind] == "none" else row[kind].split("+")
    params = json.loads(row[f"{kind}_params"])
    given = [params] if len(names) == 1 else params or []
    hashes = (row.get(f"{kind}_source_sha256") or "").split("+")
    if len(given) != len(names):
        return
    shas: Sequence[str | None] = hashes if len(hashes) == len(names) and hashes != [""] else [None] * len(names)
    top = row[f"{kind}_version"]
    for versions in product(range(1, top + 1), repeat=len(names)):
        if not names or max(versions) == top:
            parts = zip(names, versions, given, shas, strict=True)
            yield [{"name": n, "version": v, "params": p, "source_sha256": s} for n, v, p, s in parts]


def _identified(part: Mapping[str, Any], kind: Kind, classes: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a part as job ids cover it: the class of an entry by path, and the code of its label attack."""
    labels = str(part["params"].get("labels")).partition("(")[0].strip()
    content = dict(part)
    if kind == "attack" and labels in sources("attack"):
        content["labels_sha256"] = find_source("attack", labels).sha256
    yield content
    if part["source_sha256"] in classes:
        yield content | {"class_name": classes[part["source_sha256"]]}


def chains(row: Row, classes: Mapping[str, str]) -> list[list[dict[str, Any]]]:
    """Return what a job id may cover of the defense of a row."""
    return [
        list(chain)
        for parts in entry_parts(row, "defense")
        for chain in product(*(list(_identified(part, "defense", classes)) for part in parts))
    ]


def explains_job_id(row: Row, classes: Mapping[str, str], kept: Iterable[tuple[str, ...]] = ((),)) -> bool:
    """Whether the job id is the hash of what the row says of its job.

    Args:
        row: The row, of an attack or of a measure.
        classes: Class names of entries that are given by path, by the hash of their source.
        kept: Of stage ``in_training`` what the hashes of the files of its trials may be.
    """
    measuring = "measure" in row
    first = "measure" if measuring else "attack"
    fixed = {
        "benchmark_version": row["benchmark_version"],
        "schema_version": row["schema_version"],
        "season": row["season_commitment"],
        "task": row["task_hash"],
        "block": [row["block_start"], row["block_stop"]],
        "model_draws": row["model_draws"],
        "threads": row["threads"],
    }
    budgets = suite_budgets() if measuring else [(row["budget_wall_seconds"], row["budget_model_evaluations"])]
    attacks = [c for parts in entry_parts(row, first) for part in parts for c in _identified(part, "attack", classes)]
    return any(
        content_hash(
            {**fixed, "attack": attack, "defense": chain, "wall_seconds": seconds, "model_evaluations": evaluations}
            | ({"kept": list(files)} if files else {})
        )
        == row["job_id"]
        for attack, chain, (seconds, evaluations), files in product(attacks, chains(row, classes), budgets, kept)
    )


@cache
def suite_budgets() -> list[tuple[float | None, int | None]]:
    """Return the budgets of the suites that come with leakbench; rows of measures do not name theirs."""
    found = [Budget(), *(read_suite(path).budget for path in suite_paths().values())]
    return list(dict.fromkeys((budget.wall_seconds, budget.model_evaluations) for budget in found))


Doubt = Literal["forged", "file", "labels", "kept", "budget"]


def doubt(row: Row) -> Doubt:
    """Return why a job id may differ from what the row says: ``forged`` where there is no innocent reason."""
    if "measure" in row:
        return "budget"
    if "attack" in row:
        params = json.loads(row["attack_params"])
        labels = params.get("labels") if isinstance(params, dict) else None
        if str(labels).partition("(")[0].strip() in sources("attack"):
            return "labels"
    for kind in ("attack", "defense") if "attack" in row else ("defense",):
        names = [] if row[kind] == "none" else row[kind].split("+")
        hashes = (row[f"{kind}_source_sha256"] or "").split("+")
        known = sources(kind)
        for name, sha in zip(names, hashes, strict=False):
            if name not in known or known.get(name).sha256 != sha:
                return "file"
    return "forged"


def class_names(refs: Sequence[str]) -> dict[str, str]:
    """Return the class of every entry file given, by the hash of its source.

    Raises:
        UserError: A file cannot be imported, which is done in a child.
    """
    from leakbench.submitting.check import describe_file

    known = {}
    for ref in refs:
        source, told = describe_file(ref)
        if isinstance(told, UserError):
            raise told
        known[source.sha256] = told.class_name
    return known

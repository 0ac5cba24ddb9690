"""What `leakbench list` and `leakbench show` say about each kind of thing, as JSON-able mappings. No torch here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, get_args

from leakbench import autoleak
from leakbench.entries import chain_label, try_describe
from leakbench.errors import UserError, unknown
from leakbench.sources import Kind, find_source, sources

if TYPE_CHECKING:
    from leakbench.measures.catalogue import MeasureSpec

Listed = Literal["attacks", "defenses", "datasets", "architectures", "suites", "metrics", "measures"]
Item = dict[str, Any]


def list_items(kind: Listed) -> list[Item]:
    """Return one mapping per thing of ``kind``, each with ``name`` and ``summary``; ``error`` for a broken entry."""
    match kind:
        case "attacks" | "defenses":
            entries = _entries("attack" if kind == "attacks" else "defense", None)
            return [*entries, autoleak.item()] if kind == "attacks" else entries
        case "datasets":
            from leakbench.data.catalogue import DATASETS

            return [_dataset(DATASETS.get(name)) for name in DATASETS]
        case "architectures":
            from leakbench.models.catalogue import ARCHITECTURES

            specs = [dataclasses.asdict(ARCHITECTURES.get(name)) for name in ARCHITECTURES]
            return [{"name": spec["name"], "summary": spec.pop("description"), **spec} for spec in specs]
        case "suites":
            from leakbench.suites import read_suite, suite_paths

            suites = [(name, read_suite(path)) for name, path in suite_paths().items()]
            return [{"name": name, "summary": suite.description, "version": suite.version} for name, suite in suites]
        case "metrics":
            from leakbench.metrics import METRICS

            metrics = [dataclasses.asdict(spec) for spec in METRICS.values()]
            return [{"name": spec["name"], "summary": spec.pop("description"), **spec} for spec in metrics]
        case "measures":
            from leakbench.measures.catalogue import MEASURES

            return [_measure(MEASURES.get(name)) for name in MEASURES]


def show_items(name: str) -> list[tuple[str, Item]]:
    """Return (kind, mapping) of everything called ``name``; a suite's mapping holds its tasks and cells.

    Raises:
        UserError: Nothing is called so, or the suite or entry file is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return [("suite", suite_item(name))]
    if ".py" in name:
        return [_entry_file(name)]
    found: list[tuple[str, Item]] = []
    known: list[str] = []
    for kind in get_args(Listed):
        items = {item["name"]: item for item in _names(kind)}
        known += items
        if name in items:
            full = _full(kind, name, items[name])
            found.append((kind[:-1], full))
    if not found:
        raise unknown("name", name, known)
    return found


def suite_item(name: str) -> Item:
    """Return a suite with its tasks, and for each task its lane, attacks, defenses and trials.

    Raises:
        UserError: There is no such suite or it is wrong.
    """
    from leakbench.suites import load_suite

    suite = load_suite(name)
    cells = suite.expand()
    tasks: dict[str, Item] = {}
    for cell in cells:
        task = tasks.setdefault(
            cell.task.hash,
            {"task": cell.task.id, "hash": cell.task.hash, "lane": cell.task.lane, "cells": []},
        )
        task["cells"].append(
            {
                "attack": cell.attack.label,
                "defense": chain_label(cell.defense),
                "trials": cell.trials,
                "model_draws": cell.model_draws,
            }
        )
    return {
        "name": suite.name,
        "version": suite.version,
        "summary": suite.description,
        "trials_per_job": suite.trials_per_job,
        "jobs": sum(-(-cell.trials // cell.trials_per_job) for cell in cells),
        "tasks": list(tasks.values()),
    }


def _names(kind: Listed) -> list[Item]:
    """Return the items of ``kind``; entries by name only, so that one lookup describes no other entry."""
    if kind in ("attacks", "defenses"):
        names = [{"name": name} for name in sources("attack" if kind == "attacks" else "defense")]
        return [*names, autoleak.item()] if kind == "attacks" else names
    return list_items(kind)


def _full(kind: Listed, name: str, item: Item) -> Item:
    if kind in ("attacks", "defenses") and name != autoleak.NAME:
        (item,) = _entries("attack" if kind == "attacks" else "defense", name)
        if "error" in item:
            raise UserError(item["error"])
        return item
    return suite_item(name) if kind == "suites" else item


def _entries(kind: Kind, name: str | None) -> list[Item]:
    registry = sources(kind)
    chosen = [registry.get(key) for key in registry if name in (None, key)]
    items: list[Item] = []
    for source, answer in zip(chosen, try_describe(chosen), strict=True):
        if isinstance(answer, UserError):
            items.append({"name": source.name, "summary": "cannot be imported", "error": str(answer)})
        else:
            items.append(answer.content())
    return items


def _entry_file(ref: str) -> tuple[str, Item]:
    """Describe a file as an attack, else as a defense."""
    answers: list[UserError] = []
    for kind in get_args(Kind):
        (answer,) = try_describe([find_source(kind, ref)])
        if not isinstance(answer, UserError):
            return kind, answer.content()
        answers.append(answer)
    raise answers[0]


def _measure(spec: MeasureSpec) -> Item:
    """Return a measure with the kind and unit of every quantity in its summary."""
    told = ", ".join(f"{q.name} ({q.kind}, {q.unit})" for q in spec.quantities)
    content: Item = dataclasses.asdict(spec)
    return {**content, "needs": sorted(spec.needs), "summary": f"{spec.summary} Gives {told}."}


def _dataset(spec: Any) -> Item:
    content: Item = spec.content()
    shape = "x".join(map(str, spec.input.shape))
    source = spec.hub_id or "embedded"
    note = f"; {spec.note}" if spec.note else ""
    return {"name": spec.name, "summary": f"{spec.classes} classes, {shape}, {source}{note}", **content}

"""Suites: YAML files that span grids of tasks, attacks and defenses. No torch here.

Every mistake in a file is one line: the file, the key, what was expected, what was got, and the nearest right word.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from leakbench.autoleak import NAME as AUTOLEAK
from leakbench.autoleak import is_meant, spelled_out
from leakbench.data.catalogue import DATASETS, SOURCE_CLASS
from leakbench.entries import resolve_all
from leakbench.errors import UserError, did_you_mean, unknown
from leakbench.grids import Budget, Cell, Grid, Suite
from leakbench.lock import tasks_folder
from leakbench.measures.catalogue import resolve_measure
from leakbench.models.catalogue import architecture_spec
from leakbench.parts import Part
from leakbench.sources import Kind
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel
from leakbench.utility.spec import UtilityGrid

__all__ = ["Cell", "Grid", "Suite", "load_suite", "load_task", "read_suite", "suite_paths"]


def suite_paths() -> dict[str, Path]:
    """Return the files of the suites that come with leakbench, by name."""
    return {path.stem: path for path in sorted(tasks_folder().glob("*.yaml"))}


def load_suite(name: str) -> Suite:
    """Load a suite by name, or from the path of a YAML file, and check every name in it.

    Raises:
        UserError: There is no such suite, the YAML is malformed, or a key, value or name is wrong.
    """
    path = _suite_path(name)
    suite = read_suite(path)
    _check_names(suite, path)
    return suite


def read_suite(path: Path) -> Suite:
    """Read a suite's file without looking up the names in it.

    Raises:
        UserError: The YAML is malformed, or a key or value is wrong.
    """
    raw = read_yaml(path)
    try:
        return Suite.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_error(error, raw)}") from None


def load_task(text: str) -> Task:
    """Load the task ``SUITE:TASK``, TASK being the task's id or the first digits of its hash.

    Raises:
        UserError: There is no such suite or task, or several tasks have that id.
    """
    name, _, wanted = text.rpartition(":")
    if not name or not wanted:
        raise UserError(
            f"task {text!r}: expected SUITE:TASK, e.g. quick:TASK; see the tasks with: leakbench show quick"
        )
    tasks = load_suite(name).tasks()
    by_hash = bool(re.fullmatch(r"[0-9a-f]{6,64}", wanted))
    found = [t for key, t in tasks.items() if t.id == wanted or (by_hash and key.startswith(wanted))]
    if not found:
        raise unknown(f"task of suite {name!r}", wanted, {task.id for task in tasks.values()})
    if len(found) > 1:
        choices = ", ".join(f"{name}:{task.hash[:12]}" for task in found)
        raise UserError(f"task {text!r}: expected one task, got {len(found)} of that id; use one of {choices}")
    return found[0]


def _suite_path(name: str) -> Path:
    if not name.endswith((".yaml", ".yml")):
        paths = suite_paths()
        if name not in paths:
            raise unknown("suite", name, paths)
        return paths[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"suite {name}: expected a YAML file, got no such file; see: leakbench list suites")
    return path


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads ``1e-3`` as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: The file cannot be read, is no well-formed YAML, gives a key twice or holds no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a YAML file in UTF-8 that can be read, got {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: expected well-formed YAML, got: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: expected well-formed YAML, got: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(raw).__name__}")
    return raw


# --- errors -----------------------------------------------------------------------------------------------------------

_MODELS: dict[str, type[Part]] = {
    "grids": Grid,
    "utility": UtilityGrid,
    "architecture": Architecture,
    "batch": BatchSpec,
    "protocol": Protocol,
    "threat_model": ThreatModel,
    "budget": Budget,
}


def _first_error(error: ValidationError, raw: Any) -> str:
    """Return the first mistake as ``key: expected ..., got ...``."""
    detail = error.errors()[0]
    parents = [key for key in detail["loc"][:-1] if key in _MODELS]
    model = _MODELS[str(parents[-1])] if parents else Suite
    where, name = _key_path(detail["loc"], raw), str(detail["loc"][-1]) if detail["loc"] else ""
    got, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = list(model.model_fields)
            return f"{where}: unknown key.{did_you_mean(name, known)} Known: {', '.join(known)}."
        case "missing":
            return f"{where}: expected this key, got none"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            return f"{where}: expected {context['expected']}, got {got!r}.{did_you_mean(str(got), choices)}"
        case "value_error":
            return f"{where}: {context['error']}"
        case kind:
            plain = detail["msg"].replace("Input should be", "expected").replace("a valid ", "a ")
            return f"{where}: {_EXPECTED.get(kind, plain)}, got {_short(got)}"


_EXPECTED = {
    "int_type": "expected an integer",
    "bool_type": "expected true or false",
    "model_type": "expected a mapping",
    "too_short": "expected at least one value",
    "string_pattern_mismatch": "expected letters, digits, '.', '_' and '-'",
    "invalid_key": "expected a name as key",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _key_path(loc: Sequence[str | int], raw: Any) -> str:
    """Return ``grids[0].batch.size`` without the indices of axes that were written as a single value."""
    path = ""
    for key in loc:
        if isinstance(key, int):
            if not isinstance(raw, list):
                continue
            path, raw = f"{path}[{key}]", raw[key] if key < len(raw) else None
        else:
            path, raw = (f"{path}.{key}" if path else key), raw.get(key) if isinstance(raw, dict) else None
    return path or "suite"


# --- names that only registries know ----------------------------------------------------------------------------------


def _check_names(suite: Suite, path: Path) -> None:
    common: dict[str, Callable[[Any], object]] = {
        "dataset": _check_datasets,
        "architecture": lambda grid: [architecture_spec(part.name) for part in grid.architecture],
        "defenses": lambda grid: resolve_all([("defense", text) for text in grid.defenses]),
    }
    checks: dict[str, Callable[[Any], object]] = {
        "dataset": common["dataset"],
        "architecture": common["architecture"],
        "batch": _check_classes,
        "attribute": _check_attributes,
        "attacks": _check_attacks,
        "measures": lambda grid: [resolve_measure(text) for text in grid.measures],
        "defenses": common["defenses"],
    }
    texts: list[tuple[Kind, str]] = [
        ("attack", text) for grid in suite.grids for text in grid.attacks if text.strip() != AUTOLEAK
    ]
    texts += [("defense", text) for grid in suite.grids for text in grid.defenses]
    texts += [("defense", text) for trainings in suite.utility for text in trainings.defenses]
    with contextlib.suppress(UserError):  # describes every entry in one child; the loop below says where a mistake is
        resolve_all(texts)
    parts: list[tuple[str, Grid | UtilityGrid, dict[str, Callable[[Any], object]]]] = [
        *((f"grids[{index}]", grid, checks) for index, grid in enumerate(suite.grids)),
        *((f"utility[{index}]", trainings, common) for index, trainings in enumerate(suite.utility)),
    ]
    for where, part, own in parts:
        for key, check in own.items():
            try:
                check(part)
            except UserError as error:
                raise UserError(f"{path}: {where}.{key}: {error}") from None


def _check_datasets(grid: Grid | UtilityGrid) -> None:
    for name in grid.dataset:
        if not name.endswith(".npz"):
            DATASETS.get(name)
        elif not Path(name).expanduser().is_file():
            raise UserError(f"expected an .npz file, got no file {name}; give the path of an existing one")


def _check_classes(grid: Grid) -> None:
    for name in grid.dataset:
        for batch in grid.batch if name in DATASETS else ():
            classes = DATASETS.get(name).classes
            if (batch.classes or 1) > classes:
                raise UserError(f"expected at most {classes} classes ({name}), got {batch.classes}; lower classes")
            if batch.sampler == "unique" and batch.size > classes:
                raise UserError(
                    f"expected at most {classes} examples of distinct classes ({name}), got size {batch.size}; "
                    f"use size: {classes} or another sampler"
                )


def _check_attributes(grid: Grid) -> None:
    for name in grid.dataset if grid.attribute else ():
        if name not in DATASETS:
            continue  # an .npz file, which has its labels only
        spec = DATASETS.get(name)
        own = len(spec.label_maps[spec.main_task]) if spec.main_task else spec.classes
        values = {SOURCE_CLASS: set(range(own)), **{each: set(way) for each, way in spec.label_maps.items()}}
        known = {*values, *spec.attribute_columns}
        for attribute in grid.attribute:
            if attribute.name not in known:
                raise unknown(f"attribute of dataset {name}", attribute.name, known)
            if attribute.value not in values.get(attribute.name, {attribute.value}):
                least, most = min(values[attribute.name]), max(values[attribute.name])
                raise UserError(
                    f"{attribute.name} of dataset {name}: expected a value in {least}..{most}, got {attribute.value}"
                )


def _check_attacks(grid: Grid) -> None:
    for target in grid.target if any(map(is_meant, grid.attacks)) else ():
        spelled_out((AUTOLEAK,), (target,))
    for (_, text), (attack,) in resolve_all([("attack", t) for t in grid.attacks if not is_meant(t)]).items():
        recovers = attack.description.recovers
        for target in grid.target:
            if target not in recovers:
                raise UserError(
                    f"{text!r} recovers {' and '.join(recovers)}, expected an attack that recovers {target}, "
                    "the grid's target; see: leakbench list attacks"
                )

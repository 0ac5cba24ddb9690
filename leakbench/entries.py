"""Attacks and defenses as data: what is known of an entry without running its code in this process. No torch here.

An expression (``topk(p=0.9)+gaussian_noise``) names entries with parameters; each name leads to a source found by path
arithmetic (`leakbench.sources`), each source to a description that a child process made, each pair to an `EntrySpec`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from leakbench.cache import cache_dir
from leakbench.errors import UserError, did_you_mean
from leakbench.parts import Part, content_hash
from leakbench.provenance import code_sha256
from leakbench.sources import EntrySource, Kind, find_source
from leakbench.sources import sources as installed

Value = int | float | str | bool | None
"""What a parameter of an entry may be."""

NO_DEFENSE = "none"
"""The expression of the empty chain of defenses."""


class Call(NamedTuple):
    """One part of an expression: a name or ``file.py:Class``, and keyword arguments."""

    ref: str
    params: dict[str, Value]


class Description(Part):
    """What an entry says of itself, made by importing it in a child process."""

    kind: Kind | Literal["measure"]
    """``attack``, ``defense`` or ``measure``."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Registered name."""
    class_name: str
    """Its class."""
    version: Annotated[int, Field(ge=1)]
    """Raised by every change that can move a number."""
    reference: str
    """Authors, year, arXiv id."""
    summary: str
    """First line of the docstring."""
    needs: tuple[str, ...] = ()
    """Attack: grants and facts of the task it cannot do without."""
    recovers: tuple[str, ...] = ()
    """Attack: targets it claims."""
    exact: bool = False
    """Attack: whether the inputs it returns are meant to be exact."""
    reads: tuple[str, ...] = ()
    """Attack: update tensors it uses."""
    prepares: bool = False
    """Attack: whether it brings its own ``prepare``."""
    plants: bool = False
    """Attack: whether it brings its own ``plant``."""
    inserts: str | None = None
    """Attack: module of `leakbench.models.imprint` that it has inserted in front of the net."""
    acts_on: tuple[str, ...] = ()
    """Defense: hooks of the client it changes."""
    strength: tuple[str, str] | None = None
    """Defense: the swept parameter and which way is stronger."""
    merges: Annotated[int, Field(ge=1)] = 1
    """Defense: how many private examples go into one that the client trains on."""
    neutral: dict[str, Value] | None = None
    """Defense: parameters with which it changes nothing."""
    draws: str = ""
    """Defense: what it draws at random."""
    likelihood: str | None = None
    """Defense: how an adversary takes it into account; see `leakbench.Defense.likelihood`."""
    adaptive: tuple[str, ...] = ()
    """Defense: attacks that know it and that it has to face before it is ranked."""
    params: dict[str, Value] = Field(default_factory=dict)
    """Constructor arguments with their defaults."""
    required: tuple[str, ...] = ()
    """Constructor arguments without a default."""
    doc: str = ""
    """Docstring."""
    source_sha256: str | None = None
    """Hash of the source; None where there is no file."""


@dataclass(frozen=True)
class EntrySpec:
    """An entry with every parameter fixed.

    Args:
        description: What the entry says of itself.
        params: All constructor arguments.
        source: Where its code is; None for an instance without a file.
    """

    description: Description
    params: Mapping[str, Value]
    source: EntrySource | None

    @property
    def name(self) -> str:
        """Registered name."""
        return self.description.name

    @property
    def label(self) -> str:
        """Short name with the swept parameter and those that differ from the default: ``topk(p=0.9)``."""
        defaults, strength = self.description.params, self.description.strength
        always = {strength[0]} if strength else set()
        shown = [k for k, v in self.params.items() if k in always or k not in defaults or defaults[k] != v]
        arguments = ", ".join(f"{k}={self.params[k]!r}" for k in shown)
        return f"{self.name}({arguments})" if arguments else self.name

    def id_content(self) -> dict[str, Any]:
        """Return what identifies the entry in a job's hash."""
        content = {
            "name": self.name,
            "version": self.description.version,
            "params": dict(self.params),
            "source_sha256": self.description.source_sha256,
        }
        if self.source is not None and self.source.module is None:
            content["class_name"] = self.description.class_name  # a file may hold several
        labels = str(self.params.get("labels")).partition("(")[0].strip()
        if labels in installed("attack"):
            # Another entry that runs first; its parameters are in the name, its code is not.
            content["labels_sha256"] = find_source("attack", labels).sha256
        return content

    def request(self) -> dict[str, Any]:
        """Return what a child needs to build the entry; JSON-able."""
        where = {"module": None, "path": None, "class_name": None} if self.source is None else self.source.request()
        return {**where, "kind": self.description.kind, "name": self.name, "params": dict(self.params)}


def chain_label(chain: Sequence[EntrySpec]) -> str:
    """Return the label of a chain of defenses; ``none`` for the empty one."""
    return "+".join(part.label for part in chain) or NO_DEFENSE


def parse_expression(text: str) -> tuple[Call, ...]:
    """Split ``a(x=1)+path/to/file.py:Class`` into its calls; ``none`` is the empty chain.

    Raises:
        UserError: It is not such an expression.
    """
    if text.strip() == NO_DEFENSE:
        return ()
    return tuple(_parse_call(part, text) for part in _split(text))


def resolve(kind: Kind, text: str) -> tuple[EntrySpec, ...]:
    """Return the entries that an expression names, with full parameters.

    Raises:
        UserError: See `resolve_all`.
    """
    return resolve_all([(kind, text)])[kind, text]


def resolve_all(expressions: Iterable[tuple[Kind, str]]) -> dict[tuple[Kind, str], tuple[EntrySpec, ...]]:
    """Resolve many expressions with two child processes at most: one describes entries, one tries their parameters.

    Raises:
        UserError: An expression is malformed, names an unknown entry or parameter, gives a value of another type than
            the default's or one that the entry refuses, chains attacks, or an entry's file fails to import.
    """
    calls = {(kind, text): parse_expression(text) for kind, text in dict.fromkeys(expressions)}
    for (kind, text), parts in calls.items():
        if kind == "attack" and len(parts) != 1:
            raise UserError(f"attack {text!r}: expected one attack, got {len(parts)}; see: leakbench list attacks")
    sources = {(kind, c.ref): find_source(kind, c.ref) for (kind, _), parts in calls.items() for c in parts}
    described = dict(zip(sources, describe(list(sources.values())), strict=True))

    def spec(kind: Kind, call: Call) -> EntrySpec:
        key = (kind, call.ref)
        return EntrySpec(described[key], merge_params(described[key], call.params), sources[key])

    specs = {(kind, text): tuple(spec(kind, call) for call in parts) for (kind, text), parts in calls.items()}
    _try_params([part for parts in specs.values() for part in parts])
    return specs


def _try_params(specs: Iterable[EntrySpec]) -> None:
    """Have a child build the entries whose parameters are not their defaults, once per source and parameters.

    Raises:
        UserError: An entry refuses its parameters.
    """
    unknown: dict[Path, EntrySpec] = {}
    for spec in specs:
        if spec.source is not None and dict(spec.params) != spec.description.params:
            path = _cache_path(spec.source, spec.params)
            if path not in _accepted and not path.is_file():
                unknown[path] = spec
    if not unknown:
        return
    from leakbench.runner.isolate import describe_entries

    requests = [spec.request() for spec in unknown.values()]
    for (path, spec), answer in zip(unknown.items(), describe_entries(requests, isolation="auto"), strict=True):
        if "ok" not in answer:
            raise UserError(f"{spec.description.kind} {spec.label}: {answer.get('error', 'no answer')}")
        _accepted.add(path)
        _write_json(path, "{}")


_accepted: set[Path] = set()


def merge_params(description: Description, given: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entry's parameters, defaults overridden by ``given``.

    Raises:
        UserError: An unknown or missing parameter, or a value of another type than the default.
    """
    who = f"{description.kind} {description.name!r}"
    known = [*description.required, *description.params]
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"{who} has no parameter {name!r}.{did_you_mean(name, known)} Known: {listed}.")
    for name in description.required:
        if name not in given:
            raise UserError(f"{who} needs the parameter {name!r}; write {description.name}({name}=...)")
    merged = {name: given[name] for name in description.required}
    for name, default in description.params.items():
        merged[name] = _like(default, given[name], f"{who}: {name}") if name in given else default
    return merged


def _like(default: Value, value: Value, where: str) -> Value:
    """Return ``value`` in the type of ``default``: ``std=1`` and ``std=1.0`` are one parameter and one hash."""
    if default is None:
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is type(default):
        return value
    expected = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}[type(default)]
    raise UserError(f"{where}: expected {expected} (default {default!r}), got {value!r}")


# --- descriptions -----------------------------------------------------------------------------------------------------


def describe(sources: Sequence[EntrySource]) -> list[Description]:
    """Return what the entries say of themselves, from the cache or from one child process.

    Raises:
        UserError: An entry's file fails to import, or does not hold an entry.
    """
    answers = try_describe(sources)
    for answer in answers:
        if isinstance(answer, UserError):
            raise answer
    return [answer for answer in answers if isinstance(answer, Description)]


def try_describe(sources: Sequence[EntrySource]) -> list[Description | UserError]:
    """Like `describe`, with the error in the place of an entry that cannot be described."""
    answers: dict[int, Description | UserError] = {}
    missing = []
    for index, source in enumerate(sources):
        cached = _read_cache(source)
        if cached is None:
            missing.append(index)
        else:
            answers[index] = cached
    if missing:
        from leakbench.runner.isolate import describe_entries  # the child server is costly and rarely needed

        requests = [{**sources[i].request(), "kind": sources[i].kind, "name": sources[i].name} for i in missing]
        for index, answer in zip(missing, describe_entries(requests, isolation="auto"), strict=True):
            answers[index] = _checked(sources[index], answer)
    return [answers[index] for index in range(len(sources))]


def _checked(source: EntrySource, answer: Mapping[str, Any]) -> Description | UserError:
    where = f"{source.kind} file {source.path}"
    if "ok" not in answer:
        return UserError(f"{where}: {answer.get('error', 'no answer')}")
    fields = {**answer["ok"], "kind": source.kind, "source_sha256": source.sha256}
    try:
        description = Description.model_validate_json(json.dumps(fields))
    except (ValidationError, TypeError, ValueError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        return UserError(f"{where}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}")
    if source.module is not None and description.name != source.name:
        return UserError(f"{where}: registers the name {description.name!r}, expected {source.name!r}; rename one")
    _write_cache(source, description)
    return description


@cache
def _describer() -> list[str]:
    """Return what decides how an entry is described, besides its source: leakbench's version and code."""
    return [importlib.metadata.version("leakbench"), code_sha256()]


def _cache_path(source: EntrySource, params: Mapping[str, Value] | None = None) -> Path:
    key: list[str | None] = [*_describer(), source.kind, source.module, source.class_name, source.sha256]
    if params is not None:
        key.append(json.dumps(dict(params), sort_keys=True))
    return cache_dir() / "describe" / f"{content_hash(key)}.json"


_described: dict[Path, Description] = {}


def _read_cache(source: EntrySource) -> Description | None:
    path = _cache_path(source)
    if path not in _described:
        try:
            description = Description.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
        if description.source_sha256 != source.sha256:
            return None
        _described[path] = description
    return _described[path]


def _write_cache(source: EntrySource, description: Description) -> None:
    path = _cache_path(source)
    _described[path] = description
    _write_json(path, description.model_dump_json())


def _write_json(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # without a writable cache the next command asks the child again
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)


# --- expressions ------------------------------------------------------------------------------------------------------

_EXPECTED = "expected NAME, NAME(key=value, ...) or path/to/file.py:Class(...), joined by + for a chain of defenses"


def _split(text: str) -> list[str]:
    """Cut at every ``+`` outside parentheses and quotes."""
    parts, depth, quote, escaped = [""], 0, "", False
    for char in text:
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "\"'":
            quote = char
        elif char == "+" and depth == 0:
            parts.append("")
            continue
        depth += 0 if quote else (char == "(") - (char == ")")
        parts[-1] += char
    return parts


def _parse_call(part: str, whole: str) -> Call:
    ref, bracket, arguments = part.strip().partition("(")
    ref = ref.strip()
    if not ref or (bracket and not arguments.endswith(")")):
        raise UserError(f"{whole!r}: {_EXPECTED}")
    try:
        call = ast.parse(f"f({arguments[:-1]})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        params = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UserError(f"{whole!r}: expected keyword arguments such as {ref}(steps=3, tv=1e-4)") from None
    if len(params) != len(call.keywords):
        raise UserError(f"{whole!r}: an argument of {ref} is given twice")
    for name, value in params.items():
        plain = value is None or isinstance(value, int | float | str)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{whole!r}: {name}: expected a finite number, a string, True, False or None")
    return Call(ref, params)

"""Importing entries, in children only: from a request to an instance, and from a file to what it says of itself."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from leakbench.attack import NEEDS, Attack
from leakbench.chain import DefenseChain
from leakbench.defense import HOOKS, Defense
from leakbench.entry import Entry
from leakbench.errors import InvalidOutput, LeakbenchError, unknown
from leakbench.models.imprint import IMPRINTS
from leakbench.tasks import Target

Local = Mapping[str, Entry]
"""Instances by token, for entries without a file (isolation ``none`` only)."""


def load_entry(request: Mapping[str, Any], local: Local) -> Entry:
    """Import the entry that ``request`` names and build it with its ``params``.

    Raises:
        InvalidOutput: The file holds no such class.
    """
    if "local" in request:
        return local[request["local"]]
    cls = _find(_import(request), request)
    entry = cls(**request.get("params", {}))
    if not hasattr(entry, "name"):
        cls.name, cls.version = request["name"], 1
    return entry


def load_chain(requests: list[Mapping[str, Any]], local: Local) -> DefenseChain:
    """Build a chain of defenses.

    Raises:
        InvalidOutput: One of them is not a Defense.
    """
    parts: list[Defense] = []
    for request in requests:
        entry = load_entry(request, local)
        if not isinstance(entry, Defense):
            raise InvalidOutput(f"{entry!r} is not a Defense")
        parts.append(entry)
    return DefenseChain(parts)


def _import(request: Mapping[str, Any]) -> ModuleType:
    if request.get("module"):
        return importlib.import_module(request["module"])
    path = Path(request["path"])
    spec = importlib.util.spec_from_file_location(f"leakbench_entry_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InvalidOutput(f"{path.name}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, request: Mapping[str, Any]) -> type[Entry]:
    base = Attack if request["kind"] == "attack" else Defense
    own = {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base and cls.__module__ == module.__name__
    }
    wanted = request.get("class_name")
    if wanted is not None:
        if wanted not in own:
            found = ", ".join(own) or "none"
            raise InvalidOutput(f"holds no {base.__name__} called {wanted!r}; its {base.__name__} classes: {found}")
        return own[wanted]
    registered = [cls for cls in own.values() if "name" in vars(cls)] or list(own.values())
    if len(registered) != 1:
        raise InvalidOutput(
            f"expected one registered {base.__name__} class, found {len(registered)} ({', '.join(own) or 'none'}); "
            "mark one with @register, or name it as file.py:Class"
        )
    return registered[0]


def describe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"ok": fields}`` or ``{"error": line}``; with ``params``, only where the entry takes them."""
    try:
        cls = _find(_import(request), request)
        name = vars(cls).get("name", request["name"])
        if request.get("module") and name != request["name"]:
            raise InvalidOutput(f"is registered as {name!r}, but its file is called {request['name']!r}")
        if "params" in request:
            cls(**request["params"])
        return {"ok": describe_class(cls, request["kind"], name)}
    except Exception as error:
        return {"error": error_line(error)}


def describe_class(cls: type[Entry], kind: str, name: str) -> dict[str, Any]:
    """Return the fields of `leakbench.entries.Description` that a class tells.

    Raises:
        InvalidOutput: A declaration is missing or unknown.
    """
    doc = inspect.getdoc(cls) or ""
    params, required = _signature(cls)
    described: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "class_name": cls.__name__,
        "version": int(getattr(cls, "version", 1)),
        "summary": doc.split("\n", 1)[0],
        "reference": _reference(doc),
        "doc": doc,
        "params": params,
        "required": required,
    }
    if issubclass(cls, Attack):
        recovers, needs = frozenset(getattr(cls, "recovers", ())), frozenset(cls.needs)
        if not recovers or recovers - set(get_args(Target)):
            known = ", ".join(get_args(Target))
            raise InvalidOutput(f"recovers: expected a set out of {known}; got {set(recovers)}")
        if cls.inserts is not None and cls.inserts not in IMPRINTS:
            raise InvalidOutput(str(unknown("imprint module", cls.inserts, IMPRINTS)))
        if cls.inserts is not None and "change_architecture" not in needs:
            raise InvalidOutput(f"inserts {cls.inserts!r}: expected 'change_architecture' in needs; add it")
        if needs - NEEDS:
            raise InvalidOutput(f"needs: {sorted(needs - NEEDS)} is unknown; known: {sorted(NEEDS)}")
        described |= {
            "recovers": sorted(recovers),
            "needs": sorted(needs),
            "exact": bool(cls.exact),
            "reads": list(cls.reads),
            "prepares": cls.prepare is not Attack.prepare,
            "plants": cls.plant is not Attack.plant,
            "inserts": cls.inserts,
        }
    elif issubclass(cls, Defense):
        described["acts_on"] = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Defense, hook)]
        described["strength"] = list(cls.strength) if cls.strength else None
        described["merges"] = cls.merges
        described["neutral"] = None if cls.neutral is None else dict(cls.neutral)
        described["draws"], described["likelihood"] = cls.draws, cls.likelihood
        described["adaptive"] = list(cls.adaptive)
    return described


def _signature(cls: type[Entry]) -> tuple[dict[str, Any], list[str]]:
    params, required = {}, []
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise InvalidOutput(f"{cls.__name__}.__init__: make {name!r} keyword-only (write `*,` before it)")
        if parameter.default is parameter.empty:
            required.append(name)
        else:
            params[name] = parameter.default
    return params, required


def _reference(doc: str) -> str:
    found = re.search(r"^References?:\s*(.+?)(?:\n\s*\n|\Z)", doc, flags=re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def error_line(error: Exception) -> str:
    """Return one line about an exception: its type, text and, for an entry's own, the place."""
    text = " ".join(str(error).split())[:500]
    own = isinstance(error, LeakbenchError)
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where and not own else ""
    return f"{text}{place}" if own else f"{type(error).__name__}: {text}{place}"

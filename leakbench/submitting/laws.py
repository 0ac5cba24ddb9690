"""What every entry must keep, one function per law; `leakbench check` and the contract tests of baselines ask the same.

A law is given the class and returns None or a short remark. Where the law is broken it raises `Broken` with what to do.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakbench.entry import Entry

LIBRARIES = frozenset({"leakbench_baselines", "numpy", "scipy", "sklearn", "torch"})
"""What an entry may import besides the standard library and leakbench's public names."""
PUBLIC_MODULES = frozenset({"leakbench", "leakbench.inversion", "leakbench.metrics.stealth"})


class Broken(Exception):
    """A law does not hold; the text says what was seen and what to do."""


@dataclass(frozen=True)
class Law:
    """One law.

    Args:
        title: What holds, in a few words.
        check: Returns a remark or None; raises `Broken`.
        first: Whether the later ones say nothing new where it does not hold.
    """

    title: str
    check: Callable[[Any], str | None]
    first: bool = False

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return self.check.__name__


def parameters_are_data(cls: type[Entry]) -> None:
    """Constructor arguments are kept, written as JSON, and rebuild the entry."""
    params = cls().params()
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    if params != defaults:
        changed = sorted(name for name in defaults if params.get(name) != defaults[name])
        raise Broken(f"self.{changed[0]} is not what __init__ was given; keep arguments as they are")
    again = cls(**json.loads(json.dumps(params))).params()
    if again != params:
        raise Broken(f"parameters change when the entry is built from them again: {params} became {again}")


def imports_public_names_only(cls: type[Entry]) -> None:
    """The file imports leakbench's public names and the libraries that a scoring machine has."""
    public = {name: set(importlib.import_module(name).__all__) for name in ("leakbench", "leakbench.inversion")}
    for node in ast.walk(ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
            named = {alias.name for alias in node.names}
            private = named - public.get(modules[0], named)
            if private:
                raise Broken(
                    f"line {node.lineno}: {modules[0]} has no public {min(private)!r}; see: {modules[0]}.__all__"
                )
        for module in modules:
            top = module.split(".")[0]
            if module in PUBLIC_MODULES or top in LIBRARIES or top in sys.stdlib_module_names:
                continue
            if top == "leakbench":
                raise Broken(f"line {node.lineno}: {module} may change any day; import from leakbench itself")
            raise Broken(
                f"line {node.lineno}: {module!r} is not on scoring machines; use {', '.join(sorted(LIBRARIES))}, the "
                "standard library, or put the code into the file"
            )


FILE_LAWS = (
    Law("constructor arguments are data", parameters_are_data, first=True),
    Law("imports only what scoring machines have", imports_public_names_only),
)

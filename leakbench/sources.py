"""Finding the code of attacks and defenses without importing it. No torch here.

Entries come from the entry-point groups ``leakbench.attacks`` and ``leakbench.defenses`` (a package folder is one entry
per public module, a module or ``module:Class`` is one entry) and from ``path/to/file.py[:Class]``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from leakbench.errors import UserError
from leakbench.parts import content_hash
from leakbench.registry import Registry

Kind = Literal["attack", "defense"]
"""The two kinds of entry."""


@dataclass(frozen=True)
class EntrySource:
    """Where the code of one entry is.

    Args:
        kind: ``attack`` or ``defense``.
        ref: What names it in an expression.
        name: Its registry key; the file's stem where it is given by path.
        module: Dotted module name; None where it is given by path.
        path: Its file.
        class_name: Its class; None where the file holds one entry.
        root: Folder of its top-level package; None for a single file.
        package: Distribution that brings it; the path where there is none.
    """

    kind: Kind
    ref: str
    name: str
    module: str | None
    path: Path
    class_name: str | None
    root: Path | None
    package: str

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file and every module of its own top-level package that importing it reads, sorted."""
        if self.root is None or self.module is None:
            return (self.path,)
        return tuple(sorted(_reachable(self.root, self.module.split(".")[0], self.path)))

    @cached_property
    def sha256(self) -> str:
        """Sha256 (hex) over the names and contents of `files`."""
        base = self.root or self.path.parent
        return content_hash(
            [(file.relative_to(base).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()) for file in self.files]
        )

    def request(self) -> dict[str, Any]:
        """Return what a child needs to import it; JSON-able."""
        return {"module": self.module, "path": str(self.path), "class_name": self.class_name}


@cache
def sources(kind: Kind) -> Registry[EntrySource]:
    """Return the installed entries of one kind, found without importing them.

    Raises:
        UserError: Two packages bring an entry of the same name, or an entry point leads nowhere.
    """
    registry: Registry[EntrySource] = Registry(kind)
    for point in importlib.metadata.entry_points(group=f"leakbench.{kind}s"):
        for source in _from_entry_point(kind, point):
            if source.name in registry:
                first = registry.get(source.name)
                raise UserError(
                    f"{kind} {source.name!r} comes from two places, expected one: {first.path} ({first.package}) and "
                    f"{source.path} ({source.package}); uninstall or rename one"
                )
            registry.register(source.name, source)
    return registry


def find_source(kind: Kind, ref: str) -> EntrySource:
    """Return the entry called ``ref``, or the one in the file ``path/to/file.py[:Class]``.

    Raises:
        UserError: There is none; the message names the nearest ones.
    """
    match = re.fullmatch(r"(?P<path>.+\.py)(:(?P<cls>\w+))?", ref)
    if match is None:
        return sources(kind).get(ref)
    path = Path(match["path"]).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{kind} {ref!r}: expected a Python file, got no file {path}; give the path of an existing one")
    return EntrySource(kind, ref, path.stem, None, path, match["cls"], None, str(path))


def _from_entry_point(kind: Kind, point: importlib.metadata.EntryPoint) -> Iterator[EntrySource]:
    module, _, class_name = point.value.replace(" ", "").partition(":")
    package = point.dist.name if point.dist is not None else point.value
    # find_spec of a submodule would import its parents, so only the top-level name is looked up.
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is not None and spec.submodule_search_locations is not None:
        for root in map(Path, spec.submodule_search_locations):
            place = root.joinpath(*rest)
            if place.is_dir() and not class_name:
                for file in sorted(place.glob("[!_]*.py")):
                    yield EntrySource(kind, file.stem, file.stem, f"{module}.{file.stem}", file, None, root, package)
                return
            if (found := _module_file(place)) is not None:
                yield EntrySource(kind, point.name, point.name, module, found, class_name or None, root, package)
                return
    elif spec is not None and spec.origin is not None and not rest:
        yield EntrySource(kind, point.name, point.name, module, Path(spec.origin), class_name or None, None, package)
        return
    raise UserError(
        f"{kind} entry point {point.name!r} of {package}: no module {module!r}; reinstall or uninstall {package}"
    )


def _module_file(place: Path) -> Path | None:
    """Return the file of the module whose path without suffix is ``place``."""
    candidates = (place / "__init__.py", place.with_name(place.name + ".py"))
    return next((path for path in candidates if path.is_file()), None)


def _reachable(root: Path, top: str, start: Path) -> set[Path]:
    """Return ``start`` and the files under ``root`` that its imports lead to; importing a module runs its parents'."""
    found: set[Path] = set()
    todo = [start]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        inside = file.relative_to(root).parent
        todo += [p for d in (inside, *inside.parents) if (p := root / d / "__init__.py").is_file()]
        own = (dotted[1:] for dotted in _imported(file, [top, *inside.parts]) if dotted[0] == top)
        todo += [module for parts in own if (module := _module_file(root.joinpath(*parts))) is not None]
    return found


def _imported(file: Path, package: list[str]) -> Iterator[list[str]]:
    """Yield the dotted names that ``file`` imports; ``package`` is the one that relative imports start from."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the describe child reports it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield base
            yield from ([*base, alias.name] for alias in node.names)

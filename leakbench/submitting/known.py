"""What rows say of their entries, against the sources at hand. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from leakbench.entries import Description, try_describe
from leakbench.measures.catalogue import MEASURES
from leakbench.sources import EntrySource, Kind, sources

Row = Mapping[str, Any]
_KINDS: tuple[Kind, ...] = ("attack", "defense")
_CLAIMED = (
    *(f"{kind}{part}" for kind in _KINDS for part in ("", "_version", "_source_sha256")),
    *("defense_adaptive", "defense_strength"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def wrong_names(row: Row) -> Iterator[str]:
    """Yield the names of entries in a row that none can be registered under; pages and files are named after them."""
    for kind in (*_KINDS, "measure"):
        for name in _parts(row, kind):
            if not _NAME.fullmatch(name):
                yield f"{kind} {name[:60]!r} is no name of an entry"


def unknown(row: Row, given: Container[str]) -> Iterator[str]:
    """Yield which entries of a row are not at hand as they were, so that nothing else of them can be checked.

    Args:
        row: A row of an attack, a measure or a training.
        given: Hashes of the sources of entries that are given by path.
    """
    for kind in _KINDS:
        for name, sha, source in _sources(row, kind):
            if source is None and sha not in given:
                yield f"{kind} {name}: is not at hand, and nothing shows that it exists; name it with --entry"
            elif source is not None and sha not in (source.sha256, None) and sha not in given:
                yield f"{kind} {name}: its source has changed since (source_sha256); the row is of the older one"
            elif source is not None and sha is None:
                yield f"{kind} {name}: no source_sha256 says which code it was"
    for name in _parts(row, "measure"):
        if name not in MEASURES:
            yield f"measure {name}: is not at hand, and nothing shows that it exists"


class Declared:
    """What rows say that their entries declare, kept until all entries can be described in one child process."""

    def __init__(self) -> None:
        self._claims: dict[tuple[Any, ...], tuple[str, Row]] = {}

    def add(self, where: str, row: Row) -> None:
        """Keep what a row claims; of jobs that claim the same, the first one's place."""
        self._claims.setdefault(tuple(row.get(name) for name in _CLAIMED), (where, row))

    def wrong(self) -> Iterator[tuple[str, str]]:
        """Yield (where, text) of what an entry, at hand with the same source, declares otherwise."""
        rows = [row for _, row in self._claims.values()]
        found = {source.path: source for row in rows for kind in _KINDS for _, source in _same(row, kind) if source}
        told = dict(zip(found, try_describe(list(found.values())), strict=True))
        for where, row in self._claims.values():
            for kind in _KINDS:
                sources_ = [source for _, source in _same(row, kind)]
                declared = [told[source.path] for source in sources_ if source is not None]
                known = [part for part in declared if isinstance(part, Description)]
                if kind in row and len(known) == len(sources_):
                    yield from ((where, text) for text in _differences(row, kind, known))


def _differences(row: Row, kind: Kind, declared: Sequence[Description]) -> Iterator[str]:
    expected: dict[str, Any] = {f"{kind}_version": max((part.version for part in declared), default=1)}
    if kind == "defense":
        strengths = [None if part.strength is None else list(part.strength) for part in declared]
        expected["defense_adaptive"] = json.dumps([list(part.adaptive) for part in declared])
        expected["defense_strength"] = json.dumps(strengths)
    for name, value in expected.items():
        if name in row and row[name] != value:
            yield f"forged: {name} is {str(row[name])[:60]}, but the source of {row[kind]} says {value}"


def _same(row: Row, kind: Kind) -> Iterator[tuple[str, EntrySource | None]]:
    """Yield the parts of an entry, with the source where it is at hand as it was."""
    for name, sha, source in _sources(row, kind):
        yield name, source if source is not None and source.sha256 == sha else None


def _parts(row: Row, kind: str) -> list[str]:
    return [] if row.get(kind) in (None, "none") else row[kind].split("+")


def _sources(row: Row, kind: Kind) -> Iterator[tuple[str, str | None, EntrySource | None]]:
    """Yield name, hash as the row has it, and source at hand of every part of an entry."""
    names = _parts(row, kind)
    hashes = (row.get(f"{kind}_source_sha256") or "").split("+")
    known = sources(kind)
    for index, name in enumerate(names):
        sha = hashes[index] or None if len(hashes) == len(names) else None
        yield name, sha, known.get(name) if name in known else None

"""What changed of rules and boards, and which versions the rows are of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from leakbench.site.data import Data
from leakbench.site.page import Page
from leakbench.site.table import Column, Line, Table, Value, whole

_ENTRY = re.compile(r"^- \[(Rules|Board)\] (.+)$")


def pages(data: Data) -> Iterator[Page]:
    """Yield the version history."""
    keys = ["benchmark_version", "season", "leakbench_version", "git_sha"]
    counts = data.rows.groupby(keys, dropna=False, observed=True).size().reset_index(name="rows")
    lines = [
        Line([Value("–" if v != v or v is None else str(v)) for v in line[:-1]] + [whole(line[-1])], str(i))
        for i, line in enumerate(counts.itertuples(index=False, name=None))
    ]
    columns = [Column("benchmark"), Column("season"), Column("leakbench"), Column("commit"), Column("rows", True)]
    table = Table(
        "versions", "Rows by version: those of different benchmark versions are never compared", columns, lines
    )
    context = {"tables": [table], "history": history(data.options.changelog)}
    yield Page("versions.html", "Version history", "versions.html", context)


def history(changelog: Path | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the entries of a changelog that are about rules and boards: heading, then tag and text of each."""
    path = changelog or Path(__file__).parents[3] / "CHANGELOG.md"
    if not path.is_file():
        return []
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            found.append((line[3:], []))
        elif (entry := _ENTRY.match(line)) and found:
            found[-1][1].append((entry[1], entry[2].replace("`", "")))
    return [(heading, entries) for heading, entries in found if entries]

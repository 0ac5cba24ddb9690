"""The kinds of pages: a new kind is a new module and an entry of `KINDS`. Each takes the data and yields pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from leakbench.site.data import Data
from leakbench.site.page import Asset, Page
from leakbench.site.pages import (
    boards,
    cells,
    compute,
    defenses,
    download,
    entries,
    gallery,
    heatmap,
    localization,
    measured,
    reproductions,
    start,
    tasks,
    versions,
)

KINDS: tuple[Callable[[Data], Iterator[Page | Asset]], ...] = (
    start.pages,
    boards.pages,
    defenses.pages,
    heatmap.pages,
    compute.pages,
    localization.pages,
    reproductions.pages,
    gallery.pages,
    entries.pages,
    tasks.pages,
    cells.pages,
    measured.pages,
    versions.pages,
    download.pages,
)
"""What makes the pages, in order."""

NAVIGATION = (
    ("index.html", "Start"),
    *((board.path, board.short) for board in boards.BOARDS),
    ("defenses.html", "Defenses"),
    ("heatmap.html", "Heat map"),
    ("compute.html", "Compute"),
    ("localization.html", "Localization"),
    ("reproductions.html", "Reproductions"),
    ("gallery.html", "Gallery"),
    ("entries.html", "Entries"),
    ("versions.html", "Versions"),
    ("download.html", "Download"),
)
"""What every page leads to."""

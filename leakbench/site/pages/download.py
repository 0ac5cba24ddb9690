"""Everything to take home."""

from __future__ import annotations

from collections.abc import Iterator

from leakbench.schema import ROW_FIELDS
from leakbench.site.data import Data
from leakbench.site.downloads import bibtex, held
from leakbench.site.page import Asset, Page


def pages(data: Data) -> Iterator[Page | Asset]:
    """Yield the page of downloads, and how to cite."""
    text = bibtex(data)
    yield Asset("cite.bib", text.encode())
    facts = [(field.name, str(field.type), field.doc) for field in ROW_FIELDS]
    context = {"bibtex": text, "facts": facts, "others": held(data)}
    yield Page("download.html", "Download and cite", "download.html", context)

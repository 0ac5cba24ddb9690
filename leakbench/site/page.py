"""What a kind of page gives: where it is, which template, and what that is filled with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Page:
    """One page.

    Args:
        path: From the root of the site.
        title: Its heading.
        template: Name of its template.
        context: What the template is filled with; every text in it is escaped.
    """

    path: str
    title: str
    template: str = "tables.html"
    context: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asset:
    """A file that is no page, such as a picture."""

    path: str
    content: bytes

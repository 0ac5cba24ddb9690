"""A named collection with collision and spelling errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from leakbench.errors import LeakbenchError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to things of one kind.

    Args:
        kind: What the things are, used in error messages (``"dataset"``).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name`` and return it.

        Raises:
            LeakbenchError: The name is taken by another item.
        """
        if name in self._items:
            raise LeakbenchError(f"{self.kind} {name!r} is registered twice: {self._items[name]!r} and {item!r}")
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """Return the item called ``name``.

        Raises:
            UserError: There is none; the message names the nearest ones.
        """
        try:
            return self._items[name]
        except KeyError:
            raise unknown(self.kind, name, self._items) from None

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._items)

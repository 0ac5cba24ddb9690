"""What attacks and defenses share: a name, a version, and constructor arguments that are data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, final

from leakbench.errors import InvalidOutput


class Entry:
    """Base of `leakbench.Attack` and `leakbench.Defense`.

    Constructors are keyword-only; their arguments are the entry's parameters in rows and hashes, their defaults the
    paper's.
    """

    name: ClassVar[str]
    """Set by `register`."""
    version: ClassVar[int]
    """Set by `register`; raised by every change that can move a number."""

    @final
    def params(self) -> dict[str, Any]:
        """Return the constructor arguments this instance was made with, read from its equally named attributes.

        Raises:
            InvalidOutput: The constructor takes positional arguments, or keeps one under another name or as something
                that JSON cannot write.
        """
        kind = type(self).__name__
        values: dict[str, Any] = {}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.kind is not parameter.KEYWORD_ONLY:
                raise InvalidOutput(f"{kind}.__init__: make {name!r} keyword-only (write `*,` before it)")
            if not hasattr(self, name):
                raise InvalidOutput(f"{kind}.__init__ must store its argument as self.{name}")
            value = getattr(self, name)
            if not _is_plain(value):
                raise InvalidOutput(f"{kind}.{name}: expected a number, a string, a bool or None, got {value!r}")
            values[name] = value
        return values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.params().items())})"


E_co = TypeVar("E_co", bound=type[Entry])


def register(name: str, *, version: int = 1) -> Callable[[E_co], E_co]:
    """Mark a class as the entry of its file.

    Args:
        name: Registry key; for a baseline it equals the file's stem.
        version: Raised by every change of the entry that can move a number.
    """

    def decorate(cls: E_co) -> E_co:
        cls.name = name
        cls.version = version
        return cls

    return decorate


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)

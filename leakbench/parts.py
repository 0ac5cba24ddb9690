"""What every part of a task is: frozen, validated, with a content that a hash covers. No torch here."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

T = TypeVar("T")


class Part(BaseModel):
    """Base of every part of a task: frozen, no unknown keys, finite numbers, no strings taken for numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    younger: ClassVar[frozenset[str]] = frozenset()
    """Fields younger than published hashes: with their default they leave no trace in the content."""

    @model_serializer(mode="wrap")
    def _younger_defaults_leave_no_trace(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = default(self)
        fields = type(self).model_fields
        return {k: v for k, v in content.items() if k not in self.younger or getattr(self, k) != fields[k].default}

    def content(self) -> dict[str, Any]:
        """Return the JSON-able content that the hash covers."""
        return self.model_dump(mode="json")


def axis(shorthand: str | None = None) -> BeforeValidator:
    """Make a scalar an axis of one value, and the shorthand (``8`` for ``{size: 8}``) a mapping."""

    def convert(value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        if shorthand is not None:
            values = [{shorthand: v} if isinstance(v, str | int) else v for v in values]
        return tuple(values)

    return BeforeValidator(convert)


Axis = Annotated[tuple[T, ...], axis(), Field(min_length=1)]
"""One value or a list of them."""


def content_hash(content: object) -> str:
    """Return the sha256 (hex) of the canonical JSON of ``content``."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

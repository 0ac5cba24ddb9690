"""What every part of a task is: frozen, validated, with a content that a hash covers. No torch here."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


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


def content_hash(content: object) -> str:
    """Return the sha256 (hex) of the canonical JSON of ``content``."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

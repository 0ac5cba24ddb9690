"""Keyed randomness: every draw is an HMAC of a season key and the names of what it belongs to.

Nothing that matters uses a global seed, so adding an attack, a defense or a task changes no other draw, and with a
secret season key no entry can regenerate a victim or a defense's noise.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path

from leakbench.errors import UserError

PUBLIC_KEY = b"leakbench public key, version 1"
"""Key of what everybody may know: chance levels, splits, attack randomness, bootstrap resampling."""


def derive(key: bytes, *names: object) -> bytes:
    """Return 32 bytes that depend on ``key`` and every one of ``names`` (anything JSON can write)."""
    message = json.dumps(names, sort_keys=True, separators=(",", ":"), default=str).encode()
    return hmac.new(key, message, hashlib.sha256).digest()


def seed(key: bytes, *names: object) -> int:
    """Return a 63-bit integer seed; see `derive`."""
    return int.from_bytes(derive(key, *names)[:8], "little") >> 1


@dataclass(frozen=True, repr=False)
class Season:
    """A named key. ``development`` is public; an official season's key is secret until the season closes.

    Args:
        name: Value of the rows' ``season`` column.
        key: The secret. It stays in the parent process and is never written anywhere.
    """

    name: str
    key: bytes

    @property
    def commitment(self) -> str:
        """Sha256 of the key: published when a season opens, so that the key can be checked when it closes."""
        return hashlib.sha256(self.key).hexdigest()

    def __repr__(self) -> str:
        return f"Season({self.name!r}, commitment={self.commitment[:12]})"

    @classmethod
    def from_file(cls, path: Path) -> Season:
        """Read a season whose name is the file's stem and whose key is the file's content (at least 16 bytes).

        Raises:
            UserError: The file cannot be read or is too short.
        """
        try:
            key = path.read_bytes().strip()
        except OSError as error:
            raise UserError(f"--season-key {path}: cannot be read ({error.strerror}); give a readable file") from None
        if len(key) < 16:
            raise UserError(
                f"--season-key {path}: expected at least 16 bytes, got {len(key)}; "
                f"make one with: head -c 32 /dev/urandom | base64 > {path}"
            )
        return cls(name=path.stem, key=key)


DEVELOPMENT = Season("development", b"leakbench development season: public")
"""The default season. Its key is public, so its rows are for development, not for records."""

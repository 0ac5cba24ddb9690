"""Where leakbench keeps what it can compute again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache directory: ``LEAKBENCH_CACHE``, or ``leakbench`` in the platform's cache; it may not exist."""
    if given := os.environ.get("LEAKBENCH_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "leakbench"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "leakbench" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leakbench"

"""The blocks that every baseline is tried on, those of `leakbench check`, and the baselines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import leakbench_baselines

from leakbench import Attack, Defense
from leakbench.submitting.blocks import BLOCKS as PROTOCOLS

__all__ = ["PROTOCOLS", "entries", "leakbench_baselines"]


def entries(kind):
    """Return (stem, class) of every baseline file."""
    package = importlib.import_module(f"{leakbench_baselines.__name__}.{kind}")
    base = {"attacks": Attack, "defenses": Defense}[kind]
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        found += [(info.name, c) for c in own if issubclass(c, base)]
    return found

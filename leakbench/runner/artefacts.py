"""What children computed ahead of jobs (`Attack.prepare`, changed architectures), as content-addressed safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leakbench.parts import content_hash
from leakbench.runner.scene import Kept
from leakbench.runner.wire import Blob


@dataclass(frozen=True)
class Artefact:
    """A prepared artefact, ready to be sent to attack children.

    Args:
        tensors: Its tensors.
        info: What its maker noted (JSON), ``seconds`` of making included.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    @cached_property
    def blob(self) -> Blob:
        """Its tensors, ready to be sent."""
        return Blob.pack(self.tensors)


class Artefacts:
    """A folder of artefacts; each is computed once, by whichever worker or run needs it first.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recent = Kept(8)

    def get(self, identity: Mapping[str, Any], compute: Callable[[], Artefact]) -> Artefact:
        """Return the artefact of ``identity``, from memory, from the folder, or by ``compute``."""
        name = content_hash(identity)
        return self._recent.get(name, lambda: self._load(name) or self._make(name, compute))

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def _load(self, name: str) -> Artefact | None:
        """Read an artefact; a missing or damaged file is None and will be computed again."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
                return Artefact(tensors, json.loads(file.metadata()["leakbench"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _make(self, name: str, compute: Callable[[], Artefact]) -> Artefact:
        made = compute()
        kept = {key: tensor.contiguous() for key, tensor in made.tensors.items()}
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(safetensors.torch.save(kept, metadata={"leakbench": json.dumps(made.info)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return made

"""Where a row comes from: the code, the machine, the library versions. No torch here, except on an accelerator."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from leakbench.parts import content_hash

PACKAGE = Path(__file__).resolve().parent

NUMBER_MOVING = (
    "parts.py",
    "stage.py",
    "tasks.py",
    "keys.py",
    "randomness.py",
    "entry.py",
    "attack.py",
    "chain.py",
    "defense.py",
    "facts.py",
    "mechanism.py",
    "accounting.py",
    "knowledge.py",
    "observation.py",
    "inversion/*.py",
    "data/*.py",
    "models/*.py",
    "federation/*.py",
    "measures/*.py",
    "metrics/*.py",
    "runner/artefacts.py",
    "runner/child.py",
    "runner/exchange.py",
    "runner/execute.py",
    "runner/gauge.py",
    "runner/grant.py",
    "runner/kept.py",
    "runner/loading.py",
    "runner/measure.py",
    "runner/rows.py",
    "runner/scene.py",
    "runner/stealth.py",
    "runner/wire.py",
    "runner/workshop.py",
    "utility/*.py",
)
"""The modules whose code can change a number in a row; what only plans, lists, sandboxes or ranks is left out."""


@cache
def code_sha256() -> str:
    """Return the sha256 (hex) over the names and contents of `NUMBER_MOVING`."""
    files = sorted(path for pattern in NUMBER_MOVING for path in PACKAGE.glob(pattern))
    return content_hash(
        [(path.relative_to(PACKAGE).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    )


@cache
def provenance(device: str = "cpu") -> dict[str, Any]:
    """Return the provenance columns that are the same for every row of a run.

    Args:
        device: Torch name of the device that computes.
    """
    sha, dirty = _git()
    return {
        "leakbench_version": importlib.metadata.version("leakbench"),
        "code_sha256": code_sha256(),
        "git_sha": sha,
        "git_dirty": dirty,
        "host_kind": f"{_cpu_model()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        **_accelerator(device),
    }


def _git() -> tuple[str | None, bool | None]:
    """Return commit and dirty flag of the checkout the package lies in; None twice where it does not lie in one."""
    root = PACKAGE.parent
    git = shutil.which("git")
    # An installed wheel may lie inside the checkout of something else, so only the direct parent counts.
    if git is None or not (root / ".git").exists():
        return None, None

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()  # noqa: S603

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.system()


def _accelerator(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {"device": device, "cuda": None, "driver": None}
    import torch  # a run on an accelerator has it loaded

    smi = shutil.which("nvidia-smi")
    driver = None
    if smi is not None:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout  # noqa: S603
        driver = answer.split("\n", 1)[0].strip() or None
    return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "driver": driver}

"""The minimal root that isolation level ``bwrap`` puts the child server into."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

JOBS = "/tmp/leakbench-jobs"  # noqa: S108  (inside a private root)
"""Folder inside the root that holds the jobs' working directories."""

# The digits of scikit-learn are a dataset, and every environment has them.
_MASKED = "sklearn/datasets/data"


def bubblewrap_command(readable: Iterable[str], devices: Iterable[str]) -> list[str]:
    """Return the command line in front of the server's.

    No network, no host processes, an empty writable /tmp, and read-only views of ``readable`` alone.

    Args:
        readable: Files and folders to show.
        devices: Device nodes to show (GPUs).
    """
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    # First, so that an interpreter or a checkout below /tmp stays visible.
    command += ["--tmpfs", "/tmp", "--dir", JOBS]  # noqa: S108  (the root is private)
    links, folders = [], []
    for path in sorted(set(readable)):
        if path.startswith(("/proc", "/dev")):
            continue
        if os.path.islink(path):
            links += ["--symlink", os.readlink(path), path]
        if os.path.exists(path):
            folders.append(os.path.realpath(path) if os.path.islink(path) else path)
    for folder in sorted(set(folders)):
        command += ["--ro-bind", folder, folder]
    command += [*links, "--proc", "/proc", "--dev", "/dev"]
    for node in devices:
        command += ["--dev-bind-try", node, node]
    for masked in _masked_folders():
        command += ["--tmpfs", masked]
    return [*command, "--chdir", "/", "--"]


@cache
def bubblewrap_works() -> bool:
    """Whether bwrap is installed and may create namespaces here (containers and AppArmor may forbid it)."""
    if shutil.which("bwrap") is None:
        return False
    command = [*bubblewrap_command(["/usr", "/lib", "/lib64", "/bin"], []), "/usr/bin/true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0  # noqa: S603
    except OSError:
        return False


def _masked_folders() -> list[str]:
    from importlib.util import find_spec

    spec = find_spec("sklearn")
    if spec is None:
        return []
    roots = (Path(location).parent for location in spec.submodule_search_locations or ())
    return [str(root / _MASKED) for root in roots if (root / _MASKED).is_dir()]

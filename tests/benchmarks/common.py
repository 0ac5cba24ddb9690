"""What the benchmarks of inversion share: nets, and how time is taken."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from leakbench.tasks import Architecture

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}
"""What the child server sets too. Page faults on fresh memory would cost both sides more than their arithmetic."""
CLASSES, SHAPE = 10, (3, 32, 32)
LENET = Architecture(name="lenet_zhu", init="uniform(0.5)")
NETS = {"lenet_zhu": LENET, "resnet18": Architecture(name="resnet18"), "convnet": Architecture(name="convnet")}


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes, waiting for the GPU where there is one."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def keep_memory() -> None:
    """Start this program again where `ENVIRONMENT` is not set: it is read when a process starts."""
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)

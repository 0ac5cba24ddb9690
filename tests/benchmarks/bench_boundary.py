"""What the process boundary costs a tiny job: both children together, against the same job without any boundary.

Run by hand: ``python tests/benchmarks/bench_boundary.py [--runs 21]``. Levels are interleaved in one process, so that
a busy machine slows all of them; the medians' differences are what counts. Required: at most 60 ms at level process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from leakbench.entries import resolve
from leakbench.grids import Cell
from leakbench.keys import DEVELOPMENT
from leakbench.runner.bubblewrap import bubblewrap_works
from leakbench.runner.children import Child
from leakbench.runner.execute import Runner
from leakbench.runner.isolate import ChildServer
from leakbench.runner.plan import plan
from leakbench.tasks import Architecture, BatchSpec, Task

REQUIRED_MS = 60
TASK = Task(dataset="digits", architecture=Architecture(name="mlp"), batch=BatchSpec(size=8, sampler="unbalanced"))


class Stopwatch:
    """Wall seconds by name, collected from wrapped methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: type, method: str, name) -> None:
        """Time ``owner.method`` under ``name(*args)``."""
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                key = name(*args, **kwargs) if callable(name) else name
                self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - begun

        setattr(owner, method, timed)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21, help="Jobs per level, at least 15 (%(default)s).")
    runs = max(15, parser.parse_args().runs)
    levels = ["none", "process"] + (["bwrap"] if bubblewrap_works() else [])
    (attack,) = resolve("attack", "llg")
    cell = Cell("", TASK, attack, trials=4 * (runs + 3), trials_per_job=4)
    jobs = plan([cell], DEVELOPMENT)
    watch = Stopwatch()
    watch.wrap(ChildServer, "spawn", "ask the server for a child")
    watch.wrap(Child, "post", "send a request")
    watch.wrap(Child, "wait", lambda child, **asked: f"wait for {asked['expect']}")
    watch.wrap(Child, "close", "end a child")
    taken: dict[str, list[float]] = {level: [] for level in levels}
    parts: dict[str, list[dict[str, float]]] = {level: [] for level in levels}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = list(attack.source.files)
        runners = {
            level: stack.enter_context(Runner(folder / level, season=DEVELOPMENT, isolation=level, files=files))
            for level in levels
        }
        for number, job in enumerate(jobs):
            for level, runner in runners.items():
                watch.seconds.clear()
                outcome = runner.run(job)
                assert outcome.statuses == {"ok": 4}, outcome.error
                if number >= 3:  # the first ones fill caches
                    taken[level].append(outcome.seconds * 1000)
                    parts[level].append(dict(watch.seconds))
    base = statistics.median(taken["none"])
    print(f"{runs} tiny jobs per level, interleaved; medians in ms")
    print(f"{'level':10}{'job':>8}{'added':>8}")
    for level in levels:
        median = statistics.median(taken[level])
        print(f"{level:10}{median:8.1f}{median - base:8.1f}")
    added = statistics.median(taken["process"]) - base
    met = "met" if added <= REQUIRED_MS else "MISSED"
    print(f"at most {REQUIRED_MS} ms added at level process: {met} ({added:.1f} ms)")
    print("where it goes (ms, median):")
    for name in sorted({name for level in levels for part in parts[level] for name in part}):
        columns = (statistics.median(part.get(name, 0.0) * 1000 for part in parts[level]) for level in levels)
        print(f"  {name:28}" + "".join(f"{level} {ms:7.1f}   " for level, ms in zip(levels, columns, strict=True)))


if __name__ == "__main__":
    main()

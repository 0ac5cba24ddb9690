"""How much memory and time a cohort takes whose updates are summed: everything of a job in one process.

    python tests/benchmarks/bench_aggregation.py [--clients 1 10 1000] [--batch 8] [--architecture resnet18]

Every size of the cohort runs in a process of its own, on random images (LEAKBENCH_DATA is not needed), with an attack
that reads every tensor of the update. Printed: peak memory, the part of it above a cohort of one, seconds per client.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def cohort(clients: int, batch: int, architecture: str) -> dict[str, float]:
    """Run one job of ``clients`` clients and return peak GiB and seconds per client."""
    import torch

    from leakbench import Attack, Recovery, evaluate
    from leakbench.tasks import Architecture, BatchSpec, Protocol, Task

    class Whole(Attack):
        """Reads all of the update; claims nothing of use."""

        recovers = frozenset({"labels"})

        def run(self, observation):
            numbers = sum(value[0].numel() for value in observation.update.values())
            counts = torch.zeros(observation.trials, 1, observation.num_classes, dtype=torch.int64)
            return Recovery(label_counts=counts, notes={"numbers": numbers})

    Whole.__module__ = "a_cell"  # without a file it runs in this process
    rng = np.random.default_rng(0)
    examples = 2 * clients * batch + 100
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "noise.npz"
        np.savez(data, x=rng.integers(0, 256, (examples, 3, 32, 32), dtype=np.uint8), y=np.arange(examples) % 10)
        task = Task(
            dataset=str(data),
            architecture=Architecture(name=architecture),
            batch=BatchSpec(size=batch),
            protocol=Protocol(clients=clients, secure_aggregation=clients > 1),
        )
        begun = time.perf_counter()
        rows = evaluate(Whole(), task, trials=1, isolation="none", threads=torch.get_num_threads())
        seconds = time.perf_counter() - begun
    if set(rows.status) != {"ok"}:
        raise SystemExit(rows.error[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "clients": clients,
        "parameters": json.loads(rows.notes[0])["numbers"],
        "GiB": peak,
        "client_seconds": rows.client_seconds[0] / clients,
        "job_seconds": seconds,
    }


def main() -> None:
    """Print a line per cohort size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 1000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(cohort(options.clients[0], options.batch, options.architecture)))
        return
    print("clients  parameters  peak GiB  above the first  s/client  s/job")
    first = None
    for clients in options.clients:
        command = [sys.executable, __file__, "--one", "--clients", str(clients), "--batch", str(options.batch)]
        done = subprocess.run([*command, "--architecture", options.architecture], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        print(
            f"{clients:7d}  {found['parameters']:10,.0f}  {found['GiB']:8.2f}  {found['GiB'] - first['GiB']:+15.2f}"
            f"  {found['client_seconds']:8.3f}  {found['job_seconds']:5.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

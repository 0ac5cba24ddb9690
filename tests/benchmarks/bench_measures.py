"""What a probe of the Jacobian costs, in gradients, and that memory does not grow with the trials.

Run: ``python tests/benchmarks/bench_measures.py [--probes 64] [--architecture torchvision/resnet18]`` (a few minutes).
All layers of a net for 3x32x32 images, one example, one trial. Gradients and probes take turns in one process, so that
a busy machine slows them alike; the ratio of medians is what counts, to the faster of the client's own gradient and a
plain backward pass. The graphs are paid for once and are part of a probe's cost. Memory is the peak of a process of its
own for each number of trials. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

import torch
from common import CLASSES, SHAPE, keep_memory, timed
from torch.nn.functional import cross_entropy

from leakbench.federation.client import Client
from leakbench.measures.jacobian import Jacobian, trials_at_once
from leakbench.measures.sensitivity import frobenius, sensitivity
from leakbench.measures.subject import Clients, Subject
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol

PER_PROBE, MEMORY = 5.0, 1.25
REPEATS, BLOCK = 9, 8
TRIALS = (4, 16)


def subject(architecture: str, trials: int) -> Subject:
    """Return clients with one random image each."""
    torch.manual_seed(0)
    protocol = Protocol()
    return Subject(
        model=build_model(Architecture(name=architecture), SHAPE, CLASSES, seeds=[0]),
        cohort=Clients(protocol=protocol, clients=[Client(protocol, 1)], sizes=[1], weights=[1]),
        spec=InputSpec(shape=SHAPE, mean=(0.5,), std=(0.25,)),
        normalise=True,
        images=torch.rand(trials, 1, *SHAPE),
        labels=torch.randint(CLASSES, (trials, 1)),
        random=TrialRandom(torch.arange(trials * 32).view(trials, 32).to(torch.uint8)),
    )


def cost(architecture: str, probes: int) -> dict[str, float]:
    """Return what things cost in gradients; probes are timed in blocks between which gradients take turns."""
    whose = subject(architecture, 1)
    state = {name: value[0].clone().requires_grad_() for name, value in whose.model.parameters.items()}
    state |= {name: value[0] for name, value in whose.model.buffers.items()}
    weights = [state[name] for name in whose.model.parameters]

    def plain() -> None:
        logits, _, _ = whose.model.call(state, whose.images[0], train=False)
        torch.autograd.grad(cross_entropy(logits, whose.labels[0]), weights)

    kept: list[Jacobian] = []

    def linearise() -> None:
        kept[:] = [Jacobian(whose)]
        kept[0].energy(torch.zeros_like(whose.images))

    linearise()
    u = kept[0].update
    contenders = {
        "client's gradient": (1, whose.update),
        "plain backward pass": (1, plain),
        "graphs": (1, linearise),
        "probe": (BLOCK, lambda: frobenius(kept[0], BLOCK, "benchmark")),
        "J^T u": (1, lambda: kept[0].vjp(u)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(REPEATS + 1):
        for name, (count, run) in contenders.items():
            took = timed(run) / count
            if repeat:  # the first round warms up
                seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    gradient = min(median["client's gradient"], median["plain backward pass"])
    found = {name: value / gradient for name, value in median.items()}
    return found | {"probe, its share of the graphs included": found["probe"] + found["graphs"] / probes}


def peak(architecture: str, trials: int, probes: int) -> float:
    """Return the peak GiB of a process that measures so many trials."""
    command = [sys.executable, __file__, "--architecture", architecture, "--probes", str(probes)]
    found = subprocess.run([*command, "--peak", str(trials)], capture_output=True, text=True, check=True)
    return float(found.stdout)


def main() -> int:
    """Measure, print and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="torchvision/resnet18")
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        sensitivity(subject(options.architecture, options.peak), probes=options.probes)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return 0
    found = cost(options.architecture, options.probes)
    for name, ratio in found.items():
        print(f"{name:42} {ratio:6.2f} gradients")
    once, many = (peak(options.architecture, trials, 2) for trials in TRIALS)
    together = trials_at_once(subject(options.architecture, TRIALS[1]))
    print(
        f"peak memory, {together} trials at once: {TRIALS[0]} trials {once:.2f} GiB, {TRIALS[1]} trials {many:.2f} GiB"
    )
    checks = [
        ("a probe, in gradients", found["probe, its share of the graphs included"], PER_PROBE),
        ("memory of more trials / of fewer", many / once, MEMORY),
    ]
    for name, ratio, bar in checks:
        print(f"{name:42} {ratio:6.2f}   at most {bar}: {'met' if ratio <= bar else 'MISSED'}")
    return 0 if all(ratio <= bar for _, ratio, bar in checks) else 1


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())

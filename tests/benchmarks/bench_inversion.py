"""Inverting Gradients here against `breaching` 0.1.2: speed and equality of results.

Run ``python tests/benchmarks/bench_inversion.py WHAT`` with WHAT one of

- ``speed`` (minutes): ms per trial-iteration at equal settings, both sides taking turns; how much of the machine's
  arithmetic is used, and what takes the time. Exits with 1 when a bar is missed.
- ``cross-check`` (an hour; ``--trials 4 --iterations 50`` for a quick look): the same net, gradients, labels, start
  images and iterations on both sides; exits with 1 where the lower 95% bound of our mean PSNR difference is not above
  -1 dB. Needs CIFAR-10, see LEAKBENCH_DATA.

`breaching` runs in an environment of its own, made once in the cache folder with uv or pip; ``--breaching-python``
names another one. Its nets are its own classes, loaded with our weights; before anything is timed, both sides must give
the same distance at the same start images.

Each side runs as its user would run it: ours with the allocator settings that leakbench gives its children, `breaching`
without; ``--tune-both`` gives it the same ones.

What differs: `breaching` pads the images with zeros before it takes total variation, so its last row and column are
pulled to black, and it divides by all pixels where ours divides by the number of differences. It keeps the iterate that
follows the best objective, ours the one that has it. Our time includes set-up and one last comparison, its time the
iterations alone.

"Of sgemm" counts seven forward passes of arithmetic per iteration and image, whatever is computed in fact, and divides
by a large matrix product's speed. Above 100% is possible: convolutions use kernels of their own, which on some
machines are twice as fast as the matrix product's.

``--device cuda`` runs ResNet-18 with one image for 64 trials at once against `breaching` one trial at a time on the
same GPU, TF32 off on both sides (bar: 20x). This branch was written without a GPU at hand and has not been run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import torch
from common import CLASSES, ENVIRONMENT, NETS, SHAPE, keep_memory, timed
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from leakbench import Observation
from leakbench.cache import cache_dir
from leakbench.data import load_dataset
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.metrics.images import match, psnr
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import InputSpec, Protocol, ThreatModel

VERSION = "0.1.2"
PASSES = 7
"""Forward passes' worth of arithmetic in the gradient of a distance of gradients: the pass itself, two products per
layer in the backward pass, and two for each of these two and for the first in the second backward pass, less the weight
gradients that nobody reads."""


@dataclass(frozen=True)
class Case:
    """One line of the speed table.

    Args:
        net: Key of `NETS`.
        batch: B.
        trials: T of one call of ours.
        iterations: Of one call of ours.
        theirs: Trials and iterations of one call of `breaching`.
        bar: Least ratio of times.
    """

    net: str
    batch: int
    trials: int
    iterations: int
    theirs: tuple[int, int]
    bar: float


SPEED = (
    Case("lenet_zhu", 1, 256, 20, (2, 100), 12.0),
    Case("lenet_zhu", 8, 64, 20, (2, 100), 3.0),
    Case("resnet18", 1, 16, 6, (1, 20), 2.5),
    Case("resnet18", 8, 4, 6, (1, 10), 1.1),
    Case("convnet", 1, 8, 6, (1, 20), 1.5),
    Case("convnet", 8, 4, 4, (1, 6), 1.0),
)
GPU_SPEED = (Case("resnet18", 1, 64, 50, (4, 50), 20.0),)
CROSS_CHECK = {"lenet_zhu": (64, 2000), "convnet": (16, 300)}


def main() -> int:
    """Parse, run and return the exit status."""
    parser = argparse.ArgumentParser(description="Inverting Gradients here against breaching; see the file's head")
    parser.add_argument("what", choices=("speed", "cross-check"))
    parser.add_argument("--net", choices=sorted(NETS), action="append", help="only this net; may be repeated")
    parser.add_argument("--trials", type=int, help="fewer trials, for a quick look")
    parser.add_argument("--iterations", type=int, help="fewer iterations, for a quick look")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side; medians count")
    parser.add_argument("--tv", type=float, default=1e-4, help="weight of the total variation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune-both", action="store_true", help="give breaching our allocator settings too")
    parser.add_argument(
        "--breaching-python", type=Path, help=f"of an environment with breaching {VERSION}, safetensors"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return {"speed": speed, "cross-check": cross_check}[arguments.what](arguments)


# --- both sides ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """T trials of one net, as our attack sees them, and the private images (T, B, *shape)."""

    net: str
    observation: Observation
    images: Tensor

    @classmethod
    def of(cls, net: str, images: Tensor, labels: Tensor, device: str) -> Block:
        """Let a client compute the gradients of images (T, B, *shape) in [0, 1] at freshly drawn weights."""
        trials, batch = labels.shape
        model = build_model(NETS[net], SHAPE, CLASSES, seeds=[0]).to(device=device)
        images, labels = images.to(device), labels.to(device)
        random = TrialRandom(torch.arange(trials * 32).remainder(251).reshape(trials, 32).byte(), device=device)
        protocol = Protocol()
        facts = Facts(
            granted=ThreatModel(labels=True).granted(),
            protocol=protocol,
            input_spec=InputSpec(shape=SHAPE),
            normalised=False,
            num_classes=CLASSES,
            batch_size=batch,
            inputs_per_client=batch,
        )
        update = Client(protocol, batch).update(model, images, labels, random=random)
        seen = Seen([update], labels=labels[:, None])
        return cls(net, Observation(seen, facts=facts, random=random, model=model), images)

    def run(self, iterations: int, tv: float) -> Tensor:
        """Return what our attack recovers, (T, B, *shape)."""
        recovered = InvertingGradients(steps=iterations, tv=tv).run(self.observation).inputs
        assert recovered is not None
        return recovered

    def starts(self) -> Tensor:
        """Return the start images of our attack: the first draws of the trials' streams."""
        seen = self.observation
        return seen.block(0, seen.trials).randn(1, *self.images.shape[1:])[:, 0]

    def save(self, file: Path) -> None:
        """Write what `breaching` needs."""
        seen = self.observation
        ordered = {"parameter": seen.model.parameters, "buffer": seen.model.buffers, "gradient": seen.gradient}
        tensors = {
            f"{kind}/{i}": value if kind == "gradient" else value[0]
            for kind, state in ordered.items()
            for i, value in enumerate(state.values())
        }
        tensors |= {"labels": seen.labels, "starts": self.starts()}
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, file)


class Theirs:
    """The process that runs `breaching`.

    Args:
        arguments: Of the command line.
        folder: For files that are exchanged.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        python = arguments.breaching_python or environment()
        command = [str(python), "-W", "ignore", str(Path(__file__).with_name("breaching_side.py"))]
        left_out = () if arguments.tune_both else tuple(ENVIRONMENT)
        variables = {k: v for k, v in os.environ.items() if k not in left_out}
        variables["OMP_NUM_THREADS"] = str(arguments.threads)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
        )

    def open(self, block: Block) -> None:
        """Hand over a block; both sides must agree about the distances at the start."""
        file = self.folder / "block.safetensors"
        block.save(file)
        request = {"open": str(file), "net": block.net, "classes": CLASSES, "tv": 0.0}
        theirs = self.ask(**request, device=self.arguments.device, threads=self.arguments.threads)["objective"]
        recovery = InvertingGradients(steps=1, tv=0.0).run(block.observation)
        assert recovery.visible_loss_trace is not None
        ours = recovery.visible_loss_trace[:, 0].cpu()
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-3, atol=1e-5)
        self.ask(**request | {"tv": self.arguments.tv}, device=self.arguments.device, threads=self.arguments.threads)

    def run(self, iterations: int, first: int, last: int, out: Path | None = None) -> float:
        """Attack trials ``first`` to ``last`` (exclusive) one by one; return the seconds."""
        answer = self.ask(run=iterations, trials=[first, last], out=None if out is None else str(out))
        return float(answer["seconds"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the breaching process ended; run tests/benchmarks/breaching_side.py by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment() -> Path:
    """Return the interpreter of an environment with `breaching` and the torch version used here, made once."""
    folder = cache_dir() / f"breaching-{VERSION}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if (folder / "complete").exists():
        return python
    wanted = [f"breaching=={VERSION}", f"torch=={torch.__version__.partition('+')[0]}", "safetensors", "numpy"]
    print(f"making {folder} with {' '.join(wanted)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    uv = which("uv")
    install = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    subprocess.run([*install, *wanted], check=True)
    (folder / "complete").touch()
    return python


def cifar10(trials: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return private images (T, B, *shape) in [0, 1] and labels (T, B)."""
    data = load_dataset("cifar10")
    rows = data.rows("private")[: trials * batch]
    images = torch.from_numpy(data.images[rows]).float().div(255).reshape(trials, batch, *SHAPE)
    return images, torch.from_numpy(data.labels[rows]).reshape(trials, batch)


# --- speed --------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> int:
    """Print the table of times."""
    peak = arithmetic_peak(arguments.device)
    print(f"load average {os.getloadavg()[0]:.1f}; above {arguments.threads} nothing here can be trusted")
    print(f"sgemm {peak / 1e9:.0f} GFLOP/s on {arguments.threads} threads; ms per trial-iteration, median (least)")
    print(f"{'net':10}  B    T {'breaching':>17} {'leakbench':>17}  ratio  {'bar':12} of sgemm: theirs ours   our time")
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(arguments, Path(folder))
        for case in SPEED if arguments.device == "cpu" else GPU_SPEED:
            if case.net not in (arguments.net or NETS):
                continue
            passed &= _line(case, theirs, arguments, peak)
        theirs.close()
    print(f"load average {os.getloadavg()[0]:.1f}")
    return 0 if passed else 1


def _line(case: Case, theirs: Theirs, arguments: argparse.Namespace, peak: float) -> bool:
    trials, iterations = arguments.trials or case.trials, arguments.iterations or case.iterations
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(trials, case.batch, *SHAPE, generator=generator)
    labels = torch.randint(CLASSES, (trials, case.batch), generator=generator)
    block = Block.of(case.net, images, labels, arguments.device)
    theirs.open(block)
    count, steps = min(trials, case.theirs[0]), arguments.iterations or case.theirs[1]
    block.run(1, arguments.tv)
    ours_ms, theirs_ms = [], []
    for _ in range(arguments.repeats):
        theirs_ms.append(1e3 * theirs.run(steps, 0, count) / (count * steps))
        ours_ms.append(1e3 * timed(lambda: block.run(iterations, arguments.tv)) / (trials * iterations))
    ours, other = statistics.median(ours_ms), statistics.median(theirs_ms)
    met = other / ours >= case.bar
    work = PASSES * case.batch * forward_flops(block) / 1e-3
    print(
        f"{case.net:10} {case.batch:2} {trials:4} "
        f"{other:8.2f} ({min(theirs_ms):6.2f}) {ours:8.2f} ({min(ours_ms):6.2f}) {other / ours:5.1f}x "
        f"{case.bar:>4}x {'met' if met else 'MISSED':6} {work / other / peak:16.0%} {work / ours / peak:4.0%}   "
        f"{where_time_goes(lambda: block.run(iterations, arguments.tv))}",
        flush=True,
    )
    return met


def arithmetic_peak(device: str) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(10))


def forward_flops(block: Block) -> float:
    """Return the floating-point operations of one image's forward pass: convolutions and linear layers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block.observation.model.logits(block.images[:1, :1])
    return float(counter.get_total_flops())


def where_time_goes(run: Callable[[], object]) -> str:
    """Return the shares of a profiled call's time: convolutions and products, element-wise work, copies and layout."""
    kinds = {"conv": "products", "mkldnn": "products", "mm": "products", "vecdot": "products"}
    kinds |= {"copy_": "copies", "cat": "copies", "im2col": "copies", "clone": "copies", "contiguous": "copies"}
    shares = {"products": 0.0, "copies": 0.0, "rest": 0.0}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    for event in profile.key_averages():
        kind = next((kind for part, kind in kinds.items() if part in event.key.lower()), "rest")
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return ", ".join(f"{kind} {value / total:.0%}" for kind, value in shares.items())


# --- equality -----------------------------------------------------------------------------------------------------


def cross_check(arguments: argparse.Namespace) -> int:
    """Compare the PSNR of both sides, image by image."""
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(arguments, Path(folder))
        for net, (trials, iterations) in CROSS_CHECK.items():
            if net not in (arguments.net or NETS):
                continue
            trials, iterations = arguments.trials or trials, arguments.iterations or iterations
            block = Block.of(net, *cifar10(trials, 1), arguments.device)
            theirs.open(block)
            begun = time.perf_counter()
            ours = score(block, block.run(iterations, arguments.tv))
            middle = time.perf_counter()
            theirs.run(iterations, 0, trials, Path(folder) / "found.safetensors")
            seconds = middle - begun, time.perf_counter() - middle
            other = score(block, load_file(Path(folder) / "found.safetensors")["images"])
            difference = ours - other
            low, high = interval(difference)
            met = low > -1
            passed &= met
            print(
                f"{net}: {trials} CIFAR-10 images, {iterations} iterations, TV {arguments.tv}: "
                f"leakbench {ours.mean():.2f} dB, breaching {other.mean():.2f} dB; "
                f"difference {difference.mean():+.2f} dB (95%: {low:+.2f} to {high:+.2f}), "
                f"lower bound above -1 dB: {'met' if met else 'MISSED'}; {seconds[0]:.0f} s against {seconds[1]:.0f} s",
                flush=True,
            )
        theirs.close()
    return 0 if passed else 1


def score(block: Block, recovered: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the PSNR of every trial in dB."""
    true = block.images.cpu()
    return psnr(match(recovered.cpu().clamp(0, 1), true), true).mean(1).numpy()  # type: ignore[no-any-return]


def interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean."""
    picks = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())

"""Speed of label attacks, with and without the gradients they read, against plain loops over trials.

Run: ``python tests/benchmarks/bench_labels.py`` (seconds on two idle cores). The plain loops are timed on a few trials
and must name the same labels. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from leakbench_baselines.attacks.ilrg import ILRG
from leakbench_baselines.attacks.llg import LLG, extract_counts, impact_of_negatives
from leakbench_baselines.attacks.llg_plus import LLGPlus
from leakbench_baselines.attacks.rlg import RLG
from leakbench_baselines.attacks.rlu import RLU
from scipy.optimize import linprog
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from leakbench import Attack, Knowledge, Observation
from leakbench.facts import Facts
from leakbench.federation.client import Client
from leakbench.models.functional import Model, build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}
"""What the child server sets too. Page faults on fresh memory would cost every contender more than its arithmetic."""
CLASSES, BATCH, SHAPE, AUXILIARY = 100, 8, (3, 32, 32), 1000
REPEATS = 7


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What is measured.
        trials: Trials of one call of ``ours``.
        ours: What is measured; returns label counts (T, C).
        plain: A plain loop over the first ``plain_trials`` trials; returns their counts.
        bar: Least trials per second; None where none was set.
        bytes_per_trial: Memory that a trial makes ``ours`` read, where that is what bounds it.
        repeats: Calls; the median counts.
    """

    name: str
    trials: int
    ours: Callable[[], Tensor]
    plain: Callable[[], list[list[int]]]
    plain_trials: int
    bar: float | None
    bytes_per_trial: int = 0
    repeats: int = REPEATS


def main() -> int:
    """Measure, print and return the exit status."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"load average {os.getloadavg()[0]:.1f}; above 2, other programs took part and nothing here can be trusted")
    print(f"{'':44}{'trials/s':>10}{'bar':>10}{'plain loop':>12}{'ratio':>8}")
    met = [measure(row) for row in (llg_from_row_sums(), llg_from_gradients(), llg_plus(), ilrg(), rlg(), rlu())]
    return 0 if all(met) else 1


def measure(row: Row) -> bool:
    """Print one line of the table and return whether its bar is met."""
    start = time.perf_counter()
    expected = row.plain()
    plain = row.plain_trials / (time.perf_counter() - start)
    found = row.ours()  # warms up, too
    assert found[: row.plain_trials].tolist() == expected
    ours = row.trials / seconds(row.ours, row.repeats)
    rate = f"   {ours * row.bytes_per_trial / 1e9:.1f} GB/s" if row.bytes_per_trial else ""
    met = row.bar is None or ours >= row.bar
    bar, verdict = ("none", "") if row.bar is None else (f"{row.bar:,.0f}", "met" if met else "MISSED")
    print(f"{row.name:44}{ours:10,.0f}{bar:>10}{plain:12,.0f}{ours / plain:8,.0f}   {verdict}{rate}")
    return met


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of ``run``."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_extraction(g: list[float], m: float, s: list[float], total: int, *, capped: bool) -> list[int]:
    """LLG's extraction as released, for one trial: class by class, label by label."""
    negative = sorted((i for i in range(len(g)) if g[i] < 0), key=lambda i: g[i])[: total if capped else None]
    left = [g[i] - s[i] - m * (i in negative) for i in range(len(g))]
    counts = [int(i in negative) for i in range(len(g))]
    while sum(counts) < total:
        label = min(range(len(g)), key=lambda i: left[i])
        counts[label] += 1
        left[label] -= m
    return counts


def plain_llg(g: list[float]) -> list[int]:
    """LLG of one trial from its row sums."""
    m = sum(x for x in g if x < 0) * (1 + 1 / CLASSES) / BATCH
    return plain_extraction(g, m, [0.0] * CLASSES, BATCH, capped=False)


def sample_gradients(trials: int, features: int) -> Tensor:
    """Last layer's weight gradients (T, C, d) of nets that are sure of nothing, for sigmoid features."""
    labels = torch.randint(CLASSES, (trials, BATCH))
    at_logits = 1 / CLASSES - one_hot(labels, CLASSES).float().transpose(1, 2) + torch.rand(trials, CLASSES, 1) * 0.01
    return torch.bmm(at_logits / BATCH, torch.rand(trials, BATCH, features))


def llg_from_row_sums(trials: int = 4096, few: int = 200) -> Row:
    """LLG where the row sums are there: the impact and the extraction."""
    g = torch.cat([sample_gradients(256, 96).sum(-1) for _ in range(trials // 256)])

    def ours() -> Tensor:
        return extract_counts(g, impact_of_negatives(g, BATCH), BATCH)

    def plain() -> list[list[int]]:
        return [plain_llg(row) for row in g[:few].tolist()]

    return Row("LLG, row sums given", trials, ours, plain, few, 150_000)


def llg_from_gradients(trials: int = 2048, few: int = 200) -> Row:
    """LLG where the last layer's gradient is there: bounded by reading it once."""
    gradients = torch.cat([sample_gradients(256, 768) for _ in range(trials // 256)])
    observation = Observation(Seen([{"fc.weight": gradients}]), **knowledge(small_net(), trials))

    def plain() -> list[list[int]]:
        return [plain_llg(gradient.sum(-1).tolist()) for gradient in gradients[:few]]

    row_bytes = CLASSES * 768 * 4
    return Row(
        "LLG, (100, 768) gradients given", trials, lambda: claim(LLG(), observation), plain, few, 35_000, row_bytes
    )


def llg_plus(trials: int = 1000, block: int = 64) -> Row:
    """LLG+ with everything: one preparation, and the victims' gradients and the attack in blocks."""
    model = small_net()
    inputs, labels = torch.rand(trials, BATCH, *SHAPE), torch.randint(CLASSES, (trials, BATCH))
    own = torch.rand(AUXILIARY, *SHAPE), torch.arange(AUXILIARY) % CLASSES
    name, client, attack = f"{model.head}.weight", Client(Protocol(), BATCH), LLGPlus()

    def ours() -> Tensor:
        prepared = attack.prepare(Knowledge(**knowledge(model, 1, own)))
        found = []
        for first in range(0, trials, block):
            x, y = inputs[first : first + block], labels[first : first + block]
            facts = knowledge(model, len(x), own)
            update = client.update(model, x, y, random=facts["random"], names=[name])  # type: ignore[arg-type]
            found.append(claim(attack, Observation(Seen([update], prepared=prepared), **facts)))
        return torch.cat(found)

    state = {k: v[0].clone().requires_grad_() for k, v in model.parameters.items()}

    def row_sums(x: Tensor, y: Tensor) -> list[float]:
        gradients = torch.autograd.grad(cross_entropy(model.call(state, x, train=False)[0], y), list(state.values()))
        return dict(zip(state, gradients, strict=True))[name].sum(-1).tolist()

    def plain() -> list[list[int]]:
        """The released way for one trial: all layers, batch by batch, then the trial itself."""
        m, s = 0.0, [0.0] * CLASSES
        for r in range(10):
            for c in range(CLASSES):
                rows = c + CLASSES * (torch.arange(r * BATCH, (r + 1) * BATCH) % (AUXILIARY // CLASSES))
                g = row_sums(own[0][rows], own[1][rows])
                m += g[c] / (CLASSES * BATCH * 10) * (1 + 1 / CLASSES)
                s = [x + (0 if j == c else g[j] / (10 * (CLASSES - 1))) for j, x in enumerate(s)]
        return [plain_extraction(row_sums(inputs[0], labels[0]), m, s, BATCH, capped=True)]

    return Row("LLG+, preparation and gradients included", trials, ours, plain, 1, 500, repeats=3)


def ilrg(trials: int = 256, few: int = 8) -> Row:
    """iLRG on LeNet-5, gradients given; the plain loop solves the C + 1 equations by the pseudo-inverse."""
    model, gradients, observation = lenet5_gradients(trials, 24)
    weight, bias = (model.parameters[f"fc.{part}"][0].double() for part in ("weight", "bias"))

    def plain() -> list[list[int]]:
        found = []
        for dw, db in zip(*(gradients[f"fc.{part}"][:few].double() for part in ("weight", "bias")), strict=True):
            p = torch.stack([torch.softmax(weight @ (dw[c] / db[c]) + bias, 0) for c in range(CLASSES)])
            matrix = torch.cat([torch.ones(1, CLASSES), p.T - torch.eye(CLASSES)]).double()
            n = torch.linalg.pinv(matrix) @ torch.cat([torch.ones(1), db]).double() * 24
            found.append([c if c <= 24 else 0 for c in n.clamp(min=0).round().long().tolist()])
        return found

    return Row("iLRG, LeNet-5, B=24, gradients given", trials, lambda: claim(ILRG(), observation), plain, few, 1_000)


def rlg(trials: int = 64, few: int = 1) -> Row:
    """RLG on LeNet-5, gradients given; the plain loop solves a linear program for every class."""
    _, gradients, observation = lenet5_gradients(trials, 24)

    def plain() -> list[list[int]]:
        found = []
        for dw in gradients["fc.weight"][:few].double():
            q = torch.linalg.svd(dw.T, full_matrices=False)[2][:24].numpy()
            apart = []
            for c in range(CLASSES):
                others = np.delete(q, c, axis=1)
                program = linprog(q[:, c], A_ub=-others.T, b_ub=np.zeros(CLASSES - 1), bounds=(-1, 1))
                apart.append(int(program.fun is not None and program.fun < -1e-3))
            found.append(apart)
        return found

    return Row("RLG, LeNet-5, B=24, gradients given", trials, lambda: claim(RLG(), observation), plain, few, None)


def rlu(trials: int = 64, few: int = 64, steps: int = 10) -> Row:
    """RLU after ten local steps of LeNet-5, updates given; compared with itself at one trial at a time."""
    model = build_model(Architecture(name="lenet5"), SHAPE, CLASSES, seeds=[0])
    protocol = Protocol(sends="delta", local_steps=steps, lr=0.01)
    own = torch.rand(AUXILIARY, *SHAPE), torch.arange(AUXILIARY) % CLASSES
    inputs, labels = torch.rand(trials, steps * BATCH, *SHAPE), torch.randint(CLASSES, (trials, steps * BATCH))
    facts = knowledge(model, trials, own, protocol)
    update = Client(protocol, BATCH).update(model, inputs, labels, random=facts["random"])  # type: ignore[arg-type]
    prepared = RLU().prepare(Knowledge(**knowledge(model, 1, own, protocol)))
    whole = Observation(Seen([update], prepared=prepared), **facts)

    def plain() -> list[list[int]]:
        found = []
        for t in range(few):
            one = {name: value[t : t + 1] for name, value in update.items()}
            seen = Observation(Seen([one], prepared=prepared), **knowledge(model, 1, own, protocol))
            found += claim(RLU(), seen).tolist()
        return found

    return Row(
        "RLU, LeNet-5, 10 steps, updates given", trials, lambda: claim(RLU(), whole), plain, few, None, repeats=3
    )


def lenet5_gradients(trials: int, batch: int) -> tuple[Model, dict[str, Tensor], Observation]:
    """Return LeNet-5 with 100 classes, the last layer's gradients of random batches, and what an attacker sees."""
    model = build_model(Architecture(name="lenet5"), SHAPE, CLASSES, seeds=[0])
    inputs, labels = torch.rand(trials, batch, *SHAPE), torch.randint(CLASSES, (trials, batch))
    facts = knowledge(model, trials, batch=batch)
    names = ["fc.weight", "fc.bias"]
    update = Client(Protocol(), batch).update(model, inputs, labels, random=facts["random"], names=names)  # type: ignore[arg-type]
    return model, update, Observation(Seen([update]), **facts)


def claim(attack: Attack, observation: Observation) -> Tensor:
    """Return the label counts (T, C) that an attack claims."""
    counts = attack.run(observation).label_counts
    assert counts is not None
    return counts[:, 0]


def small_net() -> Model:
    """LLG's CNN for CIFAR-100, 85k parameters."""
    return build_model(Architecture(name="lenet_zhu", init="uniform(0.5)"), SHAPE, CLASSES, seeds=[0])


def knowledge(
    model: Model,
    trials: int,
    auxiliary: tuple[Tensor, Tensor] | None = None,
    protocol: Protocol | None = None,
    batch: int = BATCH,
) -> dict[str, object]:
    """Return the arguments of `Knowledge`; of one gradient where there is no protocol."""
    protocol = protocol or Protocol()
    facts = Facts(
        granted=ThreatModel(auxiliary=AUXILIARY).granted(),
        protocol=protocol,
        input_spec=InputSpec(shape=SHAPE),
        normalised=False,
        num_classes=CLASSES,
        batch_size=batch,
        inputs_per_client=batch * protocol.local_batches,
    )
    seeds = torch.arange(trials)[:, None].expand(-1, 32).to(torch.uint8)
    return {"facts": facts, "random": TrialRandom(seeds), "model": model, "auxiliary": auxiliary}


if __name__ == "__main__":
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    sys.exit(main())

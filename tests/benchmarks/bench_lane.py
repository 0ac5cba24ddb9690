"""The malicious-server lane against closed forms: what a preset BatchNorm layer and an imprint layer give, on CIFAR-10.

    LEAKBENCH_DATA=<dir> python tests/benchmarks/bench_lane.py [fishing|imprint]

fishing: share of the clients whose label counts `bn_fishing` recovers exactly, up to the limit of d + 1 clients and
beyond. imprint: images of 64 that `robbing_the_fed` recovers at 40 dB, mean of 20 batches, beside n (1 - 1/k)^(n - 1).
"""

from __future__ import annotations

import json
import sys

import leakbench
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

SERVER = ThreatModel(
    adversary="malicious_server", change_parameters=True, per_client=True, change_architecture=True, auxiliary=1000
)
NETS = {
    "mlp, d = 256": (Architecture(name="mlp", params={"width": 256, "batch_norm": True}), 32, (50, 256, 257, 300)),
    "lenet5, d = 84": (Architecture(name="lenet5", params={"batch_norm": True}), 32, (30, 84, 85, 100)),
    "vgg11": (Architecture(name="vgg", params={"depth": 11}), 16, (30, 100)),
    "resnet18, stem": (Architecture(name="resnet18"), 16, (30, 100)),
}


def task(architecture: Architecture, batch: int, protocol: Protocol, target: str = "labels") -> Task:
    """Return a task on CIFAR-10 that grants everything a malicious server may do."""
    return Task.model_validate(
        {
            "dataset": "cifar10",
            "architecture": architecture,
            "batch": BatchSpec(size=batch),
            "protocol": protocol,
            "threat_model": SERVER,
            "target": target,
        }
    )


def fishing() -> None:
    """Print a line per net, mode of BatchNorm and number of clients."""
    print("net              BatchNorm  clients  exact  recall  rank  s/client  prepared in")
    for name, (net, batch, cohorts) in NETS.items():
        for mode in ("eval", "train"):
            for clients in cohorts:
                protocol = Protocol(clients=clients, secure_aggregation=True, batch_norm=mode)
                rows = leakbench.evaluate("bn_fishing", task(net, batch, protocol), trials=2)
                if set(rows.status) != {"ok"}:
                    sys.exit(rows.error[0])
                rank = json.loads(rows.notes[0])["rank"]
                print(
                    f"{name:16} {mode:9}  {clients:7d}  {rows.count_exact_match.mean():.3f}  "
                    f"{rows.instance_recall.mean():.4f}  {rank:4.0f}  {rows.client_seconds.mean() / clients:8.3f}"
                    f"  {rows.prepare_seconds.mean():8.1f} s",
                    flush=True,
                )


def imprint(batch: int = 64, trials: int = 20) -> None:
    """Print a line per number of bins."""
    print("bins  recovered  least  theory")
    for bins in (64, 250, 1000):
        of = task(Architecture(name="lenet5"), batch, Protocol(), "inputs")
        rows = leakbench.evaluate(f"robbing_the_fed(bins={bins})", of, trials=trials)
        theory = batch * (1 - 1 / bins) ** (batch - 1)
        found = batch * rows.recovered
        print(f"{bins:4d}  {found.mean():9.2f}  {found.min():5.0f}  {theory:6.1f}", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or ["fishing", "imprint"]:
        {"fishing": fishing, "imprint": imprint}[part]()

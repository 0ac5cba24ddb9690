"""The other side of bench_inversion.py: Inverting Gradients by `breaching`, trial by trial, in its own environment.

Needs breaching 0.1.2 and safetensors, and nothing of leakbench: the nets are `breaching`'s own. Reads one JSON request
a line from standard input and answers with one JSON line each on standard output:

- ``{"open": FILE, "net": NAME, "tv": WEIGHT, "device": NAME, "threads": N}`` loads weights, gradients, labels and start
  images (safetensors) and answers with the objective at every trial's start images.
- ``{"run": N, "trials": [first, last], "out": FILE or null}`` runs N iterations of each of these trials, answers with
  the seconds they took, and writes the images found.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its TorchScript is deprecated
    import breaching
    from breaching.cases.models.model_preparation import _construct_vision_model as breaching_net


def main() -> None:
    """Answer requests until standard input ends."""
    answers = sys.stdout
    side: Side | None = None
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):  # breaching prints
            if "open" in request:
                side = Side(request)
                answer: dict[str, Any] = {"objective": side.objectives()}
            else:
                assert side is not None
                answer = {"seconds": side.run(request["run"], *request["trials"], request["out"])}
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """One net and its trials, as `breaching`'s attacker wants them.

    Args:
        request: See the module.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        torch.set_num_threads(request["threads"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.device = torch.device(request["device"])
        tensors = {name: value.to(self.device) for name, value in load_file(request["open"]).items()}
        self.labels, self.starts = tensors["labels"], tensors["starts"]
        shape = tuple(self.starts.shape[2:])

        def ordered(kind: str) -> list[Tensor]:
            names = sorted((n for n in tensors if n.startswith(f"{kind}/")), key=lambda n: int(n.split("/")[1]))
            return [tensors[n] for n in names]

        self.gradients = ordered("gradient")
        data = SimpleNamespace(shape=shape, classes=request["classes"], name="CIFAR10")
        net = breaching_net(request["net"], data, pretrained=False)
        setup = {"device": self.device, "dtype": torch.float}
        config = breaching.get_attack_config(
            "invertinggradients",
            [f"regularization.total_variation.scale={request['tv']}", "optim.callback=1000000000"],
        )
        self.attacker = breaching.attacks.prepare_attack(net, torch.nn.CrossEntropyLoss(), config, setup)
        self.public = SimpleNamespace(shape=shape, modality="vision")
        self.payload = [{"parameters": ordered("parameter"), "buffers": ordered("buffer"), "metadata": self.public}]

    def shared(self, trial: int) -> list[dict[str, Any]]:
        """Return what the user of one trial shared."""
        metadata = {
            "num_data_points": self.labels.shape[1],
            "labels": self.labels[trial],
            "local_hyperparams": None,
            "data_key": "inputs",
        }
        return [{"gradients": [g[trial] for g in self.gradients], "buffers": None, "metadata": metadata}]

    def prepared(self, trial: int) -> Callable[[], Tensor]:
        """Return the attack on one trial, the models copied and loaded."""
        shared = self.shared(trial)
        models, labels, stats = self.attacker.prepare_attack(self.payload, shared)
        return lambda: self.attacker._run_trial(models, shared, labels, stats, 0, self.starts[trial])

    def objectives(self) -> list[float]:
        """Return distance plus total variation at the start images of every trial."""
        self.attacker.cfg.optim.max_iterations = 1
        values = []
        for trial in range(len(self.starts)):
            shared = self.shared(trial)
            models, labels, stats = self.attacker.prepare_attack(self.payload, shared)
            self.attacker._run_trial(models, shared, labels, stats, 0, self.starts[trial])
            values.append(float(stats["Trial_0_Val"][0]))
        return values

    def run(self, iterations: int, first: int, last: int, out: str | None) -> float:
        """Attack trials ``first`` to ``last`` (exclusive); return the seconds that the iterations took."""
        self.attacker.cfg.optim.max_iterations = iterations
        seconds, found = 0.0, []
        for trial in range(first, last):
            attack = self.prepared(trial)
            self._wait()
            start = time.perf_counter()
            found.append(attack())
            self._wait()
            seconds += time.perf_counter() - start
        if out:
            save_file({"images": torch.stack(found).cpu()}, out)
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()

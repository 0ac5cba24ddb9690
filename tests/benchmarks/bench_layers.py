"""Which way to inner products of gradients is faster, layer by layer: Gram matrices, or the gradient itself.

Run ``python tests/benchmarks/bench_layers.py`` (minutes): for every layer shape the times of both ways, and whether
`leakbench.federation.products` chose the faster one: the table its rule was made from. Exits with 1 where it chose one
that takes more than 1.5 times as long.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from common import CLASSES, NETS, SHAPE, keep_memory, timed
from torch import Tensor

from leakbench.federation import products
from leakbench.models.functional import build_model
from leakbench.models.taps import Tap, layer_of, tap


def main() -> int:
    """Parse, run and return the exit status."""
    parser = argparse.ArgumentParser(description="Both ways to products of gradients; see the file's head")
    parser.add_argument("--net", choices=sorted(NETS), action="append", help="only this net; may be repeated")
    parser.add_argument("--trials", type=int, help="T of a call, chosen by the layer's size otherwise")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way; the least counts")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return table(arguments)


def table(arguments: argparse.Namespace) -> int:
    """Print, per layer shape, both ways' times: Gram matrices, or the gradient itself."""
    print(f"load average {os.getloadavg()[0]:.1f}; ms per trial, forward and derivative, least of {arguments.repeats}")
    print(f"{'B':>2} {'T':>3} {'inputs':>14} {'outputs':>14} {'weights':>18} {'Gram':>8} {'gradient':>8}  chosen")
    passed = True
    for batch in (1, 8):
        for trials, passed_on, goal in _taps(arguments, batch):
            positions = batch * passed_on.at_outputs[0, 0, 0].numel()
            chosen = products.prefers_gram(goal, positions)
            ms = {}
            for gram in (True, False):
                if gram and positions**2 > 4 * goal[0].numel():  # two orders of magnitude slower, and huge
                    ms[gram] = float("inf")
                    continue
                with mock.patch.object(products, "prefers_gram", lambda *_, gram=gram: gram):
                    run = functools.partial(_derive, passed_on, goal)
                    ms[gram] = min(1e3 * timed(run) / trials for _ in range(arguments.repeats + 1))
            lost = ms[chosen] / min(ms.values())
            passed &= lost <= 1.5
            verdict = "the faster" if lost == 1 else f"the slower by {lost - 1:.0%}"
            shapes = (tuple(v.shape[2:]) for v in (passed_on.inputs, passed_on.at_outputs, goal[:, None]))
            print(
                f"{batch:2} {trials:3} {'{!s:>14} {!s:>14} {!s:>18}'.format(*shapes)} "
                f"{ms[True]:8.3f} {ms[False]:8.3f}  {'Gram' if chosen else 'gradient'}: {verdict}",
                flush=True,
            )
    return 0 if passed else 1


def _taps(arguments: argparse.Namespace, batch: int) -> Iterator[tuple[int, Tap, Tensor]]:
    """Yield trials, what passes a layer, and a target, for every shape of a layer in the nets."""
    seen = set()
    for net in arguments.net or NETS:
        model = build_model(NETS[net], SHAPE, CLASSES, seeds=[0])
        inputs = torch.rand(1, 1, *SHAPE, requires_grad=True)
        names = [name for name, value in model.parameters.items() if value[0].dim() > 1]
        taps, _ = tap(model, inputs, lambda z: z.sum((1, 2)), names, create_graph=False)
        for name in names:
            one = taps[layer_of(name)]
            shapes = (*one.inputs.shape, *one.at_outputs.shape, *model.parameters[name].shape)
            trials = arguments.trials or max(
                2, min(64, 2**22 // (batch * one.inputs.numel() + one.layer.weight.numel()))
            )
            if shapes not in seen:
                seen.add(shapes)
                x, d = (
                    torch.randn(trials, batch, *v.shape[2:], requires_grad=True) for v in (one.inputs, one.at_outputs)
                )
                yield trials, Tap(one.layer, x, d), torch.randn(trials, *model.parameters[name].shape[1:])


def _derive(passed: Tap, goal: Tensor) -> None:
    dot, square = products.products_of(passed, "weight", goal)
    torch.autograd.grad((dot + square).sum(), [passed.inputs, passed.at_outputs])


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())

"""Small nets that fitted measures train: an MLP, and a convolution over the weight gradients of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

EPOCHS, PATIENCE, ROWS, RATE, DECAY = 100, 10, 64, 1e-3, 1e-4
"""Most epochs, epochs without progress on the validation rows, rows of a step, and Adam's step and weight decay."""


def mlp(inputs: int, outputs: int = 1) -> nn.Module:
    """Return a net of two hidden layers, 256 and 64."""
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, outputs)
    )


class ConvOnGradients(nn.Module):
    """One kernel set per layer, as wide as the layer's matrix and sliding over its output units; then an MLP.

    After Nasr et al.: 100 kernels of size (1, fan-in) on a fully connected layer's gradient. Here it is 32 kernels on
    matrices of at most 4,096 numbers, and 64 hidden units, in proportion to a few hundred examples.

    Args:
        shapes: (outputs, inputs) of each layer's matrix.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.components = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(32 * outputs, 64), nn.ReLU()
            )
            for outputs, inputs in shapes
        )
        self.head = nn.Linear(64 * len(shapes), 1)

    def forward(self, *matrices: Tensor) -> Tensor:
        """Return log-odds (n, 1) from one (n, outputs, inputs) per layer."""
        encoded = [component(own) for component, own in zip(self.components, matrices, strict=True)]
        return self.head(torch.cat(encoded, 1))  # type: ignore[no-any-return]


def trained(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Tensor,
    fit: int,
) -> Tensor:
    """Train a net on the first ``fit`` rows, stop by the others that have targets, and return its outputs on all rows.

    Own training rather than scikit-learn's, which stops by accuracy on a part of the training rows and knows one input.

    Args:
        build: Makes the net; draws from PyTorch's stream, which is seeded here.
        loss: Of outputs and targets.
        inputs: (n, ...) each, float32.
        targets: (rows with targets, ...), the first of the n rows.
        fit: Rows to train on.
    """
    known = len(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build()
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE, weight_decay=DECAY)
        best, state, waited = float("inf"), deepcopy(net.state_dict()), 0
        for _ in range(EPOCHS):
            net.train()
            for rows in torch.randperm(fit).split(ROWS):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                loss(net(*(own[rows] for own in inputs)), targets[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            net.eval()
            with torch.no_grad():
                now = float(loss(net(*(own[fit:known] for own in inputs)), targets[fit:]))
            waited += 1
            if now < best:
                best, state, waited = now, deepcopy(net.state_dict()), 0
            if waited >= PATIENCE:
                break
        net.load_state_dict(state)
        net.eval()
        with torch.no_grad():
            return net(*inputs)  # type: ignore[no-any-return]

"""Singular values of the Jacobian by layer: how fast, in how many directions and how recoverably an update changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from leakbench.measures.jacobian import Jacobian, by_trial, ratio
from leakbench.measures.lanczos import lanczos, nodes
from leakbench.measures.sensitivity import units
from leakbench.measures.subject import ALL, Profile, Subject

_COLUMNS = 2**26
_GRAM = 2**24
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of J^T J as a distribution: sums of f(s^2) over all d are sum(weights * f(values)).

    Args:
        values: (T, k) squares of singular values, at least 0.
        weights: (T, k), how many each stands for; they sum to d.
        cosine: (T,) greatest eigenvalue of J^T (I - g g^T / ||g||^2) J.
    """

    values: Tensor
    weights: Tensor
    cosine: Tensor


def spectrum(
    subject: Subject,
    *,
    exact: int = 1024,
    iterations: int = 32,
    probes: int = 2,
    prior: float = 0.25,
    noise: float = 1e-3,
) -> dict[str, Profile]:
    """Return what the singular values s_i of every layer's Jacobian and of the whole one say.

    Up to ``exact`` pixels, eigenvalues of J^T J itself, from one product with every unit vector. Beyond, stochastic
    Lanczos quadrature (Ubaru, Chen, Saad 2017, SIAM J. Matrix Anal. Appl. 38:1075): ``probes`` random starts of
    ``iterations`` steps for every layer. Greatest values are then nearly exact, information and effective ranks are
    estimates, and of small values so few steps see little: numerical ranks are rough.

    Args:
        subject: Whose clients.
        exact: Pixels of a trial up to which nothing is estimated.
        iterations: Lanczos steps.
        probes: Random starts.
        prior: Standard deviation of a pixel before anything is seen, in intensities.
        noise: Standard deviation of the reference noise, in root mean squares of the whole update.
    """
    size = subject.images[0].numel()
    spectra = _exact if size <= exact else partial(_estimated, iterations=iterations, probes=probes)
    compute = partial(_quantities, spectra=spectra, prior=prior, noise=noise)
    found = by_trial(subject, compute, trials_of_grams(subject) if size <= exact else None)
    return {name: Profile((*subject.layers, ALL), value) for name, value in found.items()}


def _quantities(
    jacobian: Jacobian, spectra: Callable[[Jacobian], Iterator[tuple[str, Spectrum]]], prior: float, noise: float
) -> dict[str, Tensor]:
    every = torch.cat(list(jacobian.update.values()), 1).double()
    signal = ratio(torch.full_like(every[:, 0], prior), noise * every.square().mean(1).sqrt()).square()[:, None]
    columns = {layer: _numbers(jacobian, layer, s, signal) for layer, s in spectra(jacobian)}
    return {name: torch.stack([columns[k][name] for k in (*jacobian.layers, ALL)], 1) for name in columns[ALL]}


def _numbers(jacobian: Jacobian, layer: str, found: Spectrum, signal: Tensor) -> dict[str, Tensor]:
    """Return (T,) per quantity; ``signal`` (T, 1) is the squared ratio of prior to noise, 0 where nothing is sent."""
    values, weights = found.values, found.weights
    top = values.max(1, keepdim=True).values
    share = ratio(values, (weights * values).sum(1, keepdim=True))
    entropy = -(weights * torch.special.xlogy(share, share)).sum(1)
    known = signal * values
    return {
        "spectral_norm": top[:, 0].sqrt(),
        "effective_rank": torch.where(top[:, 0] > 0, entropy.exp(), 0),
        "numerical_rank": (weights * (values > _TOLERANCE**2 * top)).sum(1) / jacobian.size,
        "lavp_l2": 2 * top[:, 0],
        "lavp_cosine": ratio(found.cosine, _square(jacobian, layer)),
        "gaussian_information": (weights * known.log1p()).sum(1) / (2 * math.log(2)),
        "recoverable_fraction": 1 - (weights / (1 + known)).sum(1) / jacobian.size,
    }


def _square(jacobian: Jacobian, layer: str) -> Tensor:
    """Return ||g_l||^2, (T,) float64."""
    wanted = jacobian.layers if layer == ALL else (layer,)
    return torch.stack([jacobian.update[k].double().square().sum(1) for k in wanted]).sum(0)


def _along(jacobian: Jacobian, layer: str) -> Tensor:
    """Return J_l^T g_l / ||g_l||, (T, d) float64: what the cosine does not see."""
    wanted = jacobian.layers if layer == ALL else (layer,)
    pulled = jacobian.vjp({k: jacobian.update[k] for k in wanted}).double().flatten(1)
    return ratio(pulled, _square(jacobian, layer).sqrt()[:, None])


def _exact(jacobian: Jacobian) -> Iterator[tuple[str, Spectrum]]:
    whole: Tensor | None = None
    for layer, gram in grams(jacobian):
        whole = gram if whole is None else whole + gram
        yield layer, _of_gram(jacobian, layer, gram)
    assert whole is not None  # noqa: S101 - every model has a layer
    yield ALL, _of_gram(jacobian, ALL, whole)


def _of_gram(jacobian: Jacobian, layer: str, gram: Tensor) -> Spectrum:
    along = _along(jacobian, layer)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    cosine = torch.linalg.eigvalsh(gram - along[:, :, None] * along[:, None])[:, -1].clamp_min(0)
    return Spectrum(values, torch.ones_like(values), cosine)


def grams(jacobian: Jacobian) -> Iterator[tuple[str, Tensor]]:
    """Yield every layer and its J_l^T J_l, (T, d, d) float64, from input to output.

    Columns of J are kept for so many of its rows at once as fit into the memory, a number that shapes alone decide;
    every such block takes d products, which all its layers share.
    """
    gram: Tensor | None = None
    for pieces in _blocks(jacobian.sizes, max(1, _COLUMNS // (jacobian.trials * jacobian.size))):
        kept = [jacobian.images.new_empty(jacobian.trials, jacobian.size, rows.stop - rows.start) for _, rows in pieces]
        for i, unit in enumerate(units(jacobian)):
            pushed = jacobian.jvp(unit, [layer for layer, _ in pieces])
            for columns, (layer, rows) in zip(kept, pieces, strict=True):
                columns[:, i] = pushed[layer][:, rows]
        for (layer, rows), part in zip(pieces, kept, strict=True):
            columns = part.double()
            own = columns @ columns.mT
            gram = own if rows.start == 0 or gram is None else gram + own
            if rows.stop == jacobian.sizes[layer]:
                yield layer, gram


def trials_of_grams(subject: Subject) -> int:
    """Return how many trials `grams` takes at once: more would only mean more blocks."""
    size = subject.images[0].numel()
    rows = sum(value[0].numel() for value in subject.model.parameters.values())
    return max(1, min(_GRAM // size**2, _COLUMNS // (size * rows)))


def _blocks(sizes: dict[str, int], rows: int) -> Iterator[list[tuple[str, slice]]]:
    """Cut the rows of all layers, one after the other, into blocks of ``rows``; yield the pieces of each."""
    block: list[tuple[str, slice]] = []
    room = rows
    for layer, size in sizes.items():
        first = 0
        while first < size:
            last = min(size, first + room)
            block.append((layer, slice(first, last)))
            room -= last - first
            first = last
            if room == 0:
                yield block
                block, room = [], rows
    if block:
        yield block


def _estimated(jacobian: Jacobian, iterations: int, probes: int) -> Iterator[tuple[str, Spectrum]]:
    steps = min(iterations, jacobian.size)
    for layer in (*jacobian.layers, ALL):
        random, along = jacobian.random("spectrum"), _along(jacobian, layer)

        def gram(vector: Tensor, layer: str = layer) -> Tensor:
            return jacobian.gram(vector.view(jacobian.images.shape), layer).double().flatten(1)

        def deflated(vector: Tensor, along: Tensor = along, gram: Callable[[Tensor], Tensor] = gram) -> Tensor:
            return gram(vector) - along * (along * vector).sum(1, keepdim=True)

        starts = [2 * random.randint(2, jacobian.size).double() - 1 for _ in range(probes)]
        found = [nodes(*lanczos(gram, start, steps)) for start in starts]
        values = torch.cat([v for v, _ in found], 1).clamp_min(0)
        weights = torch.cat([w for _, w in found], 1) * jacobian.size / probes
        cosine = nodes(*lanczos(deflated, starts[0], steps))[0].max(1).values.clamp_min(0)
        yield layer, Spectrum(values, weights, cosine)


def top(jacobian: Jacobian, iterations: int = 32) -> Tensor:
    """Return s_1 of the whole Jacobian, (T,) float64, by Lanczos.

    Args:
        jacobian: Whose.
        iterations: Steps; a product with J and one with its transpose each.
    """

    def gram(vector: Tensor) -> Tensor:
        return jacobian.gram(vector.view(jacobian.images.shape)).double().flatten(1)

    start = jacobian.random("top").randn(jacobian.size).double()
    return nodes(*lanczos(gram, start, min(iterations, jacobian.size)))[0].max(1).values.clamp_min(0).sqrt()

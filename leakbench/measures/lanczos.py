"""Krylov methods for symmetric operators of T trials at once, which act on vectors (T, d) in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A (d, d) symmetric matrix per trial: (T, d) to (T, d)."""

_NOTHING_LEFT = 1e-6


def lanczos(operator: Operator, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the diagonal (T, m) and off-diagonal (T, m - 1) that an operator has in the Krylov basis of ``start``.

    Every vector is orthogonalised against all before it, twice, so that no eigenvalue shows up again. A trial whose
    space is exhausted goes on with zeros, which have no weight in `nodes`.

    Args:
        operator: What is applied.
        start: (T, d), none of them zero.
        iterations: m, at most d.
    """
    vector = start / start.norm(dim=1, keepdim=True)
    basis = vector.new_zeros(len(vector), iterations, vector.shape[1])
    diagonal, beside = vector.new_zeros(len(vector), iterations), vector.new_zeros(len(vector), iterations)
    scale = torch.zeros_like(vector[:, :1])
    for i in range(iterations):
        basis[:, i] = vector
        image = operator(vector)
        diagonal[:, i] = (image * vector).sum(1)
        scale = torch.maximum(scale, image.norm(dim=1, keepdim=True))
        for _ in range(2):
            image = image - torch.einsum("tmd,tm->td", basis, torch.einsum("tmd,td->tm", basis, image))
        norm = image.norm(dim=1, keepdim=True)
        goes_on = norm > _NOTHING_LEFT * scale
        beside[:, i] = torch.where(goes_on, norm, 0)[:, 0]
        vector = torch.where(goes_on, image / torch.where(goes_on, norm, 1), 0)
    return diagonal, beside[:, :-1]


def nodes(diagonal: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nodes and weights (T, m) of Gauss quadrature over the spectrum that a Krylov space has seen.

    The weights of a trial sum to 1; the nodes approach eigenvalues, the outermost first.
    """
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[:, 0].square()


def conjugate_gradients(operator: Operator, target: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Return x (T, d) with A x = ``target`` for positive definite operators A (Hestenes, Stiefel 1952).

    Args:
        operator: A.
        target: (T, d).
        iterations: At most so many applications.
        tolerance: Residual, relative to the target, at which a trial is done; it changes no more then.
    """
    x, residual = torch.zeros_like(target), target
    direction, square = residual, residual.square().sum(1, keepdim=True)
    enough = tolerance**2 * square
    for _ in range(iterations):
        active = square > enough
        if not active.any():
            break
        image = operator(direction)
        along = (direction * image).sum(1, keepdim=True)
        step = torch.where(active & (along > 0), square / torch.where(along > 0, along, 1), 0)
        x, residual = x + step * direction, residual - step * image
        after = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(active, after / torch.where(active, square, 1), 0) * direction
        square = torch.where(active, after, square)
    return x

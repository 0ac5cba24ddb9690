"""Revealing labels from gradients: which classes stand apart in the row space of the last layer's gradient."""

from __future__ import annotations

import numpy as np
import torch
from leakbench_baselines.attacks.llg import head_rows
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from leakbench import Attack, Observation, Recovery, register

SLACK = 1e-2
"""How far below 0 the entries of other classes may reach, where the class's own is -1 (released code)."""
APART = 1e-2
"""Distance from the combinations of the other classes beyond which a class stands apart."""


def class_columns(rows: Tensor, total: int) -> Tensor:
    """Return each class's coordinates (T, r, C) in the gradient's leading right singular vectors.

    Args:
        rows: (T, C, d) weight gradient.
        total: Number of examples N; min(N, numerical rank) coordinates are kept, the rest is 0.
    """
    peak = rows.double().abs().amax((1, 2), keepdim=True)
    matrix = (rows / peak.where(peak > 0, 1)).mT
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    # The rank is the update's own: below its rounding there is nothing that a wider type could show.
    floor = values[:, :1] * max(matrix.shape[1:]) * torch.finfo(rows.dtype).eps
    kept = (values > floor) & (torch.arange(values.shape[1], device=rows.device) < total)
    scale = torch.where(kept, 1 / values.where(kept, 1), 0)
    # Equal to the singular vectors, but where a class's column is tiny (saturated softmax) its direction stays exact.
    columns: Tensor = scale[..., None] * (left.mT @ matrix)
    return columns


def certificates(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Decide most classes from the projector P onto the row space alone.

    A class c is certain to stand apart where the direction -q_c already separates it: P_jc <= 0 for all j != c. It is
    certain not to where some v > 0 with v_c = 0 has sum_j v_j q_j = 0, as the others then span all directions with
    positive weights; tried is the v from projecting the all-ones vector, in an undefended gradient's null space.

    Args:
        columns: (T, r, C) with orthonormal rows, or rows of zeros.

    Returns:
        Two (T, C) masks: stands apart, does not. A class may be in neither.
    """
    projector = columns.mT @ columns
    own = projector.diagonal(dim1=1, dim2=2)
    itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
    apart = ((projector <= SLACK * own[:, None]) | itself).all(1) & (own > APART**2)
    ones = 1 - projector.sum(1)
    weights = ones[:, :, None] * (1 - own)[:, None] + ones[:, None] * projector
    spanned = ((weights > SLACK) | itself).all(1) & (own < 1 - SLACK)
    return apart, (spanned & ~apart) | (own <= APART**2)


def stands_apart(columns: NDArray[np.float64], label: int) -> bool:
    """Whether the column of ``label`` is further than APART from the cone of the others; columns (k, C).

    By Farkas' lemma outside of the cone means that some x has q_label.x < 0 <= q_j.x for all others j, which
    non-negative least squares decides in a fraction of the time of a linear program in x. The price on multipliers
    keeps rounding from passing for a combination, and is such that the residual x has q_j.x >= SLACK * q_label.x.
    """
    others = np.delete(columns, label, axis=1)
    price = SLACK * APART * np.eye(others.shape[1])
    target = np.concatenate([columns[:, label], np.zeros(len(price))])
    return bool(nnls(np.vstack([others, price]), target, maxiter=30 * columns.shape[1])[1] > APART)


@register("rlg", version=1)
class RLG(Attack):
    """RLG: the set of classes that a hyperplane separates from all others in the gradient's row space.

    The weight gradient is a product of features and of softmax errors, so its row space is that of the errors while
    examples are fewer than features and classes. There, a class in the batch is the only negative entry of some error,
    hence separable from all others by a hyperplane through 0. Any activation, trained or not; repeats are not counted.
    It collapses where examples reach the width of the last layer or most classes are present.

    Sees: gradient of the last layer's weight, or its change over local steps; number of inputs behind the update.

    Differs from the released code: a perceptron that filters classes first, by a score that hardly any of 100 classes
    can fail, is left out; the released criterion of acceptance (own entry -1, others above -0.01) is decided by
    certificates and non-negative least squares in place of a solver's answer, and without a class limit.

    Reference: Dang, Thakkar, Ramaswamy, Mathews, Chin, Beaufays, "Revealing and Protecting Labels in Distributed
    Training", NeurIPS 2021, arXiv 2111.00556
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "weights"})
    reads = ("head.weight",)

    def run(self, observation: Observation) -> Recovery:
        """Return label counts (T, 1, C), none above 1."""
        columns = class_columns(head_rows(observation), observation.total_inputs)
        apart, not_apart = certificates(columns)
        values = columns.cpu().numpy()
        # An active-set method changes its size at every step and has no batched form; few classes get here.
        for trial, label in (~(apart | not_apart)).nonzero().tolist():
            apart[trial, label] = stands_apart(values[trial], label)
        return Recovery(label_counts=apart.long()[:, None])

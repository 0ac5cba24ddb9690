"""Instance-wise label restoration: counts from a linear system, solved for all trials at once."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.bias_count import round_to_total
from torch import Tensor

from leakbench import Attack, Observation, Recovery, register

DECADES = 10
"""Most decades by which an entry of a class embedding differs from 1 (released code)."""
NO_BIAS = 1e-64
"""What stands for a bias gradient of 0 (released code)."""
CONDITION = 1e6
"""Condition number up to which elimination is as good as the pseudo-inverse to 1e-8."""


def class_embeddings(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the classes' mean features (T, C, d): weight gradient (T, C, d) over bias gradient (T, C), guarded."""
    bias = torch.where(bias == 0, NO_BIAS, bias)[..., None]
    ratio = weight / bias
    if bool((ratio.abs() < 10.0 ** (DECADES - 1)).all()):  # logarithms cost more than the rest
        return ratio
    decades = weight.abs().log10().floor() - bias.abs().log10().floor()
    return ratio * 10 ** -(decades - DECADES).clamp(min=0)


def solve_counts(probabilities: Tensor, bias: Tensor, total: int) -> Tensor:
    """Solve iLRG's C + 1 equations for real counts (T, C), in the least-squares sense and of least norm.

    The equations are sum_j n_j = N and sum_j n_j p_j[i] - n_i = N db_i for each class i. As every p_j sums to 1, the
    equations of the classes sum to 0 on the left; adding u_i = 1 / sqrt(C) times the first one to each therefore is an
    isometry away from the original system, and leaves a square one with the same singular values and pseudo-inverse
    solution.

    Args:
        probabilities: (T, C, C) softmax p_j of class j's examples, classes j along dimension 1.
        bias: (T, C) mean bias gradient db.
        total: Number of labels N.
    """
    classes = bias.shape[1]
    unit = classes**-0.5
    matrix = probabilities.mT - torch.eye(classes, dtype=bias.dtype, device=bias.device) + unit
    values = total * (bias - bias.mean(1, keepdim=True) + unit)
    inverse, info = torch.linalg.inv_ex(matrix)
    condition = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1)
    poor = (info != 0) | ~(condition < CONDITION)
    if bool(poor.any()):
        inverse[poor] = torch.linalg.pinv(matrix[poor])
    solution: Tensor = inverse @ values[..., None]
    return solution[..., 0]


@register("ilrg", version=1)
class ILRG(Attack):
    """iLRG: label counts from the class embeddings dW_i / db_i and a linear system in the bias gradient.

    A class's row of the weight gradient over its bias gradient is close to the mean feature of its examples; running
    the last layer on that gives the softmax p_i its examples have, and the bias gradient is the mean of p - one-hot
    label, hence linear in the counts. Works for any activation; best on untrained nets.

    Sees: gradient of the last layer's weight and bias; weights, batch size, local steps, learning rate.

    Computes in float64 where the released code goes through seven printed digits and float32, and solves a square
    system with the same pseudo-inverse solution. `repair` does what the released code means to: there, a deficit is
    added to almost all classes (a negative slice), and its figures are of the unrepaired counts.

    Args:
        repair: Whether to rescale and round the counts so that they sum to the number of labels; else each is rounded
            alone and one beyond that number becomes 0.

    Reference: Ma, Sun, Cui, Li, Guan, Liu, "Instance-wise Batch Label Restoration via Gradients in Federated Learning",
    ICLR 2023, openreview FIrQfNSOoTr
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "head_bias", "local_steps", "lr", "weights"})
    reads = ("head.weight", "head.bias")

    def __init__(self, *, repair: bool = False) -> None:
        self.repair = repair

    def run(self, observation: Observation) -> Recovery:
        """Solve for label counts (T, 1, C) and round them."""
        parameters, head = observation.model.parameters, observation.model.head
        weight, bias = observation.mean_head_weight.double(), observation.mean_head_bias.double()
        embeddings = class_embeddings(weight, bias)
        logits = embeddings @ parameters[f"{head}.weight"].double().mT + parameters[f"{head}.bias"].double()[:, None]
        total = observation.total_inputs
        solution = solve_counts(logits.softmax(-1).nan_to_num(), bias, total).nan_to_num()
        if self.repair:
            counts = round_to_total(solution, total)
        else:
            counts = solution.clamp(min=0).round()
            counts = torch.where(counts <= total, counts, 0).long()
        return Recovery(label_counts=counts[:, None])

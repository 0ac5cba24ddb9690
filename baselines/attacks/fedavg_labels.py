"""Label counts of federated averaging, from the model's behavior on noise before and after the local steps."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.zlg import estimated_counts, mean_behavior, noise
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register


@register("fedavg_labels", version=1)
class FedAvgLabels(Attack):
    """FedAvg labels: ZLG's counts for every local step, with statistics interpolated between its first and last model.

    Mean probabilities p and feature sums O on standard normal noise are measured on the model that was sent out and on
    the model that came back. Those of step j of s lie j/s of the way; the counts N (p - dW / O) are averaged over steps
    and rounded to the total N. One step is ZLG.

    Sees: the whole update; weights, batch size, local steps, learning rate.

    Differs from the released code in the rounding of negative counts: they become 0 and the rest is rescaled to N;
    there the surplus is taken off the counts of least remainder, one each.

    Args:
        samples: Noise inputs for each of the two models, at least.

    Reference: Dimitrov, Balunović, Konstantinov, Vechev, "Data Leakage in Federated Averaging", TMLR 2022,
    arXiv 2206.12395
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "local_steps", "lr", "nonnegative_features", "weights"})
    reads = ("*",)

    def __init__(self, *, samples: int = 3000) -> None:
        if samples < 1:
            raise UserError(f"fedavg_labels: samples: expected at least 1, got {samples}; write samples=3000")
        self.samples = samples

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure ``confidence`` (M, C) and ``mass`` (M, 1) of the model that is sent out."""
        behavior: dict[str, Tensor] = mean_behavior(knowledge, noise(knowledge, self.samples))
        return behavior

    def run(self, observation: Observation) -> Recovery:
        """Estimate and round label counts (T, 1, C)."""
        steps = observation.local_steps
        confidence, mass = (observation.prepared[name] for name in ("confidence", "mass"))
        if steps > 1:  # the model that comes back belongs to no step itself
            start = observation.model.parameters
            returned = {name: start[name] - observation.lr * g for name, g in observation.gradient.items()}
            end = mean_behavior(observation, noise(observation, self.samples), parameters=returned)
            along = torch.arange(steps, dtype=mass.dtype, device=mass.device) / steps
            mass = mass + along * (end["mass"].nan_to_num(0.0) - mass)
            confidence = confidence + along.mean() * (end["confidence"].nan_to_num(0.0) - confidence)
        counts = estimated_counts(observation, confidence, (1 / mass).mean(1, keepdim=True))
        return Recovery(label_counts=counts[:, None])

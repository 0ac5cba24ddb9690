"""Label Leakage from Bias Gradients, with confidences measured on auxiliary data."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.llbg import counts_from_bias
from leakbench_baselines.attacks.llg_star import piece_size
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, Observation, Recovery, register

SUREST = 0.999


@register("llbg_aux", version=1)
class LLBGAux(Attack):
    """LLBG with each class's own confidence, for trained models.

    `prepare` measures the mean confidence of the correct class on auxiliary examples of that class, by which one
    occurrence of the class is counted; a class without examples gets the mean of the others. Otherwise `llbg`.

    Sees: gradient of the last layer's bias, or its change over local steps; number of inputs behind the update,
    weights, learning rate, local steps, auxiliary labelled data.

    Differs from the released code where the model is surer than 0.999, which would leave almost no step per occurrence:
    that counts as 0.999.

    Reference: Gat, Sharif, "Harmful Bias: A General Label-Leakage Attack on Federated Learning from Bias Gradients",
    AISec 2024 (github.com/nadbag98/LLBG), after the greedy rule of Wainakh et al., PoPETs 2022, arXiv 2105.09369
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"auxiliary", "batch_size", "head_bias", "local_steps", "lr", "weights"})
    reads = ("head.bias",)

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Measure ``confidence`` (M, C)."""
        inputs, labels = knowledge.auxiliary
        draws = knowledge.model.draws
        sure = []
        size = piece_size(knowledge)
        for x, y in zip(torch.split(inputs, size), torch.split(labels, size), strict=True):
            p = knowledge.forward(x.expand(draws, *x.shape))[0].double().softmax(-1)
            sure.append(p.gather(2, y.expand(draws, -1)[:, :, None])[:, :, 0])
        members = F.one_hot(labels, knowledge.num_classes).double()
        owned = members.sum(0)
        mean = torch.cat(sure, 1) @ members / owned.clamp(min=1)
        others = mean.sum(1, keepdim=True) / (owned > 0).sum()
        return {"confidence": torch.where(owned > 0, mean, others).clamp(max=SUREST)}

    def run(self, observation: Observation) -> Recovery:
        """Extract label counts (T, 1, C)."""
        g = observation.mean_head_bias
        total = observation.total_inputs
        confidence = observation.prepared["confidence"]
        counts = counts_from_bias(g, confidence.expand(len(g), -1), total)
        return Recovery(label_counts=counts[:, None])

"""DLM's second defense: the smallest transmitted weights become zero."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from leakbench_baselines.defenses.clip_l2 import direction_fit, moved
from leakbench_baselines.defenses.weight_noise import defended_update, weights_sent
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


@register("weight_sparsify", version=1)
class WeightSparsify(Defense):
    """Weight sparsification: of every tensor of the weights that are sent, the smallest fraction is set to zero.

    Entries below the quantile of the tensor's magnitudes are zeroed. The released script sweeps 0 to 9 percent where
    its files are named 0 to 90; here the fraction is explicit.

    The authors' code does the same to the weights before local training, as an eavesdropper sees them. A server knows
    what it sent, so with ``both_ways`` the protection is overstated for any adversary but a third party.

    Acts on: the update; with ``both_ways`` also what an adversary sees of the model that was sent out.

    Args:
        p: Fraction that is zeroed.
        both_ways: Whether the model that was sent out is shown sparsified too.

    Reference: Zhao, Luo, Ding, "Deep Leakage from Model in Federated Learning", CPAL 2024, arXiv 2206.04887
    """

    acts_on = frozenset({"update", "broadcast"})
    strength = ("p", "higher")
    neutral = MappingProxyType({"p": 0.0})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels", "dlm", "dlm_plus")

    def __init__(self, *, p: float = 0.5, both_ways: bool = False) -> None:
        if not 0 <= p < 1:
            raise UserError(f"weight_sparsify: p: expected 0 <= p < 1 (the fraction that is zeroed), got {p}")
        self.p = p
        self.both_ways = both_ways

    @property
    def tensorwise(self) -> bool:
        """Always: magnitudes are ranked within each tensor."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Zero the smallest weights after local training."""
        sent: dict[str, Tensor] = defended_update(update, self._sparse(weights_sent(update, ctx)), ctx)
        return sent

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): how well the directions of what changed agree where weights were kept."""
        seen, found = moved(sent, ctx), moved({name: clean[name] for name in sent}, ctx)
        unit = ctx.lr if ctx.sends == "gradient" else 1.0
        start = (ctx.received or ctx.model).parameters
        kept = {}
        for name, value in seen.items():
            size = (start[name] - unit * value).abs().flatten(1)
            # A weight of zero comes out of the update with rounding errors.
            shown = size > 1e-5 * start[name].abs().flatten(1).amax(1, keepdim=True)
            kept[name] = shown.view_as(value)
        score: Tensor = direction_fit(
            {name: value * kept[name] for name, value in seen.items()},
            {name: value * kept[name] for name, value in found.items()},
        )
        return score

    def broadcast(self, weights: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Zero the smallest weights before local training, as far as an adversary sees them."""
        return self._sparse(weights) if self.both_ways else weights

    def _sparse(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._large(value) for name, value in weights.items()}

    def _large(self, value: Tensor) -> Tensor:
        size = value.abs().flatten(1)
        # sort, not torch.quantile: that refuses more than 16 million entries
        place = self.p * (size.shape[1] - 1)
        ordered = torch.sort(size, dim=1).values
        low, high = ordered[:, int(place)], ordered[:, min(int(place) + 1, size.shape[1] - 1)]
        least = torch.lerp(low, high, place - int(place))
        return value * (size >= least[:, None]).reshape(value.shape)

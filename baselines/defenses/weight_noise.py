"""DLM's first defense: noise on the transmitted weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register


def weights_sent(update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
    """Return the weights (T, *shape) after local training; a gradient stands for one step at the learning rate."""
    now = {name: ctx.model.parameters[name].expand_as(value) for name, value in update.items()}
    return now if ctx.sends != "gradient" else {name: now[name] - ctx.lr * value for name, value in update.items()}


def defended_update(update: dict[str, Tensor], defended: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
    """Return what is sent when `weights_sent` become ``defended``, in the units of ``update``."""
    if ctx.sends == "weights":
        return defended
    after, unit = weights_sent(update, ctx), ctx.lr if ctx.sends == "gradient" else 1.0
    return {name: value + (after[name] - defended[name]) / unit for name, value in update.items()}


@register("weight_noise", version=1)
class WeightNoise(Defense):
    """Weight noise: adds noise to the weights that a client sends, in proportion to how far they exceed a threshold.

    For a tensor p the code divides by c = max(1, ||p|| / threshold), adds noise and multiplies by c again, which is
    p + c * noise: no norm is bounded and nobody accounts for the draws, so no differential privacy follows. ||p|| is
    the largest norm over the second dimension (of a vector: its norm), as in the code.

    The authors' code puts noise on the weights before local training too, as an eavesdropper sees them. A server knows
    what it sent, so with ``both_ways`` the protection is overstated for any adversary but a third party.

    Acts on: the update; with ``both_ways`` also what an adversary sees of the model that was sent out.

    Args:
        scale: b, the standard deviation of Gaussian noise or the scale of Laplace noise.
        distribution: ``gaussian`` or ``laplace``.
        threshold: Norm above which the noise grows; the code's.
        both_ways: Whether the model that was sent out is shown with noise of its own too.

    Reference: Zhao, Luo, Ding, "Deep Leakage from Model in Federated Learning", CPAL 2024, arXiv 2206.04887
    """

    acts_on = frozenset({"update", "broadcast"})
    strength = ("scale", "higher")
    neutral = MappingProxyType({"scale": 0.0})
    draws = "noise on every weight"
    likelihood = "density"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels", "dlm", "dlm_plus")

    def __init__(
        self,
        *,
        scale: float = 1e-3,
        distribution: str = "gaussian",
        threshold: float = 0.2,
        both_ways: bool = False,
    ) -> None:
        if scale < 0 or threshold <= 0:
            raise UserError(f"weight_noise: expected scale >= 0 and threshold > 0, got {scale} and {threshold}")
        if distribution not in ("gaussian", "laplace"):
            raise UserError(f"weight_noise: distribution: expected 'gaussian' or 'laplace', got {distribution!r}")
        self.scale = scale
        self.distribution = distribution
        self.threshold = threshold
        self.both_ways = both_ways

    @property
    def tensorwise(self) -> bool:
        """Always: no tensor's noise depends on another tensor."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Add the noise to the weights after local training."""
        return defended_update(update, self._noised(weights_sent(update, ctx), ctx), ctx)

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return the log-density (T,) of ``sent`` given ``clean``, over the tensors of ``sent``.

        Raises:
            UserError: ``scale`` is 0, where there is no density.
        """
        if self.scale == 0:
            raise UserError("weight_noise: without noise there is no likelihood; write weight_noise(scale=0.001)")
        unit = ctx.lr if ctx.sends == "gradient" else 1.0
        weights = weights_sent({name: clean[name] for name in sent}, ctx)
        each = []
        for name, value in sent.items():
            scale = self.scale / unit * self._excess(weights[name])
            z = (value - clean[name]) / scale
            if self.distribution == "gaussian":
                log_density = -z.square() / 2 - scale.log() - math.log(2 * math.pi) / 2
            else:
                log_density = -z.abs() - scale.log() - math.log(2)
            each.append(log_density.flatten(1).sum(1))
        return torch.stack(each).sum(0)

    def broadcast(self, weights: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Add noise to the weights before local training, as far as an adversary sees them."""
        return self._noised(weights, ctx) if self.both_ways else weights

    def _noised(self, weights: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        return {name: value + self._excess(value) * self._draw(name, value, ctx) for name, value in weights.items()}

    def _excess(self, value: Tensor) -> Tensor:
        """Return c, broadcastable to ``value`` (T, *shape)."""
        norms = torch.linalg.vector_norm(value, dim=min(2, value.dim() - 1), keepdim=True).flatten(1)
        excess: Tensor = (norms.amax(1) / (self.threshold + 1e-6)).clamp(min=1)
        return excess.view(-1, *(1,) * (value.dim() - 1))

    def _draw(self, name: str, value: Tensor, ctx: DefenseContext) -> Tensor:
        random, shape = ctx.random.at(name), value.shape[1:]
        if self.distribution == "gaussian":
            return self.scale * random.randn(*shape).to(value.dtype)
        centered = random.rand(*shape).to(value.dtype) - 0.5
        size: Tensor = -(1 - 2 * centered.abs()).clamp(min=1e-12).log()
        noise: Tensor = self.scale * centered.sign() * size
        return noise

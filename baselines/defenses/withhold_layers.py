"""Keeping some layers' part of the update back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from leakbench_baselines.defenses.clip_l2 import direction_fit, moved
from torch import Tensor

from leakbench import Defense, DefenseContext, Model, UserError, register


@register("withhold_layers", version=1)
class WithholdLayers(Defense):
    """Withheld layers: nothing is sent of some layers, as where these are trained inside a trusted environment.

    Zeros stand in their place, and an attack that knows the defense knows which they are. What the server then makes of
    those layers is its affair; here it is about what the rest of the update gives away.

    Acts on: the update.

    Args:
        first: How many layers with parameters, from the input, are withheld.
        last: How many, from the output.
        layers: Names of further ones, separated by commas, e.g. ``body.conv0,fc``; see ``leakbench measure``.

    Reference: Mo, Borovykh, Malekzadeh, Demetriou, Gündüz, Haddadi, "Quantifying and Localizing Usable Information
    Leakage from Neural Network Gradients", 2022, arXiv 2105.13929, which suggests protection by layers
    """

    acts_on = frozenset({"update"})
    neutral = MappingProxyType({"first": 0, "last": 0, "layers": ""})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, first: int = 1, last: int = 0, layers: str = "") -> None:
        for name, count in (("first", first), ("last", last)):
            if count < 0:
                raise UserError(f"withhold_layers: {name}: expected at least 0, got {count}; write {name}=1")
        self.first = first
        self.last = last
        self.layers = layers

    @property
    def tensorwise(self) -> bool:
        """Always: a tensor is sent or not, whatever the others hold."""
        return True

    def withholds(self, model: Model) -> frozenset[str]:
        """Return the parameters of the layers that are withheld.

        Raises:
            UserError: The model has no such layer.
        """
        known = list(model.layers)
        named = [name.strip() for name in self.layers.split(",") if name.strip()]
        for name in named:
            if name not in known:
                raise UserError(f"withhold_layers: layers: expected some of {', '.join(known)}; got {name!r}")
        kept_back = {*known[: self.first], *known[len(known) - min(self.last, len(known)) :], *named}
        return frozenset(parameter for layer in kept_back for parameter in model.layers[layer])

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Put zeros in the place of withheld layers."""
        withheld = self.withholds(ctx.model)
        return {name: value * 0 if name in withheld else value for name, value in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return a surrogate (T,): how well the directions of what is sent of the other layers agree."""
        withheld = self.withholds(ctx.model)
        shown = {name: value for name, value in sent.items() if name not in withheld} or sent
        score: Tensor = direction_fit(moved(shown, ctx), moved({name: clean[name] for name in shown}, ctx))
        return score

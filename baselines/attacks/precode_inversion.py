"""Inverting Gradients through PRECODE's bottleneck, whose noise is read off the update or searched for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from leakbench_baselines.defenses.precode import bottleneck, noisy_gradients
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Knowledge, Model, NotGranted, Observation, Recovery, UserError, register
from leakbench.inversion import Inversion, InversionAttack, Rows, Source, cosine_inversion

LARGEST = 10.0
"""Of what is read as noise: a standard normal number is never beyond."""


@register("precode_inversion", version=1)
class PrecodeInversion(InversionAttack):
    """PRECODE inversion: matches the direction of the gradient, the bottleneck's noise being known or searched as well.

    One example behind one gradient gives its noise away in closed form. The encoder is a linear layer, so that its
    weight and bias gradients' quotient is its input h, which gives mu and sigma; the decoder's quotient is the code z;
    and eps = (z - mu) / sigma. What is left is the inversion of a deterministic net.

    For more, the noise eps of every example is optimised along with the inputs. The gradients of the bottleneck and of
    what follows may then be left out of the comparison (``layers="before"``), as Scheliga et al. do, since these depend
    on the noise most; what is before depends on it by back-propagation.

    Sees: gradients of all layers, weights, number of inputs; labels where granted; the defense's ``beta`` where
    granted, else its default. An update of several local steps is matched by one gradient.

    Without a bottleneck it is ``inverting_gradients``.

    A re-implementation: of Scheliga et al. the summary alone was at hand; reading off the noise is done here.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation.
        lr: Learning rate of Adam, as in ``inverting_gradients``.
        restarts: Random initialisations.
        labels: Label attack that runs first where labels are not granted; ``bias_count`` is the better one under
            PRECODE where the learning rate is known.
        noise: ``read`` where it can be, else ``searched``; or always ``searched``.
        layers: ``all`` or ``before`` the bottleneck: what is compared where noise is searched.

    Reference: Scheliga, Mäder, Seeland, "Combining Variational Modeling with Partial Gradient Perturbation to Prevent
    Deep Gradient Leakage", 2022, arXiv 2208.04767
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        lr: float = 0.1,
        restarts: int = 1,
        labels: str = "llg",
        noise: str = "read",
        layers: str = "all",
    ) -> None:
        for name, value, known in (("noise", noise, ("read", "searched")), ("layers", layers, ("all", "before"))):
            if value not in known:
                raise UserError(f"precode_inversion: {name}: expected {' or '.join(known)}, got {value!r}")
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts
        self.labels = labels
        self.noise = noise
        self.layers = layers
        self.inversion = cosine_inversion(steps=steps, tv=tv, lr=lr, restarts=restarts, labels=labels)

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion through the bottleneck, where there is one."""
        model = knowledge.model
        try:
            size = model.parameters[f"{bottleneck(model)}.encode.bias"].shape[1] // 2
        except UserError:
            return self.inversion
        once = knowledge.sends == "gradient" or (knowledge.grants("local_steps") and knowledge.local_steps == 1)
        readable = self.noise == "read" and knowledge.total_inputs == 1 and once
        source = ThroughBottleneck(
            beta=_beta(knowledge),
            searched=None if readable else (knowledge.total_inputs, size),
            before=self.layers == "before" and not readable,
        )
        return replace(self.inversion, source=source)

    def run(self, observation: Observation) -> Recovery:
        """Optimise inputs (T, K * N, *input_shape)."""
        recovery = super().run(observation)
        return replace(recovery, notes={k: v for k, v in recovery.notes.items() if k != "noise"})


def _beta(knowledge: Knowledge) -> float:
    try:
        found = [part.params()["beta"] for part in knowledge.defense.parts if getattr(part, "name", "") == "precode"]
    except NotGranted:
        found = []
    return float(found[0]) if found else 1e-3


@dataclass(frozen=True, kw_only=True)
class ThroughBottleneck(Source):
    """The gradient of all inputs at the weights that were sent out, through a bottleneck with given noise.

    Args:
        beta: Weight of the divergence.
        searched: (N, K) of the noise that is optimised; where None, it is read off the update.
        before: Whether only what is before the bottleneck is compared.
    """

    beta: float
    searched: tuple[int, int] | None
    before: bool

    def target(
        self, observation: Observation, units: Literal["gradient", "difference", "direction"]
    ) -> dict[str, Tensor]:
        """Return what gradients are compared with."""
        target = super().target(observation, units)
        place = bottleneck(observation.model) + "."
        kept = {name: value for name, value in target.items() if not (self.before and name.startswith(place))}
        return kept or target

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:
        """Return start values (Q, N, K) of the noise."""
        return {} if self.searched is None else {"noise": like.new_zeros(len(like), *self.searched)}

    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `Source.gradients`."""
        seen = rows.observation
        noise = (
            unknowns["noise"] if self.searched else rows.spread(read_noise(seen.model, seen.difference(seen.update)))
        )
        found: dict[str, Tensor] = noisy_gradients(
            rows.model,
            inputs,
            labels,
            noise,
            names=list(rows.target),
            beta=self.beta,
            batch_norm="train" if seen.examples_interact else "eval",
            reduction=seen.reduction,
            create_graph=True,
        )
        return found


def read_noise(model: Model, update: Mapping[str, Tensor]) -> Tensor:
    """Return the noise (T, 1, K) behind the gradient of one example, in any unit."""
    place = bottleneck(model)
    features, code = (
        _quotient(update[f"{place}.{layer}.weight"], update[f"{place}.{layer}.bias"]) for layer in ("encode", "decode")
    )
    weight, bias = (model.parameters[f"{place}.encode.{part}"] for part in ("weight", "bias"))
    mean, spread = (torch.einsum("tkd,td->tk", weight.expand(len(features), -1, -1), features) + bias).chunk(2, 1)
    return ((code - mean) / F.softplus(spread)).nan_to_num(0, 0, 0).clamp(-LARGEST, LARGEST)[:, None]


def _quotient(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the input (T, P) of a linear layer from gradients (T, H, P) and (T, H): dW = db x by least squares."""
    size = bias.abs().amax(1, keepdim=True)
    size = size.where(size > 0, 1)
    weight, bias = weight / size[..., None], bias / size
    return torch.einsum("th,thp->tp", bias, weight) / bias.square().sum(1, keepdim=True).clamp(min=1e-30)

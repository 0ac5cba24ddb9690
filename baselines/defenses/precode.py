"""PRECODE: a variational bottleneck before the last layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, Model, UserError, register

CHUNK = 16


@register("precode", version=1)
class Precode(Defense):
    """PRECODE: codes the last layer's inputs as mu + sigma * eps, with fresh normal noise eps for every example.

    The last layer is replaced before the net is trained: a linear layer gives mu and softplus(.) = sigma of ``size``
    values each, a second one turns the code back into as many inputs as the last layer had. The client's loss is the
    cross-entropy plus ``beta`` times the Kullback-Leibler divergence of the code from a standard normal one, in bits
    and averaged over the batch. Noise is drawn for every example and local step, in training and for the gradient
    that is sent; a model that is only evaluated codes by the mean.

    Acts on: the model, and each local step's gradient, computed anew from the batch as the client trains on it. What
    other defenses made of the gradient before is lost: write precode first in a chain, and not with one that clips per
    example. At one example the layers around the code give its noise away, see ``precode_inversion``. The last layer's
    inputs take either sign, which upsets label attacks on its weights but not those on its bias (``bias_count``).

    Args:
        size: Values of the code (K).
        beta: Weight of the divergence.

    Reference: Scheliga, Mäder, Seeland, "PRECODE - A Generic Model Extension to Prevent Deep Gradient Leakage", WACV
    2022, arXiv 2108.04725
    """

    acts_on = frozenset({"model", "step"})
    draws = "normal noise on the code of every example in every local step"
    likelihood = "simulated"
    adaptive = ("analytic", "precode_inversion", "bayes_adaptive", "learning_to_invert", "bias_count", "learned_labels")

    def __init__(self, *, size: int = 256, beta: float = 1e-3) -> None:
        if size < 1:
            raise UserError(f"precode: size: expected at least 1, got {size}; write precode(size=256)")
        if beta < 0:
            raise UserError(f"precode: beta: expected at least 0, got {beta}; write precode(beta=0.001)")
        self.size = size
        self.beta = beta

    @property
    def tensorwise(self) -> bool:
        """Always: a tensor's gradient is computed without the others."""
        return True

    def model(self, model: nn.Module) -> nn.Module:
        """Put the bottleneck before the last linear layer.

        Raises:
            UserError: The model has no linear layer inside.
        """
        layers = [(name, layer) for name, layer in model.named_modules() if name and isinstance(layer, nn.Linear)]
        if not layers:
            raise UserError("precode: expected a net that ends in a linear layer; choose another architecture")
        name, head = layers[-1]
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, Bottleneck(head, self.size, self.beta))
        return model

    def step(self, grads: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Compute the gradient under the noise.

        Raises:
            UserError: The model has no bottleneck.
        """
        if not grads:
            return grads
        create_graph = any(value.requires_grad for value in grads.values())
        size = ctx.model.parameters[f"{bottleneck(ctx.model)}.encode.bias"].shape[1] // 2
        noise = ctx.random.randn(ctx.inputs.shape[1], size).to(ctx.inputs.dtype)
        parts = [
            noisy_gradients(
                ctx.model.trials(first, first + CHUNK),
                ctx.inputs[first : first + CHUNK],
                ctx.labels[first : first + CHUNK],
                noise[first : first + CHUNK],
                names=tuple(grads),
                beta=self.beta,
                batch_norm=ctx.batch_norm,
                reduction=ctx.reduction,
                create_graph=create_graph,
            )
            for first in range(0, len(noise), CHUNK)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in grads}


class Bottleneck(nn.Module):
    """A variational bottleneck and the last layer; (B, d) to (B, C).

    In train mode it draws its noise from torch's global generator and adds the divergence to whatever loss is
    differentiated, so that any training routine with a mean loss trains it as it is meant to be.

    Args:
        head: The last layer.
        size: Values of the code (K).
        beta: Weight of the divergence.
    """

    nonnegative_features = False
    """Of the last layer's inputs: they come from a linear layer."""

    noise: Tensor | None

    def __init__(self, head: nn.Linear, size: int, beta: float) -> None:
        super().__init__()
        self.encode = nn.Linear(head.in_features, 2 * size)
        self.decode = nn.Linear(size, head.in_features)
        self.head = head
        self.beta = beta
        # Not part of the state; whoever calls the module functionally may bring (B, K).
        self.register_buffer("noise", None, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C)."""
        statistics = self.encode(features)
        mean, spread = statistics.chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else self.noise
        if self.training:
            penalty = self.beta * divergence(statistics).mean()
            mean = _Penalised.apply(mean, penalty)
        code = mean if noise is None else mean + F.softplus(spread) * noise
        return self.head(self.decode(code))  # type: ignore[no-any-return]


class _Penalised(torch.autograd.Function):
    """The identity; the penalty is added to the loss that is differentiated, whatever that is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, penalty: Tensor) -> Tensor:
        ctx.ones = torch.ones_like(penalty)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.ones


def divergence(statistics: Tensor) -> Tensor:
    """Return KL(N(mu, sigma^2) || N(0, 1)) in bits, (...), of what the encoder returns, (..., 2K)."""
    mean, spread = statistics.chunk(2, -1)
    std = F.softplus(spread)
    return (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1) / (2 * math.log(2))


def bottleneck(model: Model) -> str:
    """Return the name of the model's bottleneck.

    Raises:
        UserError: It has none.
    """
    name = model.head.rpartition(".")[0]
    if f"{name}.encode.weight" not in model.parameters:
        raise UserError("precode: expected a net with a bottleneck; give the model that the defense made")
    return name


def noisy_gradients(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    names: Collection[str],
    beta: float,
    batch_norm: Literal["eval", "train"] = "eval",
    reduction: str = "mean",
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """Return the gradient (T, *shape) by name of T clients whose codes have the given noise, the divergence included.

    Args:
        model: M = 1 or T.
        inputs: (T, B, *input_shape).
        labels: (T, B), or soft (T, B, C).
        noise: (T, B, K).
        names: Parameters to differentiate.
        beta: Weight of the divergence.
        batch_norm: How BatchNorm normalises.
        reduction: Of the loss over the batch.
        create_graph: Whether the result is differentiable.
    """
    place, trials, shared = bottleneck(model), len(inputs), model.draws == 1
    rest = {k: v[0] if shared else v for k, v in (model.parameters | model.buffers).items()}
    train = batch_norm == "train" and model.has_batch_norm

    def loss(own: Mapping[str, Tensor], rest: Mapping[str, Tensor], x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        statistics: list[Tensor] = []
        with model.lock:
            encoder = model.module.get_submodule(f"{place}.encode")
            hook = encoder.register_forward_hook(lambda _, __, output: statistics.append(output))
            try:
                logits, _, _ = model.call({**rest, **own, f"{place}.noise": eps}, x, train=train)
            finally:
                hook.remove()
        each = F.cross_entropy(logits, y, reduction="none") + beta * divergence(statistics[0])
        return each.mean() if reduction == "mean" else each.sum()

    with torch.enable_grad():
        # Every trial needs its own copy of the weights, so that one backward pass keeps the trials apart.
        own = {name: model.parameters[name].expand(trials, *model.parameters[name].shape[1:]) for name in names}
        own = {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in own.items()}
        losses = torch.vmap(loss, in_dims=(0, None if shared else 0, 0, 0, 0))(own, rest, inputs, labels, noise)
        found = torch.autograd.grad(losses.sum(), list(own.values()), create_graph=create_graph)
    return dict(zip(own, found, strict=True))

"""Composition of defenses: a chain calls the same hook of each part in order, and is scored as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from leakbench.defense import Defense, DefenseContext
from leakbench.errors import InvalidOutput
from leakbench.mechanism import Mechanism
from leakbench.models.functional import Model
from leakbench.tasks import Protocol

NEGLIGIBLE = 0.01
"""1 - cosine between an update and what a defense makes of it, below which the defense is left out of a likelihood."""

_IN_STEPS = ("accept", "batch", "per_example", "step")


class DefenseChain:
    """Defenses in order: each hook of the first acts before the same hook of the second.

    Args:
        parts: The defenses; none at all is the undefended client.
    """

    def __init__(self, parts: Sequence[Defense] = ()) -> None:
        self.parts = tuple(parts)

    def acts_in(self, hook: str) -> bool:
        """Whether any part brings its own ``hook``."""
        return any(part.overrides(hook) for part in self.parts)

    @property
    def needs_all_tensors(self) -> bool:
        """Whether some part of the chain looks across tensors of a gradient or update."""
        acting = (p for p in self.parts if any(p.overrides(h) for h in ("per_example", "step", "update")))
        return any(not part.tensorwise for part in acting)

    def withholds(self, model: Model) -> frozenset[str]:
        """Return the names of the parameters that some part keeps back."""
        return frozenset[str]().union(*(part.withholds(model) for part in self.parts))

    @property
    def inside(self) -> DefenseChain:
        """What an adversary runs in a simulated client; `log_likelihood` accounts for the rest.

        That is what each part leaves to it, and all of a part without draws that acts in local steps before one that
        scores: the later part's score is of what the earlier one made.
        """
        last = max(self._scoring, default=-1)
        kept: list[Defense] = []
        for index, part in enumerate(self.parts):
            whole = index < last and not part.draws and _last_step_hook(part) >= 0
            left = None if _idle(part) else part if whole else part.inside()
            kept += [] if left is None else [left]
        return DefenseChain(kept)

    @property
    def scored_by(self) -> str | None:
        """What `log_likelihood` is: ``density`` or ``surrogate``; None where no part that acts declares either."""
        densities = {self.parts[index].has_density for index in self._scoring}
        return None if not densities else "density" if densities == {True} else "surrogate"

    @property
    def _scoring(self) -> list[int]:
        """Places of the parts that declare a likelihood; strength zero, which has no density, is left out."""
        scored = ("density", "surrogate")
        return [i for i, part in enumerate(self.parts) if part.likelihood in scored and not _idle(part)]

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return the log-density or surrogate (T,) of the sent update, differentiable in the clean one.

        The last part that declares one and changes the direction of updates scores: nothing is gained by putting noise
        of 1e-6, or a bound that only rescales, behind a defense. Those before it are applied to ``clean`` with fresh
        draws (where one has no derivative, straight through), so that the score is one draw of an expectation over
        their randomness.

        Args:
            sent: The update, (T, *shape) by name.
            clean: That of a client with the defenses `inside`.
            ctx: The moment of the client's ``update``.

        Raises:
            NotImplementedError: No part declares one.
        """
        scoring = self._scoring
        if not scoring:
            raise NotImplementedError("no part of the chain declares a likelihood")
        given = [clean]
        for index in scoring[:-1]:
            part = self.parts[index]
            if part.overrides("update"):
                mapped = part.update(dict(clean), self._context(ctx, index, "update"))
                clean = {name: _straight_through(clean[name], value) for name, value in mapped.items()}
            given.append(clean)
        # Only what scores is computed: noise of 1e-30 would overflow, and its derivative with it.
        place = torch.zeros(len(next(iter(sent.values()))), dtype=torch.int64)
        for later, index in enumerate(scoring[1:], 1):
            place[(self._turns(index, sent, ctx) > NEGLIGIBLE).cpu()] = later
        scores = {
            here: self.parts[scoring[here]].log_likelihood(
                sent, given[here], self._context(ctx, scoring[here], "update")
            )
            for here in sorted(set(place.tolist()))
        }
        score: Tensor
        score, *others = scores.values()
        for here, other in zip(list(scores)[1:], others, strict=True):
            score = torch.where((place == here).to(other.device), other, score)
        return score

    def _turns(self, index: int, sent: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:
        """Return 1 - cosine (T,) between a dense random update of the size of ``sent`` and what a part makes of it."""
        part = self.parts[index]
        if not part.overrides("update"):
            return torch.full_like(ctx.random.rand(), torch.inf)
        stream = torch.Generator().manual_seed(0)
        probe = {}
        for name, value in sent.items():
            size = value.detach().flatten(1).square().mean(1).sqrt().view(-1, *(1,) * (value.dim() - 1))
            probe[name] = size * torch.randn(value.shape[1:], generator=stream).to(value)
        own = self._context(ctx, index, "update")
        made = part.update(dict(probe), replace(own, state={}))
        before, after = (torch.cat([v.flatten(1) for v in each.values()], 1).double() for each in (probe, made))
        return 1 - torch.nn.functional.cosine_similarity(before, after, dim=1)

    def mechanism(self, protocol: Protocol, batch_size: int, *, layers: int | None = None) -> Mechanism | None:
        """Return what a client with this chain promises, in units of what it sends in one round.

        None where a part that has a say in the update declares nothing, where noise of one local step goes through
        further ones, or where running statistics are sent, which no part treats.

        Args:
            protocol: What the client does and sends.
            batch_size: B of the client.
            layers: How many layers the model has, where known.
        """
        if protocol.send_buffers:
            return None
        found: Mechanism | None = Mechanism(layers=layers)
        # In the order in which they act last: noise after a clip is not a clip after noise.
        in_steps = sorted((p for p in self.parts if _last_step_hook(p) >= 0), key=_last_step_hook)
        on_sent = [part for part in self.parts if part.overrides("update")]
        if set(map(id, in_steps)) & set(map(id, on_sent)):
            return None  # one declaration cannot be in the units of both
        for part in in_steps:
            found = found and part.mechanism(found, batch_size=batch_size, reduction=protocol.reduction)
        if found is None or (found.std > 0 and protocol.local_steps > 1):
            return None
        if protocol.sends != "gradient":
            found = found.scaled(protocol.lr) if protocol.local_steps == 1 else Mechanism(layers=layers)
        for part in on_sent:
            found = found and part.mechanism(found, batch_size=batch_size, reduction=protocol.reduction)
        return found

    def model(self, model: nn.Module) -> nn.Module:
        """Apply every part's ``model`` hook."""
        for part in self.parts:
            model = part.model(model)
        return model

    def accept(self, ctx: DefenseContext) -> Tensor:
        """Return whether every part takes part, (T,) bool.

        Raises:
            InvalidOutput: A part returned anything else.
        """
        trials = ctx.inputs.shape[0]
        accepted = torch.ones(trials, dtype=torch.bool, device=ctx.inputs.device)
        for index, part in enumerate(self.parts):
            if not part.overrides("accept"):
                continue
            answer = part.accept(self._context(ctx, index, "accept"))
            if _kind(answer) != _kind(accepted):
                raise InvalidOutput(f"{part!r}.accept must return {_kind(accepted)}, got {_kind(answer)}")
            accepted = accepted & answer
        return accepted

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Apply every part's ``batch`` hook.

        Raises:
            InvalidOutput: A part returned anything but inputs (T, B, *shape) of the same type and labels (T, B) or
                (T, B, C).
        """
        for index, part in enumerate(self.parts):
            if not part.overrides("batch"):
                continue
            result = part.batch(inputs, labels, self._context(ctx, index, "batch"))
            if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(v, Tensor) for v in result)):
                raise InvalidOutput(f"{part!r}.batch must return two tensors (inputs, labels), got {_kind(result)}")
            self._check_batch(f"{part!r}.batch", inputs, *result, ctx.model.num_classes)
            inputs, labels = result
        return inputs, labels

    @staticmethod
    def _check_batch(who: str, before: Tensor, inputs: Tensor, labels: Tensor, classes: int) -> None:
        soft = labels.dim() == 3
        right_inputs = inputs.dtype == before.dtype and inputs.dim() == before.dim() and inputs.shape[1] > 0
        right_inputs = right_inputs and inputs.shape[0] == before.shape[0] and inputs.shape[2:] == before.shape[2:]
        right_labels = labels.shape[2:] == ((classes,) if soft else ()) and labels.shape[:2] == inputs.shape[:2]
        right_labels = right_labels and labels.dtype == (before.dtype if soft else torch.int64)
        if not (right_inputs and right_labels):
            shape = ", ".join(map(str, before.shape[2:]))
            raise InvalidOutput(
                f"{who}: expected {before.dtype} inputs ({before.shape[0]}, B, {shape}) and torch.int64 labels "
                f"({before.shape[0]}, B) or {before.dtype} ones ({before.shape[0]}, B, {classes}), got {inputs.dtype} "
                f"{tuple(inputs.shape)} and {labels.dtype} {tuple(labels.shape)}"
            )

    def tensors(self, hook: str, tensors: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:
        """Apply every part's ``broadcast``, ``per_example``, ``step`` or ``update`` hook.

        Raises:
            InvalidOutput: A part returned other names, shapes or dtypes than it was given, or changed its argument.
        """
        for index, part in enumerate(self.parts):
            if not part.overrides(hook):
                continue
            given = [*ctx.model.parameters.items(), *tensors.items()]
            versions = [value._version for _, value in given]
            shapes = {name: _kind(value) for name, value in tensors.items()}
            result = getattr(part, hook)(dict(tensors), self._context(ctx, index, hook))
            if not isinstance(result, dict):
                raise InvalidOutput(f"{part!r}.{hook} must return a dict of tensors, got {_kind(result)}")
            got = {name: _kind(value) for name, value in result.items()}
            wrong = sorted((n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n)), key=str)
            if wrong:
                raise InvalidOutput(
                    f"{part!r}.{hook} must return the names and shapes it was given; {wrong[0]!r}: "
                    f"expected {shapes.get(wrong[0], 'nothing')}, got {got.get(wrong[0], 'nothing')}"
                )
            changed = [n for (n, value), version in zip(given, versions, strict=True) if value._version != version]
            if changed:
                raise InvalidOutput(f"{part!r}.{hook} changed {changed[0]!r} in place; return new tensors instead")
            tensors = result
        return tensors

    def _context(self, ctx: DefenseContext, part: int, hook: str) -> DefenseContext:
        """Give a part its own streams and state, keyed by its name, so that parts and hooks never share a draw.

        The same defense draws the same noise alone and in a chain, and at every strength: comparisons are paired.
        """
        names = [getattr(other, "name", type(other).__name__) for other in self.parts[: part + 1]]
        key = (names[-1], names.count(names[-1]) - 1)
        return replace(ctx, random=ctx.random.at("defense", *key, hook), state=ctx.states.setdefault(key, {}))


def _idle(part: Defense) -> bool:
    """Whether its parameters are those with which it changes nothing."""
    return part.neutral is not None and dict(part.neutral).items() <= part.params().items()


def _straight_through(clean: Tensor, mapped: Tensor) -> Tensor:
    """Return ``mapped``, with the derivative of the identity where it has none or is constant everywhere (a sign)."""
    if not clean.requires_grad:
        return mapped
    if mapped.requires_grad:
        (slope,) = torch.autograd.grad(mapped.sum(), clean, retain_graph=True, allow_unused=True)
        if slope is not None and bool(slope.any()):
            return mapped
    return clean + (mapped - clean).detach()


def _last_step_hook(part: Defense) -> int:
    """Return which of the hooks around a local step is the part's last, -1 where it has none of them."""
    return max((_IN_STEPS.index(hook) for hook in _IN_STEPS if part.overrides(hook)), default=-1)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return type(value).__name__

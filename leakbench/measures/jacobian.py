"""The Jacobian J of an update with respect to the private images, as products with vectors; no entry of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from leakbench.errors import NotApplicable
from leakbench.measures.subject import ALL, Subject
from leakbench.models.build import first_line
from leakbench.models.taps import layer_outputs
from leakbench.randomness import TrialRandom

_NUMBERS = 2**26


class Jacobian:
    """J = dg/dx of T trials at their private images x (T, n, *shape) in [0, 1], with rows by layer: J_l (P_l, d).

    The update is differentiated twice and the graphs are kept: J^T u is one pass back through the update's, and since
    J^T u is linear in u, its derivative along v is J v, one pass through that graph for all layers at once. Against
    forward-mode differentiation this needs no forward rule of any operation and does not repeat the update with every
    product: 1.2 to 1.6 gradients each instead of 4.5 (``tests/benchmarks/bench_measures.py``). Trials share a pass.

    Args:
        subject: Whose update; all of its T trials at once, see `linearised`.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.images = subject.images.detach().clone().requires_grad_()
        with torch.enable_grad():
            self._update = subject.update(self.images, create_graph=True)
            self._moving = {name: value for name, value in self._update.items() if value.requires_grad}
            self._cotangents = {name: torch.zeros_like(v).requires_grad_() for name, v in self._moving.items()}

    @property
    def trials(self) -> int:
        """T."""
        return self.subject.trials

    @property
    def size(self) -> int:
        """d, numbers in the n private images of one trial."""
        return self.images[0].numel()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, from input to output."""
        return tuple(self.subject.layers)

    @property
    def sizes(self) -> dict[str, int]:
        """P_l of every layer."""
        return {k: sum(self._update[n][0].numel() for n in names) for k, names in self.subject.layers.items()}

    @cached_property
    def update(self) -> dict[str, Tensor]:
        """The update itself, (T, P_l) by layer."""
        return self.subject.by_layer({name: value.detach() for name, value in self._update.items()})

    def random(self, purpose: str) -> TrialRandom:
        """Return streams for a measure's own draws, equal whichever trials share this Jacobian."""
        return self.subject.random.at("measure", purpose)

    @cached_property
    def _pulled(self) -> Tensor | None:
        """J^T u as a function of u, differentiable; None where nothing in the update depends on the images."""
        if not self._moving:
            return None
        with torch.enable_grad():
            (pulled,) = _differentiated(
                list(self._moving.values()), [self.images], list(self._cotangents.values()), create_graph=True
            )
        return pulled if pulled.requires_grad else None

    def jvp(self, directions: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return J_l v for directions v (T, n, *shape): (T, P_l) by layer.

        Args:
            directions: What the images change by; in intensities, not in units of what the net gets.
            layers: Which layers are wanted; None means all. Fewer save what only the others need.
        """
        wanted = self.subject.layers if layers is None else {k: self.subject.layers[k] for k in layers}
        found = self._along(directions, [name for names in wanted.values() for name in names])
        return {layer: torch.cat([found[name].flatten(1) for name in names], 1) for layer, names in wanted.items()}

    def energy(self, directions: Tensor) -> Tensor:
        """Return ||J_l v||^2 for directions v (T, n, *shape): (T, L) float64, in the order of ``layers``."""
        found = self._along(directions, list(self._update))
        # Summed in the precision of the model within a tensor, in float64 across tensors.
        squares = {name: value.flatten(1).square().sum(1).double() for name, value in found.items()}
        return torch.stack([torch.stack([squares[n] for n in ns]).sum(0) for ns in self.subject.layers.values()], 1)

    def vjp(self, cotangents: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of J_l^T u_l over the named layers, (T, n, *shape), for u_l (T, P_l) by layer."""
        outputs, weights = [], []
        for layer, value in cotangents.items():
            names = self.subject.layers[layer]
            pieces = torch.split(value, [self._update[name][0].numel() for name in names], 1)
            for name, piece in zip(names, pieces, strict=True):
                if name in self._moving:
                    outputs.append(self._moving[name])
                    weights.append(piece.reshape(self._moving[name].shape).to(self.images.dtype))
        if not outputs:
            return torch.zeros_like(self.images, requires_grad=False)
        (found,) = _differentiated(outputs, [self.images], weights)
        return found.detach()

    def gram(self, directions: Tensor, layer: str = ALL) -> Tensor:
        """Return J^T J v, or J_l^T J_l v of one layer, (T, n, *shape) for v of that shape."""
        return self.vjp(self.jvp(directions, None if layer == ALL else [layer]))

    def _along(self, directions: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Return the change of the update's tensors ``names`` along v, (T, *shape) by name."""
        moving = [name for name in names if name in self._moving]
        found: dict[str, Tensor] = {}
        if self._pulled is not None and moving:
            along = directions.to(self.images.dtype).reshape(self.images.shape)
            tensors = _differentiated([self._pulled], [self._cotangents[name] for name in moving], [along])
            found = {name: value.detach() for name, value in zip(moving, tensors, strict=True)}
        return {name: found[name] if name in found else torch.zeros_like(self._update[name]).detach() for name in names}


def _differentiated(
    outputs: list[Tensor], inputs: list[Tensor], weights: list[Tensor], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return derivatives of weighted outputs, zeros where there is no way from an input; the graph is kept.

    Raises:
        NotApplicable: The net holds an operation without a second derivative.
    """
    try:
        return torch.autograd.grad(
            outputs,
            inputs,
            weights,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise NotApplicable(f"the update cannot be differentiated: {first_line(error)}; try another net") from error


def linearised(subject: Subject, at_most: int | None = None) -> Iterator[Jacobian]:
    """Yield the Jacobians of a subject's trials, so few at once that their graphs fit into the memory.

    How many is a fixed function of shapes, so that numbers do not depend on the memory at hand. A caller that drops
    each Jacobian before it asks for the next never has two graphs.

    Args:
        subject: Whose.
        at_most: No more trials at once than this, where the caller's own tensors are large.
    """
    size = min(trials_at_once(subject), at_most or subject.trials)
    for first in range(0, subject.trials, size):
        yield Jacobian(subject.part(first, min(first + size, subject.trials)))


def by_trial(
    subject: Subject, compute: Callable[[Jacobian], Mapping[str, Tensor]], at_most: int | None = None
) -> dict[str, Tensor]:
    """Compute numbers of all trials, so many at once as fit into the memory, and tell the runner how far they are.

    Args:
        subject: Whose.
        compute: Takes the Jacobian of some trials and returns their numbers, (T, *) by name.
        at_most: See `linearised`.
    """
    parts: list[Mapping[str, Tensor]] = []
    done = 0
    for jacobian in linearised(subject, at_most):
        parts.append(compute(jacobian))
        done += jacobian.trials
        del jacobian  # and its graphs, before the next are made
        subject.progress(done, subject.trials)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def trials_at_once(subject: Subject) -> int:
    """Return how many trials share a Jacobian: 64 for small nets, down to 1, by shapes alone."""
    model, protocol, clients = subject.model, subject.cohort.protocol, len(subject.cohort.clients)
    weights = sum(value[0].numel() for value in model.parameters.values())
    examples = subject.images.shape[1] * protocol.local_steps / protocol.local_batches
    # Every client's every step has its own weights; the update's graph and its derivative's each hold activations and
    # derivatives with respect to them.
    held = 4 * weights * protocol.local_steps * clients + 6 * examples * layer_outputs(model)
    return max(1, min(64, int(_NUMBERS // held)))


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the quotient, 0 where ``below`` is 0: a layer that sends nothing leaks nothing."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0)

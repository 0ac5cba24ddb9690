"""How far the perturbation of a defense moves what an ideal attacker would recover, to first order."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

from torch import Tensor

from leakbench.chain import DefenseChain
from leakbench.errors import NotApplicable
from leakbench.measures.jacobian import Jacobian, by_trial, ratio
from leakbench.measures.lanczos import conjugate_gradients
from leakbench.measures.spectrum import top
from leakbench.measures.subject import ALL, Profile, Subject

_PERTURBS = ("batch", "per_example", "step", "update")


def i2f(subject: Subject, *, damping: float = 1e-3, iterations: int = 100) -> dict[str, Profile]:
    """Return the inversion influence function of the defense and its lower bound.

    The attacker who finds the images whose undefended update g is the one sent, g + delta, errs by
    (J^T J)^-1 J^T delta to first order; J belongs to the undefended update. Damping is relative to the greatest
    eigenvalue here, where the authors' code adds an absolute number, which would mean something else for every net.

    Args:
        subject: Whose clients.
        damping: Added to J^T J, in units of its greatest eigenvalue.
        iterations: Of conjugate gradients, at most.

    Raises:
        NotApplicable: No part of the defense touches what is computed or sent.
    """
    if not any(subject.defense.acts_in(hook) for hook in _PERTURBS):
        raise NotApplicable("i2f compares a defended update with the undefended one; give the suite a defense")
    clients = [replace(client, defense=DefenseChain()) for client in subject.cohort.clients]
    bare = copy(subject)
    bare.cohort = replace(subject.cohort, clients=clients)

    def compute(jacobian: Jacobian) -> dict[str, Tensor]:
        undefended = jacobian.subject
        defended = copy(undefended)
        defended.cohort = subject.cohort
        # Both without a graph: the other way to the same numbers rounds differently, which is not a perturbation.
        before, after = (whose.by_layer(whose.update()) for whose in (undefended, defended))
        return influence(jacobian, {layer: after[layer] - before[layer] for layer in before}, damping, iterations)

    return {name: Profile((ALL,), value[:, None]) for name, value in by_trial(bare, compute).items()}


def influence(jacobian: Jacobian, delta: dict[str, Tensor], damping: float, iterations: int = 100) -> dict[str, Tensor]:
    """Return both quantities of `i2f`, (T,) each, for perturbations (T, P_l) by layer."""
    pulled = jacobian.vjp(delta).double().flatten(1)
    greatest = top(jacobian).square()[:, None]

    def damped(vector: Tensor) -> Tensor:
        own = jacobian.gram(vector.view(jacobian.images.shape)).double().flatten(1)
        return own + damping * greatest * vector

    moved = conjugate_gradients(damped, pulled, iterations, 1e-6)
    return {"i2f": moved.norm(dim=1), "i2f_lower": ratio(pulled.norm(dim=1), greatest[:, 0])}

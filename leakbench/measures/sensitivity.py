"""How much each layer of an update changes with the private images, in three scales that rank layers differently."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from leakbench.measures.jacobian import Jacobian, by_trial, ratio
from leakbench.measures.subject import ALL, Profile, Subject


def sensitivity(subject: Subject, *, probes: int = 64) -> dict[str, Profile]:
    """Return Frobenius norms of the Jacobian by layer, and the gradient norm to compare them with.

    ||J_l||_F^2 = E ||J_l v||^2 over random signs v (Hutchinson 1989): the mean of ``probes`` of them has a relative
    standard error of at most sqrt(2 / probes), half of that for the norm. With as many probes as pixels the unit
    vectors take their place and nothing is estimated. Units are those of Mo et al. (2021, arXiv:2105.13929) in spirit
    only: how they normalise is not known here.

    Args:
        subject: Whose clients.
        probes: Products with the Jacobian per trial.
    """
    found = by_trial(subject, partial(_sensitivity, probes=probes))
    layers = tuple(subject.layers)
    return {k: Profile(layers if k == "sensitivity_share" else (*layers, ALL), v) for k, v in found.items()}


def _sensitivity(jacobian: Jacobian, probes: int) -> dict[str, Tensor]:
    energy = frobenius(jacobian, probes, "sensitivity")
    whole = energy.sum(1, keepdim=True)
    squares = torch.stack([value.double().square().sum(1) for value in jacobian.update.values()], 1)
    norm, gradient = (torch.cat([v, v.sum(1, keepdim=True)], 1).sqrt() for v in (energy, squares))
    sizes = torch.tensor([*jacobian.sizes.values()], dtype=torch.float64, device=norm.device)
    entries = torch.cat([sizes, sizes.sum()[None]]) * jacobian.size
    images = jacobian.images.detach().double().flatten(1).norm(dim=1, keepdim=True)
    return {
        "gradient_norm": gradient,
        "sensitivity_relative": ratio(norm * images, gradient),
        "sensitivity_rms": norm / entries.sqrt(),
        "sensitivity_share": ratio(energy, whole),
    }


def frobenius(jacobian: Jacobian, probes: int, purpose: str) -> Tensor:
    """Return estimates of ||J_l||_F^2, (T, L) float64; exact where ``probes`` reach the number of pixels.

    Args:
        jacobian: Whose.
        probes: Products with it.
        purpose: Names the streams of the probes.
    """
    if jacobian.size <= probes:
        return torch.stack([jacobian.energy(unit) for unit in units(jacobian)]).sum(0)
    random = jacobian.random(purpose)
    shape = jacobian.images.shape[1:]
    draws = (2 * random.randint(2, *shape) - 1 for _ in range(probes))
    return torch.stack([jacobian.energy(signs) for signs in draws]).mean(0)


def units(jacobian: Jacobian) -> Iterator[Tensor]:
    """Yield the d unit vectors of a trial's images, (T, n, *shape) each."""
    for i in range(jacobian.size):
        unit = torch.zeros_like(jacobian.images, requires_grad=False).flatten(1)
        unit[:, i] = 1
        yield unit.view_as(jacobian.images)


def graddefense_sensitivity(subject: Subject) -> dict[str, Profile]:
    """Return ||1^T J_l||, the layer sensitivity of the GradDefense code, averaged over the examples.

    One product with a vector of ones per layer: the entries of the Jacobian cancel over its rows, so that this is no
    estimate of a norm of it. For comparison with that defense's choice of layers only.

    Args:
        subject: Whose clients.
    """
    found = by_trial(subject, _of_ones)
    return {"graddefense_sensitivity": Profile((*subject.layers, ALL), found["graddefense_sensitivity"])}


def _of_ones(jacobian: Jacobian) -> dict[str, Tensor]:
    ones = {layer: torch.ones_like(value) for layer, value in jacobian.update.items()}
    pulled = [jacobian.vjp({layer: value}) for layer, value in ones.items()]
    pulled.append(torch.stack(pulled).sum(0))
    norms = [value.double().flatten(2).norm(dim=2).mean(1) for value in pulled]
    return {"graddefense_sensitivity": torch.stack(norms, 1)}

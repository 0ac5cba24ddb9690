"""Whether an update reacts more to an attribute of its examples than to any other change of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from leakbench.errors import NotApplicable
from leakbench.measures.jacobian import Jacobian, by_trial, ratio
from leakbench.measures.subject import ALL, Profile, Subject
from leakbench.randomness import TrialRandom


def latent_sensitivity(subject: Subject, *, probes: int = 32, train: int = 256) -> dict[str, Profile]:  # noqa: ARG001
    """Return how much more each layer changes along the attribute than along other directions of the same length.

    The attribute's direction is the mean auxiliary image with it minus that without. It is put on every private image
    alike, and so are the directions it is compared with: white noise, and differences of means of auxiliary groups
    drawn at random, which share the smoothness of images that nets react to whatever the attribute.

    Args:
        subject: Whose clients.
        probes: Directions of either kind to compare with.
        train: Auxiliary trials; read by the runner.

    Raises:
        NotApplicable: The auxiliary trials hold no two groups of different means.
    """
    auxiliary = subject.auxiliary
    if auxiliary is None or auxiliary.truth is None or len(set(auxiliary.truth.tolist())) < 2:
        raise NotApplicable("latent_sensitivity needs auxiliary trials with the attribute and without; raise train")
    means = auxiliary.images.detach().double().mean(1)
    found = by_trial(subject, partial(_latent, means=means, truth=auxiliary.truth, probes=probes))
    return {name: Profile((*subject.layers, ALL), value) for name, value in found.items()}


def _latent(jacobian: Jacobian, means: Tensor, truth: Tensor, probes: int) -> dict[str, Tensor]:
    random = jacobian.random("latent")
    attribute = contrast(means, truth[None].expand(jacobian.trials, -1))
    along = _change(jacobian, attribute)
    noise = torch.stack([_change(jacobian, random.randn(*means.shape[1:]).double()) for _ in range(probes)])
    groups = torch.stack([_change(jacobian, contrast(means, _shuffled(truth, random))) for _ in range(probes)])
    return {"latent_sensitivity": ratio(along, noise.mean(0)), "latent_specificity": ratio(along, groups.mean(0))}


def contrast(means: Tensor, truth: Tensor) -> Tensor:
    """Return the mean of one group minus that of the other, (T, *shape), for means (A, *shape) and truth (T, A)."""
    has = truth.double()
    weights = has / has.sum(1, keepdim=True) - (1 - has) / (1 - has).sum(1, keepdim=True)
    return torch.einsum("ta,a...->t...", weights, means)


def _shuffled(truth: Tensor, random: TrialRandom) -> Tensor:
    """Return the truth in an order of each trial's own, (T, A)."""
    return truth[random.rand(len(truth)).argsort(1)]


def _change(jacobian: Jacobian, direction: Tensor) -> Tensor:
    """Return ||J_l u|| and that of all layers, (T, L + 1), along unit vectors u: ``direction`` on every image."""
    placed = direction[:, None].expand(jacobian.images.shape)
    length = placed.flatten(1).norm(dim=1).view(-1, *(1,) * (placed.dim() - 1))
    energy = jacobian.energy(ratio(placed, length))
    return torch.cat([energy, energy.sum(1, keepdim=True)], 1).sqrt()

"""Epsilon from below: how much privacy an update has lost at least, by guessing which examples it was computed on."""

from __future__ import annotations

import math
from copy import copy

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import beta, binom
from torch import Tensor

from leakbench.accounting import gdp_epsilon
from leakbench.errors import NotApplicable
from leakbench.federation.client import Client
from leakbench.federation.gradients import per_example_gradients
from leakbench.federation.inputs import normalised
from leakbench.measures.fitted import mean_with_interval
from leakbench.measures.noise import promised
from leakbench.measures.subject import ALL, Profile, Subject

_MOST = 60.0
_RIDGE = 1e-9


def empirical_epsilon(
    subject: Subject, *, delta: float = 1e-5, guesses: float = 0.5, train: int = 256
) -> dict[str, Profile]:
    """Return lower limits of epsilon at 95% confidence, where one example is replaced.

    Every trial is a run, every one of its n examples a canary: a fair coin decides whether the client trains on it or
    on an auxiliary example in its place. The auditor knows model, both examples of every canary and the defense, and
    finds the coins by the linear minimum mean square error from the update, with clipped gradients at the model that
    was sent (exact for one step of DP-SGD; otherwise a worse auditor, whose limits hold all the same). Trials share
    neither coins nor noise, so that all canaries together are one run of Steinke, Nasr, Jagielski 2023 (arXiv
    2305.08846); the first canaries of all trials are independent runs.

    Args:
        subject: With auxiliary trials.
        delta: Of epsilon.
        guesses: Share of the canaries that the one-run audit guesses, the most confident ones.
        train: Auxiliary trials that examples in place are taken from.

    Raises:
        NotApplicable: There are no auxiliary trials, fewer than two trials, or a net with batch statistics.
    """
    auxiliary = subject.auxiliary
    if auxiliary is None or subject.trials < 2:
        raise NotApplicable(f"needs two trials and auxiliary ones, got {subject.trials} with train={train}")
    if subject.cohort.protocol.batch_norm == "train" and subject.model.has_batch_norm:
        raise NotApplicable(
            "examples that share batch statistics have no gradient of their own; write batch_norm: eval"
        )
    included, scores = coins_and_scores(subject, auxiliary)
    right = (scores > 0) == included
    confident = scores.abs().flatten().argsort(descending=True)[: math.ceil(guesses * scores.numel())]
    correct = right.flatten()[confident]
    first, claimed = included[:, 0], scores[:, 0] > 0
    hits, alarms = int((first & claimed).sum()), int((~first & claimed).sum())
    runs = (hits, int(first.sum()), alarms, int((~first).sum()), delta)
    mean = mean_with_interval(right.double().mean(1).cpu().numpy(), "empirical_epsilon")
    accuracy, low, high = (torch.tensor([end], dtype=torch.float64) for end in mean)
    values = {
        "one_run_epsilon": (one_run_epsilon(scores.numel(), len(correct), int(correct.sum()), delta), len(correct)),
        "multi_run_epsilon": (multi_run_epsilon(*runs), subject.trials),
        "gdp_run_epsilon": (gdp_run_epsilon(*runs), subject.trials),
    }
    profiles = {k: Profile((ALL,), torch.tensor([v], dtype=torch.float64), n=n) for k, (v, n) in values.items()}
    return profiles | {"audit_accuracy": Profile((ALL,), accuracy, low, high, n=subject.trials)}


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, *, significance: float = 0.05) -> float:
    """Return the greatest epsilon, at least 0, that the guesses of one run refute.

    Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846): under (epsilon, delta)-DP at least so many guesses are right with
    a probability of at most beta + 2 m delta alpha.

    Args:
        canaries: m, each included by a fair coin.
        guesses: r, how many of them were guessed.
        correct: v, how many guesses were right.
        delta: Of epsilon.
        significance: Probability of a value that is too high.
    """
    fewer = np.arange(1, correct + 1)

    def excess(epsilon: float) -> float:
        chance = 1 / (1 + math.exp(-epsilon))
        tail = float(binom.sf(correct - 1, guesses, chance))
        more = (binom.sf(correct - fewer - 1, guesses, chance) - tail) / fewer
        return tail + 2 * canaries * delta * float(more.max(initial=0.0)) - significance

    if excess(0.0) > 0:
        return 0.0
    return _MOST if excess(_MOST) < 0 else float(brentq(excess, 0.0, _MOST))


def multi_run_epsilon(
    hits: int, included: int, alarms: int, excluded: int, delta: float, *, significance: float = 0.05
) -> float:
    """Return the epsilon, at least 0, that the rates of many runs prove with Clopper-Pearson limits.

    Args:
        hits: Runs with the canary that were claimed to have it.
        included: Runs with it.
        alarms: Runs without it that were claimed to have it.
        excluded: Runs without it.
        delta: Of epsilon.
        significance: Probability of a value that is too high, shared by both rates.
    """
    hit, alarm = _limits(hits, included, alarms, excluded, significance)
    pairs = ((hit, alarm), (1 - alarm, 1 - hit))  # the claim read as it is, and turned around
    return max([0.0, *(math.log((up - delta) / down) for up, down in pairs if up > delta and down > 0)])


def gdp_run_epsilon(
    hits: int, included: int, alarms: int, excluded: int, delta: float, *, significance: float = 0.05
) -> float:
    """Return the epsilon that the same rates prove of a Gaussian mechanism, whose whole trade-off curve they fix.

    mu is at least Phi^-1(1 - alarms) - Phi^-1(1 - hits) (Nasr et al. 2023, arXiv 2302.07956). For other mechanisms it
    is an extrapolation, no limit. See `multi_run_epsilon` for the arguments.
    """
    hit, alarm = _limits(hits, included, alarms, excluded, significance)
    return gdp_epsilon(max(0.0, float(ndtri(1 - alarm) - ndtri(1 - hit))), delta) if hit > 0 and alarm < 1 else 0.0


def coins_and_scores(subject: Subject, auxiliary: Subject) -> tuple[Tensor, Tensor]:
    """Return whether each canary was included (T, n) bool, and the auditor's score of it (T, n), above 0 for yes.

    Args:
        subject: Whose clients; its examples are the canaries.
        auxiliary: Whose examples take their places.
    """
    rows = torch.arange(subject.trials) % auxiliary.trials
    images, labels = auxiliary.images[rows].to(subject.images), auxiliary.labels[rows].to(subject.labels.device)
    included = subject.random.at("measure", "canaries").rand(subject.images.shape[1]) < 0.5
    shown = included.view(*included.shape, *(1,) * (images.dim() - 2))
    update = subject.update(torch.where(shown, subject.images, images), torch.where(included, subject.labels, labels))
    sent = torch.cat(list(subject.by_layer(update).values()), 1).detach().double()
    mechanism = promised(subject.cohort, len(subject.layers))
    variance = 0.0 if mechanism is None else mechanism.std**2
    scores = []
    # Trials take turns: gradients of all examples of all trials at once would not fit.
    for t in range(subject.trials):
        own, other = subject.part(t, t + 1), copy(subject.part(t, t + 1))
        other.images, other.labels = images[t : t + 1], labels[t : t + 1]
        with_it, without = _contributions(own), _contributions(other)
        half, rest = (with_it - without) / 2, (with_it + without).sum(0) / 2
        gram = half @ half.T
        ridge = variance + _RIDGE * gram.diagonal().mean().clamp_min(1e-30)
        scores.append(torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), half @ (sent[t] - rest)))
        subject.progress(t + 1, subject.trials)
    return included, torch.stack(scores)


def _contributions(one: Subject) -> Tensor:
    """Return what each example adds to one trial's update, to first order in the learning rate: (n, P) float64."""
    inputs = normalised(one.images, one.spec, one.normalise)
    gradients = one.by_layer({n: v[0] for n, v in per_example_gradients(one.model, inputs, one.labels).items()})
    flat = torch.cat(list(gradients.values()), 1).double()
    total, first, parts = sum(one.cohort.weights), 0, []
    for client, size, weight in zip(one.cohort.clients, one.cohort.sizes, one.cohort.weights, strict=True):
        parts.append(weight / total * _clipped(flat[first : first + size], client, len(one.layers)))
        first += size
    return torch.cat(parts)


def _clipped(gradients: Tensor, client: Client, layers: int) -> Tensor:
    """Return the gradients (N, P) of a client's examples, in units of what it sends and as short as it promises."""
    protocol = client.protocol
    factor = protocol.local_steps / protocol.local_batches * (1.0 if protocol.sends == "gradient" else protocol.lr)
    sent: Tensor = gradients * (factor / (client.batch_size if protocol.reduction == "mean" else 1))
    mechanism = client.defense.mechanism(protocol, client.batch_size, layers=layers)
    if mechanism is None or not math.isfinite(mechanism.example):
        return sent
    bound = mechanism.example / 2
    scale: Tensor = bound / torch.linalg.vector_norm(sent, dim=1, keepdim=True).clamp_min(bound)
    return sent * scale


def _limits(hits: int, included: int, alarms: int, excluded: int, significance: float) -> tuple[float, float]:
    """Return the lower limit of the rate of hits and the upper one of alarms (Clopper, Pearson 1934)."""
    hit = float(beta.ppf(significance / 2, hits, included - hits + 1)) if hits else 0.0
    alarm = float(beta.ppf(1 - significance / 2, alarms + 1, excluded - alarms)) if alarms < excluded else 1.0
    return hit, alarm

"""What no attacker can exceed against Gaussian noise and bounded changes: reconstruction, inference, epsilon."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from leakbench.accounting import gdp_epsilon
from leakbench.errors import NotApplicable, UserError
from leakbench.measures.noise import noisy
from leakbench.measures.subject import ALL, Profile, Subject

Floats = NDArray[np.float64]

_TAIL = 1e-12
_CELLS = 2**20


def robustness(subject: Subject, *, kappa: float = 0.1, delta: float = 1e-5) -> dict[str, Profile]:
    """Return bounds that follow from the declared mechanism alone, whatever the model, the images and the attacker.

    An attacker may know everything but the one example, or but the whole batch, and may have planted the model;
    rounds compose. They are no statement about a single image: the probability is over the noise and over what is
    guessed.

    Args:
        subject: Whose clients.
        kappa: Success of the best guess that does not see the update.
        delta: Of epsilon.

    Raises:
        NotApplicable: The defense declares no noise, or bounds nothing.
    """
    mechanism = noisy(subject.cohort, len(subject.layers))
    if not math.isfinite(mechanism.update):
        raise NotApplicable("the noise has no bound beside it; clip as well: dp_sgd or clip_l2+gaussian_noise")
    rounds = math.sqrt(subject.cohort.protocol.rounds)
    example, update = rounds * mechanism.mu_example, rounds * mechanism.mu_update
    values = {
        # Against a reconstruction the reference is the ball's center, half as far away as the other end.
        "rero_gamma_example": gaussian_gamma(kappa, example / 2),
        "rero_gamma_update": gaussian_gamma(kappa, update / 2),
        "attribute_accuracy_bound": f_dp_accuracy(update),
        "membership_accuracy_bound": f_dp_accuracy(example),
        "epsilon": gdp_epsilon(example, delta),
    }
    shape = (subject.trials, 1)
    return {name: Profile((ALL,), torch.full(shape, value, dtype=torch.float64)) for name, value in values.items()}


def gaussian_gamma(kappa: float, mu: float) -> float:
    """Return the reconstruction robustness bound Phi(Phi^-1(kappa) + mu) of the Gaussian mechanism.

    No attacker succeeds with a greater probability where the best blind guess succeeds with kappa: the most that a set
    of probability kappa under N(0, 1) can have under N(mu, 1) (Hayes, Mahloujifar, Balle 2023, arXiv 2302.07225). T
    full-batch steps of DP-SGD with noise multiplier z have mu = sqrt(T) / z.

    Args:
        kappa: Success of the best blind guess, in (0, 1).
        mu: Distance from a fixed reference output to the outputs of all candidates, in standard deviations.
    """
    _check(kappa)
    return float(ndtr(ndtri(kappa) + mu))


def zcdp_gamma(kappa: float, rho: float) -> float:
    """Return the looser bound that rho-zCDP gives, with rho = mu^2 / 2 for the Gaussian mechanism.

    Balle, Cherubin, Hayes 2022 (arXiv 2201.04845) for Renyi DP, with the best order.
    """
    _check(kappa)
    return math.exp(-(max(0.0, math.sqrt(-math.log(kappa)) - math.sqrt(rho)) ** 2))


def sampled_gamma(
    kappa: float, noise: float, steps: int, rate: float, *, samples: int = 100_000, seed: int = 0
) -> float:
    """Return the bound for DP-SGD with Poisson sampling by Monte Carlo, as Hayes et al. 2023 do.

    Args:
        kappa: Success of the best blind guess, in (0, 1).
        noise: Noise multiplier.
        steps: T.
        rate: Probability q that an example is in a step's batch.
        samples: Draws of the whole run; the standard error is about sqrt(gamma (1 - gamma) / (kappa samples)) at most.
        seed: Of the draws.
    """
    _check(kappa)
    rng, loss = np.random.default_rng(seed), np.zeros(samples)
    for _ in range(steps):
        loss += _loss(noise * rng.standard_normal(samples), noise, rate)
    lowest = np.sort(loss)[: math.floor(samples * (1 - kappa))]
    return 1 - float(np.exp(lowest).sum()) / samples


def poisson_gamma(kappa: float, noise: float, steps: int, rate: float) -> float:
    """Return the bound for DP-SGD with Poisson sampling by numerical convolution, never too low but for 1e-9.

    The privacy loss of a step goes onto a grid that keeps the probability of every cell under both hypotheses, which
    can only help the attacker (connecting the dots: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, arXiv
    2207.04380); the sum over steps is a power of its Fourier transform.

    Args:
        kappa: Success of the best blind guess, in (0, 1).
        noise: Noise multiplier, at least 0.05.
        steps: T.
        rate: Probability q that an example is in a step's batch.
    """
    _check(kappa)
    low, high = _window(noise, steps, rate)
    width = (high - low) / (_CELLS - 4)
    first, step, lost = _step(noise, rate, width, low, high)
    # A run's loss under either hypothesis. Weighting one by exp(loss) would blow up the transform's rounding instead.
    shift = steps * first - math.ceil(low / width)
    out, other = (np.roll(_power(each, steps), shift) for each in (step, step * np.exp(_grid(first, step, width))))
    above, gained = (np.append(np.cumsum(total[::-1])[::-1], 0.0) for total in (out, other))
    cut = int(np.searchsorted(-above, -kappa))  # the cell from which on there is at most kappa
    share = (kappa - above[cut]) / (above[cut - 1] - above[cut]) if cut else 0.0
    return min(1.0, float(gained[cut] + share * (gained[cut - 1] - gained[cut])) + steps * lost)


def f_dp_accuracy(mu: float) -> float:
    """Return Phi(mu / 2), the greatest balanced accuracy in telling two hypotheses apart under mu-GDP.

    Kaissis, Hayes, Ziller, Rueckert 2023 (arXiv 2307.03928) and Dong, Roth, Su 2019 (arXiv 1905.02383).
    """
    return float(ndtr(mu / 2))


def _check(kappa: float) -> None:
    if not 0 < kappa < 1:
        raise UserError(
            f"robustness: kappa: expected a probability in (0, 1), got {kappa}; write robustness(kappa=0.1)"
        )


def _loss(x: Floats, noise: float, rate: float) -> Floats:
    """Return log(1 - q + q exp((2 x - 1) / (2 noise^2))) of a step's output x."""
    inside = (2 * x - 1) / (2 * noise**2)
    return np.logaddexp(math.log1p(-rate), math.log(rate) + inside) if rate < 1 else inside


def _window(noise: float, steps: int, rate: float) -> tuple[float, float]:
    """Return losses between which the sum over steps lies under both hypotheses, up to `_TAIL` (Chernoff)."""
    spread = steps * (np.logaddexp(math.log1p(-(rate**2)), 2 * math.log(rate) + noise**-2) if rate < 1 else noise**-2)
    lower = steps * min(-math.log1p(-rate), noise**-2) if rate < 1 else steps * noise**-2
    return -(lower - math.log(_TAIL)), float(spread) - math.log(_TAIL)


def _step(noise: float, rate: float, width: float, low: float, high: float) -> tuple[int, Floats, float]:
    """Put one step's loss onto the grid of multiples of ``width``.

    Returns:
        The index of the first cell, the probabilities under N(0, noise^2), and what of the other hypothesis's
        probability lies beyond ``high``.
    """
    reach = 10 * noise  # less than 1e-22 lies beyond
    ends = _loss(np.array([-reach, 1 + reach]), noise, rate)
    first, last = math.floor(max(ends[0], low) / width), math.ceil(min(ends[1], high) / width)
    grid = np.arange(first, last + 1) * width
    with np.errstate(divide="ignore"):
        x = noise**2 * (np.log((np.expm1(grid) / rate + 1).clip(0)) if rate < 1 else grid) + 0.5
    x[0] = -np.inf
    held, shifted = _between(x / noise), _between((x - 1) / noise)
    other = (1 - rate) * held + rate * shifted
    # Two numbers for each cell: p + q = held, p exp(l) + q exp(l + width) = other.
    upper = ((other * np.exp(-grid[:-1]) - held) / math.expm1(width)).clip(0, held)
    probability = np.zeros(len(grid))
    probability[:-1] += held - upper
    probability[1:] += upper
    return first, probability, float((1 - rate) * ndtr(-x[-1] / noise) + rate * ndtr((1 - x[-1]) / noise))


def _between(x: Floats) -> Floats:
    """Return what N(0, 1) has between neighbours in ascending ``x``, precise in both tails."""
    a, b = x[:-1], x[1:]
    return np.asarray(np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a)), np.float64)


def _grid(first: int, values: Floats, width: float) -> Floats:
    return np.asarray((first + np.arange(len(values))) * width, np.float64)


def _power(step: Floats, steps: int) -> Floats:
    """Return the circular convolution of a step with itself, ``steps`` times in all."""
    return np.asarray(np.fft.irfft(np.fft.rfft(step, _CELLS) ** steps, _CELLS).clip(0))

"""Differential privacy of what clients send: epsilon from a noise multiplier, and from a chain of defenses.

Two questions that must not be mixed up:

- `epsilon` is that of DP-SGD as the literature runs it: in every step each example takes part with probability
  ``sample_rate`` on its own (Poisson sampling), and neighbours differ by one example that is added or removed, which
  moves the sum of clipped gradients by up to C.
- `chain_epsilon` is that of the client whose update leakbench attacks. Its batches are fixed, nothing is sampled, and
  neighbours differ by one example that is replaced, which moves the sum by up to 2 C. So the same noise promises less.

Nothing here imports torch until Opacus is asked.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from scipy.optimize import brentq
from scipy.special import erfcx, ndtr, ndtri

from leakbench.errors import UserError

if TYPE_CHECKING:
    from leakbench.chain import DefenseChain
    from leakbench.tasks import Protocol

Accountant = Literal["prv", "rdp", "gdp"]
ACCOUNTANTS = ("prv", "rdp", "gdp")
MOST_STEPS = 10**12
"""Most steps that are accounted for."""
POINTS = 2**20
"""Most points of a numerical accountant's grid: seconds."""
WIDEST = 700.0
"""Largest privacy loss on such a grid: the exponential of more overflows."""
NEAR_ONE = (1.001, 1.003, 1.01, 1.03)
"""Renyi orders beside those of Opacus, which are the best ones where epsilon is large."""


def epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: Accountant = "prv"
) -> float:
    """Return epsilon of DP-SGD: Poisson sampling, one example added or removed.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum of clipped gradients, in units of the clip.
        sample_rate: Probability that an example takes part in a step; 1 is every example in every step.
        steps: Noisy steps, of all rounds.
        delta: Probability that the promise fails.
        accountant: ``prv``: Opacus' numerical composition, an upper bound within .02, or 1% where 2**20 points would
            not do (Gopi, Lee, Wutschitz 2021, arXiv 2106.02848). At a sample rate of 1 it is the closed form, exactly,
            and where the numbers are out of its reach it is ``rdp``: Opacus' Renyi bound, looser (Mironov 2017, arXiv
            1702.07476). ``gdp``: a central limit that may be too small (Bu, Dong, Long, Su 2019, arXiv 1911.11607).

    Raises:
        UserError: A number is out of its range, the accountant is unknown, or it fails.
    """
    return account(noise_multiplier, sample_rate, steps, delta, accountant)[0]


def account(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: Accountant = "prv"
) -> tuple[float, str]:
    """Return `epsilon`, and which accountant it is of: the one asked for, or ``exact`` or ``rdp`` instead of ``prv``.

    Raises:
        UserError: A number is out of its range, the accountant is unknown, or it fails.
    """
    if not 0 < noise_multiplier < math.inf:
        raise UserError(f"noise_multiplier: expected a number more than 0, got {noise_multiplier}; write 1.0")
    if not 0 < sample_rate <= 1:
        raise UserError(f"sample_rate: expected more than 0 and at most 1, got {sample_rate}; write 0.01")
    if not 0 <= steps <= MOST_STEPS:
        raise UserError(f"steps: expected 0 to {MOST_STEPS}, got {steps}; write 1000")
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise UserError(f"accountant: expected one of {', '.join(ACCOUNTANTS)}, got {accountant!r}; write prv")
    if steps == 0:
        return 0.0, "exact"
    if accountant == "prv" and sample_rate == 1:
        return gdp_epsilon(math.sqrt(steps) / noise_multiplier, delta), "exact"
    if accountant == "gdp":
        return gdp_epsilon(_central_limit(noise_multiplier, sample_rate, steps), delta), "gdp"
    try:
        found, used = _opacus(noise_multiplier, sample_rate, steps, delta, accountant)
    except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        found, used = math.nan, str(error)
    if math.isnan(found):
        raise UserError(
            f"{accountant}: expected numbers that Opacus can account for, got noise_multiplier {noise_multiplier}, "
            f"sample_rate {sample_rate}, steps {steps}, delta {delta} ({used}); write a noise multiplier of 0.1 to 100"
        )
    return max(found, 0.0), used


def _opacus(noise: float, sample_rate: float, steps: int, delta: float, accountant: str) -> tuple[float, str]:
    """Return epsilon by Opacus and the accountant: Renyi in place of PRV where that would be too slow or coarse."""
    with warnings.catch_warnings():  # of logarithms of 0 at the rim of a grid, of orders
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        history = [(noise, sample_rate, steps)]
        renyi = RDPAccountant()
        renyi.history = history
        # Seconds for the series of each fractional order, and PRV needs all of them.
        slow = noise > 20 and sample_rate < 1 and noise * abs(math.log(1 / sample_rate - 1)) < 10
        orders = [order for order in (*NEAR_ONE, *RDPAccountant.DEFAULT_ALPHAS) if not slow or order == int(order)]
        bound = float(renyi.get_epsilon(delta, alphas=orders))
        if accountant == "prv" and not slow:
            # What PRVAccountant._get_domain and compute_safe_domain_size will choose.
            once = RDPAccountant()
            once.history = [(noise, sample_rate, 1)]
            half = float(max(renyi.get_epsilon(delta / 4000), once.get_epsilon(delta / 8000 / steps))) + 3
            error = max(0.01, 2 * half * math.sqrt(steps * math.log(12000 / delta) / 2) / POINTS)
            if half <= WIDEST and error <= max(0.01, 0.005 * bound):
                numerical = PRVAccountant()
                numerical.history = history
                with suppress(RuntimeError, ValueError):  # where delta is as small as rounding, or epsilon is 0
                    return float(numerical.get_epsilon(delta, eps_error=error)), "prv"
        return bound, "rdp"


def _central_limit(noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """Return mu of many sampled steps, as Opacus' compute_mu_poisson does; inf where that overflows."""
    exponent = (1 / noise_multiplier) ** 2 if noise_multiplier > 1e-100 else math.inf
    return math.sqrt(math.expm1(exponent) * steps) * sample_rate if exponent < 600 else math.inf


def gdp_delta(mu: float, epsilon: float) -> float:
    """Return the least delta of mu-GDP at epsilon >= 0 (Dong, Roth, Su 2019, arXiv 1905.02383, corollary 2.13)."""
    if mu == 0:
        return 0.0
    # exp(epsilon) ndtr(-mu / 2 - epsilon / mu), of which neither factor can be told where they are extreme.
    second = math.exp(-((mu / 2 - epsilon / mu) ** 2) / 2) * erfcx((mu / 2 + epsilon / mu) / math.sqrt(2)) / 2
    return float(ndtr(mu / 2 - epsilon / mu) - second)


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon, at least 0, of mu-GDP at delta, exactly; inf where mu is, or above 1e150.

    Args:
        mu: Sensitivity over standard deviation, at least 0.
        delta: Probability that the promise fails.

    Raises:
        UserError: Mu is negative, or ``delta`` is 0, where there is no epsilon, or no probability.
    """
    if not mu >= 0:
        raise UserError(f"mu: expected at least 0, got {mu}; write 1.0")
    _check_delta(delta)
    if mu > 1e150:  # its square overflows
        return math.inf
    if gdp_delta(mu, 0.0) <= delta:
        return 0.0
    most = mu * mu / 2 + mu * float(-ndtri(delta))  # there the first term of delta alone is that small
    if mu > 1e6:  # the second term is below a part in 1e12
        return most
    return float(brentq(lambda epsilon: gdp_delta(mu, epsilon) - delta, 0.0, most + 1e-9, xtol=1e-12))


def chain_mu(chain: DefenseChain, protocol: Protocol, batch_size: int, *, layers: int | None = None) -> float | None:
    """Return mu of one example of a client, over all rounds: what it sends is mu-GDP where that example is replaced.

    What a chain declares holds for one update; mu grows with the root of how often an example takes part. Where noise
    is added in each of several local steps, what is sent is computed from noisy gradients alone, and each step that
    has the example in its batch counts: all with ``batches: same``, one with ``fresh``. An example is taken to be in
    the batch of every round, and a batch to be fixed, so that nothing is gained by sampling.

    Args:
        chain: The client's defenses.
        protocol: What it does and sends.
        batch_size: B of the client.
        layers: How many layers the model has, where known; ``fed_cdp`` promises nothing without.

    Returns:
        Mu; None where nothing is declared, or sensitivity is unbounded, or there is no noise.
    """
    times = protocol.rounds
    mechanism = chain.mechanism(protocol, batch_size, layers=layers)
    if mechanism is None and protocol.local_steps > 1 and not protocol.send_buffers:
        # What acts on the update afterwards must be known to look at it alone, as what declares a mechanism does.
        after = [part for part in chain.parts if part.overrides("update")]
        single = protocol.model_copy(update={"sends": "gradient", "local_steps": 1})
        if all(type(chain)([part]).mechanism(single, batch_size, layers=layers) for part in after):
            before = type(chain)([part for part in chain.parts if part not in after])
            mechanism = before.mechanism(single, batch_size, layers=layers)
            times *= -(-protocol.local_steps // protocol.local_batches)
    if mechanism is None or mechanism.std == 0 or math.isinf(mechanism.example):
        return None
    return mechanism.mu_example * math.sqrt(times)


def chain_epsilon(
    chain: DefenseChain, protocol: Protocol, batch_size: int, delta: float, *, layers: int | None = None
) -> float | None:
    """Return epsilon of one replaced example of a client, over all its rounds; None where nothing is promised.

    See `chain_mu`.
    """
    mu = chain_mu(chain, protocol, batch_size, layers=layers)
    _check_delta(delta)
    return None if mu is None else gdp_epsilon(mu, delta)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta: expected a probability in (0, 1), got {delta}; write delta=1e-5")

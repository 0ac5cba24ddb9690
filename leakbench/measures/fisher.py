"""What an update with Gaussian noise says about the images, by its Fisher information J^T J / std^2."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from leakbench.errors import NotApplicable
from leakbench.measures.fitted import mean_with_interval
from leakbench.measures.jacobian import Jacobian, by_trial, ratio
from leakbench.measures.noise import noisy
from leakbench.measures.sensitivity import frobenius
from leakbench.measures.spectrum import grams, top, trials_of_grams
from leakbench.measures.subject import ALL, Profile, Subject

LARGEST = 1.0
"""Greatest bound on a mean squared error that is stated: intensities lie in [0, 1], where no error is greater.

Where some direction does not show in the update at all, no attacker is unbiased, and the bound would be infinite: means
over trials would be made of those few.
"""

_SINGULAR = 1e-12


def fisher(subject: Subject, *, probes: int = 64, iterations: int = 32) -> dict[str, Profile]:
    """Return Fisher information leakage under the noise that the defense declares.

    Information of independent rounds from one model adds up, so that both grow with the rounds that an honest server
    sees. ||J||_F^2 is estimated as in `leakbench.measures.sensitivity`, s_1 approached from below by Lanczos steps.

    Args:
        subject: Whose clients.
        probes: Products with the Jacobian per trial.
        iterations: Lanczos steps.

    Raises:
        NotApplicable: The defense declares no noise.
    """
    precision = _precision(subject)

    def compute(jacobian: Jacobian) -> dict[str, Tensor]:
        energy, greatest = _information(jacobian, probes, iterations)
        information = energy / jacobian.size * precision
        return {
            "fil_eta": greatest[:, None] * precision**0.5,
            "dfil": information,
            "mse_bound_unbiased": _inverse(information[:, -1:]),
        }

    return _profiles(subject, by_trial(subject, compute))


def reference_fisher(
    subject: Subject, *, probes: int = 64, iterations: int = 32, reference_noise: float = 1e-3
) -> dict[str, Profile]:
    """Return the same numbers as if noise of a given relative size had been added to what is sent.

    Without noise the information is infinite; under a noise of so many root mean squares of the update it compares
    trials, layers and defenses. It bounds nothing: nobody adds that noise.

    Args:
        subject: Whose clients.
        probes: Products with the Jacobian per trial.
        iterations: Lanczos steps.
        reference_noise: Standard deviation in units of the root mean square of the whole update.
    """

    def compute(jacobian: Jacobian) -> dict[str, Tensor]:
        energy, greatest = _information(jacobian, probes, iterations)
        std = reference_noise * torch.cat(list(jacobian.update.values()), 1).double().square().mean(1).sqrt()[:, None]
        information = ratio(energy / jacobian.size, std.square())
        return {
            "reference_fil_eta": ratio(greatest[:, None], std),
            "reference_dfil": information,
            "reference_mse": _inverse(information[:, -1:]),
        }

    return _profiles(subject, by_trial(subject, compute))


def cramer_rao(subject: Subject, *, exact: int = 256) -> dict[str, Profile]:
    """Return the Cramer-Rao bound of unbiased attackers under the declared noise, from the whole Jacobian.

    Args:
        subject: Whose clients.
        exact: Most pixels of a trial; it takes a product with the Jacobian for each.

    Raises:
        NotApplicable: The defense declares no noise, or there are more pixels.
    """
    precision, size = _precision(subject), subject.images[0].numel()
    if size > exact:
        raise NotApplicable(f"cramer_rao takes at most {exact} pixels, got {size}; fisher takes any number")

    def compute(jacobian: Jacobian) -> dict[str, Tensor]:
        whole = sum((gram for _, gram in grams(jacobian)), torch.zeros(()))
        return {"mse_bound_cramer_rao": unbiased_error(whole * precision)[:, None]}

    return _profiles(subject, by_trial(subject, compute, trials_of_grams(subject)))


def bayes_cramer_rao(subject: Subject, *, probes: int = 64, train: int = 256) -> dict[str, Profile]:
    """Return the van Trees bound on the mean squared error of any attacker, biased ones too.

    On the mean over images that were drawn from the prior: a Gaussian with the mean and the shrunken covariance
    (`ledoit_wolf_precision`) of the auxiliary images, whose own Fisher information is tr(Sigma^-1) / d. The bound
    assumes that prior; real images are no Gaussian, and an attacker who knows better may do better.

    Args:
        subject: With auxiliary trials.
        probes: Products with the Jacobian per trial.
        train: Auxiliary trials; the prior is fitted to the first image of each. Few images make a tighter prior than
            there is, and so a lower bound; the interval does not hold that.

    Raises:
        NotApplicable: The defense declares no noise, or there are no auxiliary trials or fewer than two of either.
    """
    precision, auxiliary = _precision(subject), subject.auxiliary
    if auxiliary is None or min(auxiliary.trials, subject.trials) < 2:
        raise NotApplicable(f"needs two trials and two auxiliary ones, of train={train}")
    found = by_trial(subject, partial(_whole_energy, probes=probes))["energy"] / subject.images[0].numel() * precision
    # One image of each trial, so that the prior does not depend on the batch size.
    prior = ledoit_wolf_precision(auxiliary.images[:, 0].flatten(1))
    mean = mean_with_interval(found.cpu().numpy(), "bayes_cramer_rao")
    value, high, low = (torch.tensor([van_trees(end, prior)], dtype=torch.float64) for end in mean)
    blind = torch.tensor([van_trees(0.0, prior)], dtype=torch.float64)
    return {
        "mse_bound_bayes": Profile((ALL,), value, low, high, n=subject.trials),
        "mse_bound_prior": Profile((ALL,), blind, n=subject.trials),
    }


def unbiased_error(information: Tensor) -> Tensor:
    """Return tr(I^-1) / d (T,), the least mean squared error of unbiased attackers (Cramer-Rao).

    Args:
        information: (T, d, d) Fisher information I. Where it is singular, and beyond it, the result is `LARGEST`.
    """
    values = torch.linalg.eigvalsh(information.double())
    regular = values[:, 0] > _SINGULAR * values[:, -1]
    error = torch.where(regular[:, None], values, 1).reciprocal().mean(1)
    return torch.where(regular, error.clamp_max(LARGEST), LARGEST)


def van_trees(information: float, prior: float) -> float:
    """Return 1 / (E[dFIL] + tr(J_prior) / d), the van Trees bound on the mean squared error per number.

    Args:
        information: Mean of tr(I) / d over the prior.
        prior: Mean Fisher information of the prior per number.
    """
    return 1 / (information + prior)


def ledoit_wolf_precision(images: Tensor) -> float:
    """Return tr(Sigma^-1) / d of images (N, d) with the covariance of Ledoit and Wolf (2004, J. Multivar. Anal. 88).

    Sigma = (1 - s) S + s mu I needs no (d, d) matrix: S shares its eigenvalues with the products of the N images, and
    all others are 0.
    """
    centred = (images - images.mean(0)).double()
    count, size = centred.shape
    gram = centred @ centred.T / count
    scale, squares = gram.trace() / size, gram.square().sum()
    spread = squares / size - scale.square()
    noise = ((count * gram.diagonal()).square().sum() / count - squares) / (count * size)
    shrinkage = float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0
    own = torch.linalg.eigvalsh(gram).clamp_min(0).sort(descending=True).values[: min(count, size)]
    seen = ((1 - shrinkage) * own + shrinkage * scale).reciprocal().sum()
    return float((seen + (size - len(own)) / (shrinkage * scale)) / size)


def _precision(subject: Subject) -> float:
    return subject.cohort.protocol.rounds / noisy(subject.cohort, len(subject.layers)).std ** 2


def _whole_energy(jacobian: Jacobian, probes: int) -> dict[str, Tensor]:
    return {"energy": frobenius(jacobian, probes, "fisher").sum(1)}


def _information(jacobian: Jacobian, probes: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Return ||J_l||_F^2 (T, L + 1), the whole last, and s_1 (T,)."""
    energy = frobenius(jacobian, probes, "fisher")
    return torch.cat([energy, energy.sum(1, keepdim=True)], 1), top(jacobian, iterations)


def _inverse(information: Tensor) -> Tensor:
    return information.clamp_min(1 / LARGEST).reciprocal()


def _profiles(subject: Subject, found: dict[str, Tensor]) -> dict[str, Profile]:
    return {k: Profile((ALL,) if v.shape[1] == 1 else (*subject.layers, ALL), v) for k, v in found.items()}

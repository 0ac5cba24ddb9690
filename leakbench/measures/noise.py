"""What the clients behind an update promise together."""

from __future__ import annotations

from leakbench.errors import NotApplicable
from leakbench.measures.subject import Clients
from leakbench.mechanism import Mechanism, averaged


def promised(cohort: Clients, layers: int) -> Mechanism | None:
    """Return what the mean of the cohort's updates promises in one round; None where a client's defense declares none.

    Args:
        cohort: The clients; their noises are independent.
        layers: How many layers the model has.
    """
    each = [client.defense.mechanism(client.protocol, client.batch_size, layers=layers) for client in cohort.clients]
    known = [mechanism for mechanism in each if mechanism is not None]
    return averaged(known, cohort.weights) if len(known) == len(each) else None


def noisy(cohort: Clients, layers: int) -> Mechanism:
    """Return what a cohort promises that adds noise; see `promised`.

    Raises:
        NotApplicable: It declares none.
    """
    mechanism = promised(cohort, layers)
    if mechanism is None or mechanism.std == 0:
        raise NotApplicable(
            "the defense declares no Gaussian noise on what is sent (noise in one of several local steps is none); try "
            "dp_sgd with one step, or clip_l2+gaussian_noise"
        )
    return mechanism

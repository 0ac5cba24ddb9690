"""Clients compare what they got."""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, register


@register("consistency_check", version=1)
class ConsistencyCheck(Defense):
    """Consistency check: a client refuses unless all clients of the cohort got the same model, by its hash.

    Stops attacks that send each client its own model, which is how they tell clients apart behind secure aggregation
    (gradient suppression, BatchNorm fishing, LOKI). Does not stop one malicious model that all clients get (imprint
    layers, trap weights, class fishing), nor anything where there is one client only. Costs no accuracy and one hash.
    The hashes have to reach the clients unaltered: by a public board or signed by the clients, not through the server.

    Acts on: whether the client takes part.

    Reference: Pasquini, Francati, Ateniese, "Eluding Secure Aggregation in Federated Learning via Model
    Inconsistency", CCS 2022, arXiv 2111.07380
    """

    acts_on = frozenset({"accept"})
    adaptive = ("robbing_the_fed", "fishing", "learned_labels")

    def accept(self, ctx: DefenseContext) -> Tensor:
        """Refuse where hashes differ."""
        return torch.full(ctx.labels.shape[:1], len(set(ctx.digests)) <= 1, device=ctx.labels.device)

"""Floor of image attacks: what the data look like on average."""

from __future__ import annotations

from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, register


@register("mean_image", version=1)
class MeanImage(Attack):
    """Mean image: the mean of the auxiliary data, claimed once for every private input.

    Sees: auxiliary data, the number of inputs; no update.

    Reference: none; the best constant guess under squared error
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"auxiliary", "batch_size"})
    reads = ()

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Average the auxiliary inputs into ``mean`` (*input_shape)."""
        inputs, _ = knowledge.auxiliary
        return {"mean": inputs.mean(0)}

    def run(self, observation: Observation) -> Recovery:
        """Claim the mean for all inputs (T, K * N, *input_shape)."""
        mean = observation.prepared["mean"]
        candidates = observation.total_inputs
        return Recovery(inputs=mean.expand(observation.trials, candidates, *mean.shape))

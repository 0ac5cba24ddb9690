"""Floor of image attacks: noise."""

from __future__ import annotations

from leakbench import Attack, Observation, Recovery, register


@register("random_image", version=1)
class RandomImage(Attack):
    """Random image: every pixel drawn uniformly between the least and the greatest valid value.

    Sees: the shape, the bounds and the number of inputs; no update.

    Reference: none; the floor that every reconstruction has to beat
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size"})
    reads = ()

    def run(self, observation: Observation) -> Recovery:
        """Draw inputs (T, K * N, *input_shape)."""
        candidates = observation.inputs_per_client * observation.clients
        pixels = observation.rand(candidates, *observation.input_spec.shape)
        low, high = (bound.to(pixels.device) for bound in observation.bounds)
        return Recovery(inputs=low + (high - low) * pixels)

"""The Bayesian attack that adapts itself to a defense by what the defense declares."""

from __future__ import annotations

import math

from leakbench import Knowledge, NotGranted, UserError, register
from leakbench.inversion import (
    Adam,
    Cosine,
    Defended,
    Inversion,
    InversionAttack,
    Likelihood,
    OneStep,
    TotalVariation,
)


@register("bayes_adaptive", version=1)
class BayesAdaptive(InversionAttack):
    """Bayes adaptive: searches the images that are most probable given what the defense made of their update.

    A defense is a conditional distribution of what is sent given the clean update. Its logarithm, or a score in its
    place, where the defense declares one (squared distance under Gaussian noise, absolute under Laplace noise,
    agreement of signs, distance from intervals of quantisation, ...), plus a total variation prior is maximised as in
    Inverting Gradients. What a simulated defense does (to the batch, the labels or each example's gradient) is done by
    the simulated client too, with fresh draws in every step, and matched by cosine, so that of mixed inputs all
    constituents are recovered at once. Defenses that declare neither are not modelled. Of several restarts the most
    probable one is claimed.

    Sees: gradients of all layers, weights, number of inputs, the defense; labels where granted. Where the defense is
    withheld or changes no update, on an aggregate, and where local steps cannot be simulated, it is Inverting Gradients
    with its restarts: the cosine of the gradient of all inputs at the weights sent out.

    A re-implementation: the paper tunes steps, learning rate and weights of its priors for every defense, where one set
    serves all here. Likelihoods count per entry of the update, so that the prior's weight means the same on all nets.
    Step size and schedule are those of Inverting Gradients. So is the prior's weight where a defense declares a score
    of its own making; beside a log-density the prior is a log-density too, of Laplace differences between neighbours.
    A candidate's update is taken at its best scale, without which the search is slower than one by cosine.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier.
        tv: Weight of the total variation beside a cosine or a surrogate.
        smoothness: The same beside a log-density: minus its logarithm for each unit of absolute difference between
            neighbouring pixels.
        lr: Learning rate of Adam.
        restarts: Random initialisations.
        samples: Draws of a random defense that a step averages.
        labels: Label attack that runs first where labels are not granted.

    Reference: Balunović, Dimitrov, Staab, Vechev, "Bayesian Framework for Gradient Leakage", ICLR 2022,
    arXiv 2111.04706
    """

    def __init__(
        self,
        *,
        steps: int = 4800,
        tv: float = 1e-4,
        smoothness: float = 0.5,
        lr: float = 0.1,
        restarts: int = 1,
        samples: int = 1,
        labels: str = "llg",
    ) -> None:
        if samples < 1:
            raise UserError(f"bayes_adaptive: samples: expected at least 1, got {samples}; write samples=1")
        self.steps = steps
        self.tv = tv
        self.smoothness = smoothness
        self.lr = lr
        self.restarts = restarts
        self.samples = samples
        self.labels = labels
        self.inversion = self._with(OneStep(), Cosine(), tv)

    def fitted(self, knowledge: Knowledge) -> Inversion:
        """Return the inversion that knows the defense, or the plain one where there is none to know."""
        try:
            known = [part for part in knowledge.defense.parts if part.likelihood is not None]
            if knowledge.sends != "gradient":
                _ = knowledge.lr, knowledge.local_steps
        except NotGranted:
            return self.inversion
        if not known or knowledge.clients > 1:
            return self.inversion
        draws = any(part.draws for part in knowledge.defense.inside.parts)
        weight = self.tv
        if knowledge.defense.scored_by == "density":
            parameters = knowledge.model.parameters
            entries = sum(value[0].numel() for name, value in parameters.items() if name not in knowledge.withheld)
            # The prior of a mean over pixels, beside a mean over entries of the update.
            weight = self.smoothness * knowledge.total_inputs * math.prod(knowledge.input_spec.shape) / max(1, entries)
        return self._with(Defended(samples=self.samples if draws else 1, scaled=True), Likelihood(), weight)

    def _with(self, source: OneStep | Defended, objective: Cosine | Likelihood, weight: float) -> Inversion:
        return Inversion(
            objective=objective,
            priors=(TotalVariation(weight=weight),),
            optimiser=Adam(lr=self.lr, sign="hard", schedule="steps"),
            steps=self.steps,
            restarts=self.restarts,
            labels=self.labels,
            source=source,
        )

"""Where the gradients of candidates come from: the weights sent out, all local steps, or weights between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.errors import NotApplicable
from leakbench.inversion.objectives import Comparison, Cosine, Units
from leakbench.inversion.rows import Rows, unit_direction
from leakbench.knowledge import Knowledge
from leakbench.observation import Observation


class Source(ABC):
    """Turns candidates into gradients that can be compared with the update."""

    def check(self, knowledge: Knowledge) -> None:  # noqa: ARG002  (neutral default)
        """Decline what cannot be done, before an update is seen.

        Raises:
            NotApplicable: The task does not suit it.
            NotGranted: Something it needs is withheld.
        """
        return

    def target(self, observation: Observation, units: Units) -> dict[str, Tensor]:
        """Return what gradients are compared with, (T, *shape) by parameter name."""
        if units == "gradient":
            return {name: value * _per_step(observation) for name, value in observation.gradient.items()}
        difference = observation.difference(observation.update)
        return difference if units == "difference" else unit_direction(difference)

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  (neutral default)
        """Return start values (Q,) of scalars that are optimised together with the inputs; ``like`` is (Q,)."""
        return {}

    def project(self, leaves: Mapping[str, Tensor]) -> None:  # noqa: ARG002  (neutral default)
        """Put these scalars back into their range after a step."""
        return

    def evaluations(self, knowledge: Knowledge) -> int:  # noqa: ARG002
        """Return the gradient evaluations of one comparison."""
        return 1

    @abstractmethod
    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return gradients (Q, *shape) by the names of ``rows.target``, differentiable.

        Args:
            rows: What is known.
            inputs: (Q, N, *input_shape).
            labels: Classes (Q, N) or probabilities (Q, N, C).
            unknowns: Scalars (Q,) by name.
        """

    def compare(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,
        unknowns: Mapping[str, Tensor],
        *,
        elementwise: bool,  # noqa: ARG002  (whoever has a cheaper way without gradients overrides this)
    ) -> Comparison:
        """Compare the candidates' gradients with the target."""
        found = self.gradients(rows, inputs, labels, unknowns)
        pairs = tuple((found[name].flatten(1), goal.flatten(1)) for name, goal in rows.target.items())
        return Comparison(rows.goal, pairs)


class OneStep(Source):
    """The gradient of all inputs at the weights that were sent out."""

    def gradients(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,
        unknowns: Mapping[str, Tensor],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `Source.gradients`."""
        return rows.observation.gradients(inputs, labels, names=list(rows.target), model=rows.model)

    def compare(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor], *, elementwise: bool
    ) -> Comparison:
        """Compare the candidates' gradients with the target, by inner products where those suffice."""
        if elementwise:
            return super().compare(rows, inputs, labels, unknowns, elementwise=elementwise)
        products = rows.observation.gradient_products(inputs, labels, rows.target, model=rows.model)
        return Comparison(rows.goal, products=products)


@dataclass(frozen=True, kw_only=True)
class Unrolled(Source):
    """The update of the client itself, all local steps differentiated through (Inverting Gradients' FedAvg attack).

    Batches are taken in the order of the inputs, unless the threat model grants the true order.

    Args:
        lr: A guess where the learning rate is withheld; None declines such tasks.
        local_steps: A guess where their number is withheld; None declines such tasks.
    """

    lr: float | None = None
    local_steps: int | None = None

    def check(self, knowledge: Knowledge) -> None:
        """Decline an aggregate, and a task that withholds what is not guessed."""
        if knowledge.clients > 1:
            raise NotApplicable("unrolling follows the local steps of one client; here several are added up")
        if knowledge.sends != "gradient":
            _ = self.lr or knowledge.lr, self.local_steps or knowledge.local_steps

    def evaluations(self, knowledge: Knowledge) -> int:
        """Return the number of local steps."""
        return 1 if knowledge.sends == "gradient" else self.local_steps or knowledge.local_steps

    def target(self, observation: Observation, units: Units) -> dict[str, Tensor]:
        """Return the raw update: what the simulated client would send."""
        difference = observation.difference(observation.update)
        return unit_direction(difference) if units == "direction" else difference

    def order(self, rows: Rows) -> Tensor | None:
        """Return which inputs every local step takes, (Q, local_steps, batch); None for the order of the inputs."""
        seen = rows.observation
        return rows.spread(seen.batch_order[:, 0]) if seen.grants("batch_order") else None

    def gradients(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,
        unknowns: Mapping[str, Tensor],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return simulated updates by name; see `Source.gradients`."""
        seen = rows.observation
        sent = seen.simulate(
            inputs,
            labels,
            create_graph=True,
            order=self.order(rows),
            defended=False,
            lr=self.lr,
            local_steps=self.local_steps,
            model=rows.model,
        )
        moved = seen.difference(sent, model=rows.model)
        return {name: moved[name] for name in rows.target}


@dataclass(frozen=True, kw_only=True)
class Defended(Unrolled):
    """The task's own client with what an adversary simulates of its defense, scored by what the defense declares.

    Where it declares no likelihood, the cosine of what the simulated client sends takes its place. A defense that draws
    does so anew in every comparison, so that the mean over the comparisons is an expectation over its draws.

    Args:
        samples: Draws that one comparison averages.
        scaled: Whether a likelihood is that of the best scale of what the candidates send, as of a direction. It loses
            one number of an update's thousands, and is as easy to descend as a cosine.
    """

    samples: int = 1
    scaled: bool = False

    def check(self, knowledge: Knowledge) -> None:
        """Decline an aggregate, and a task that withholds what a simulated client needs."""
        _ = knowledge.defense
        super().check(knowledge)

    def evaluations(self, knowledge: Knowledge) -> int:
        """Return the number of local steps, times the draws and the rounds that are scored."""
        rounds = knowledge.rounds if knowledge.defense.scored_by is not None else 1
        return self.samples * rounds * super().evaluations(knowledge)

    def gradients(
        self,
        rows: Rows,
        inputs: Tensor,
        labels: Tensor,
        unknowns: Mapping[str, Tensor],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return simulated updates by name; see `Source.gradients`."""
        seen = rows.observation
        sent = seen.simulate(inputs, labels, create_graph=True, order=self.order(rows), inside=True, model=rows.model)
        moved = seen.difference(sent, model=rows.model)
        return {name: moved[name] for name in rows.target}

    def compare(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor], *, elementwise: bool
    ) -> Comparison:
        """Score the update; a cosine of 1 scores 0 where no likelihood is declared."""
        seen = rows.observation
        sent = [{name: rows.spread(update[name]) for name in rows.target} for update in seen.updates]
        entries = sum(value[0].numel() for update in sent for value in update.values())
        scores = []
        for _ in range(self.samples):
            if seen.defense.scored_by is not None:
                order, scaled = self.order(rows), self.scaled
                scores.append(
                    seen.log_likelihood(sent, inputs, labels, order=order, model=rows.model, scaled=scaled) / entries
                )
            else:
                simulated = super().compare(rows, inputs, labels, unknowns, elementwise=elementwise)
                scores.append(-Cosine()(simulated, unknowns))
        return Comparison(rows.goal, likelihood=torch.stack(scores).mean(0))


@dataclass(frozen=True, kw_only=True)
class Surrogate(Source):
    """One gradient at (1 - alpha) W_t + alpha W_t+1, alpha optimised as well (Zhu et al. 2023, SME).

    Args:
        alpha: Where alpha starts; 0 is the gradient at the weights that were sent out.
    """

    alpha: float = 0.5

    def check(self, knowledge: Knowledge) -> None:
        """Decline a single gradient: there are no weights between."""
        if knowledge.sends == "gradient":
            raise NotApplicable("a surrogate lies between weights before and after local steps; a gradient is sent")

    def unknowns(self, like: Tensor) -> dict[str, Tensor]:
        """Return the start value of alpha, (Q,)."""
        return {"alpha": torch.full_like(like, self.alpha)}

    def project(self, leaves: Mapping[str, Tensor]) -> None:
        """Keep alpha between 0 and 1."""
        with torch.no_grad():
            leaves["alpha"].clamp_(0, 1)

    def gradients(
        self, rows: Rows, inputs: Tensor, labels: Tensor, unknowns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return gradients by name; see `Source.gradients`."""
        seen = rows.observation
        moved = {name: rows.spread(value) for name, value in seen.difference(seen.update).items()}
        alpha = unknowns["alpha"]
        between = {
            name: rows.model.parameters[name] - alpha.view(-1, *(1,) * (value.dim() - 1)) * value
            for name, value in moved.items()
        }
        model = rows.model.with_state(parameters=between)
        return seen.gradients(inputs, labels, names=list(rows.target), model=model)


def _per_step(observation: Observation) -> float:
    """Return what turns the sum of the local steps' gradients, averaged over clients, into one of all inputs' batch."""
    steps = 1 if observation.sends == "gradient" else observation.local_steps
    if observation.reduction == "mean":
        return 1 / steps
    return observation.clients * observation.inputs_per_client / observation.batch_size / steps

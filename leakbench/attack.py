"""What an attack is: the class a submitter derives from, and the claim it returns."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.entry import Entry
from leakbench.errors import InvalidOutput
from leakbench.knowledge import Knowledge
from leakbench.models.functional import Model
from leakbench.observation import Cohort, Observation
from leakbench.tasks import INFERENCE

NOTE = "note/"
"""Leads the names of `Recovery.notes` among the claimed tensors."""

TRACE_LIMIT = 200
"""Most entries of a visible-loss trace."""

FACTS = frozenset({"head_bias", "nonnegative_features", "single_example", "four_classes"})
"""Facts of the task among `NEEDS`: nothing that a threat model could withhold."""

NEEDS = FACTS | {
    "labels",
    "batch_size",
    "lr",
    "local_steps",
    "batch_order",
    "label_prior",
    "weights",
    "defense",
    "auxiliary",
    "bn_statistics",
    "change_parameters",
    "per_client",
    "change_architecture",
}
"""What `Attack.needs` may name: grants of the threat model, and `FACTS` of the task."""

NOTES_LIMIT = 8
"""Most numbers of `Recovery.notes`."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The attacker's claim about the private data of T trials.

    Args:
        label_counts: (T, K, C) integer counts of each class behind each client; (T, 1, C) where the attack cannot
            attribute labels to clients and claims the union.
        inputs: (T, n, *input_shape) recovered inputs in the model's input space, n <= N, in any order.
        scores: (T,) probability, in [0, 1], that the client has the attribute or the candidate.
        visible_loss: (T,) the attack's own objective at the end; never used for scoring.
        visible_loss_trace: (T, <= 200) the same along the way.
        model_evaluations: Gradient evaluations per trial; counted by the harness where None.
        notes: Up to `NOTES_LIMIT` further numbers by name, (T,) each or one for all: an estimated scale, the trials
            computed at once, ...; reported as they are, never used for scoring.
    """

    label_counts: Tensor | None = None
    inputs: Tensor | None = None
    scores: Tensor | None = None
    visible_loss: Tensor | None = None
    visible_loss_trace: Tensor | None = None
    model_evaluations: int | None = None
    notes: Mapping[str, Tensor | float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the claimed tensors by field name."""
        fields = ("label_counts", "inputs", "scores", "visible_loss", "visible_loss_trace")
        claimed = {name: value for name in fields if (value := getattr(self, name)) is not None}
        notes = {NOTE + name: torch.as_tensor(value) for name, value in self.notes.items()}
        return claimed | notes


@dataclass(frozen=True)
class RecoveryShape:
    """What a valid recovery of one block looks like.

    Args:
        trials: T.
        clients: K.
        inputs: Examples of all clients of a trial together.
        num_classes: C.
        input_shape: Shape of one input.
    """

    trials: int
    clients: int
    inputs: int
    num_classes: int
    input_shape: tuple[int, ...]

    def check(self, recovery: object, recovers: frozenset[str]) -> Recovery:
        """Return ``recovery`` with counts as int64, inputs as float32 and scores as float64 on the CPU.

        Raises:
            InvalidOutput: Wrong type, shape, dtype, count, a NaN or an infinity; the message names the field.
        """
        if not isinstance(recovery, Recovery):
            raise InvalidOutput(f"run() must return a Recovery, got {type(recovery).__name__}")
        for name, value in recovery.tensors().items():
            if not isinstance(value, Tensor):
                raise InvalidOutput(f"Recovery.{name}: expected a tensor, got {type(value).__name__}")
            if value.layout != torch.strided or value.device.type == "meta":
                raise InvalidOutput(f"Recovery.{name}: expected a dense tensor, got {value.layout} on {value.device}")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InvalidOutput(f"Recovery.{name}: holds NaN or infinity")
        return Recovery(
            label_counts=self._counts(recovery.label_counts) if "labels" in recovers else None,
            inputs=self._inputs(recovery.inputs) if "inputs" in recovers else None,
            scores=self._scores(recovery.scores) if recovers & INFERENCE else None,
            visible_loss=self._loss("visible_loss", recovery.visible_loss, (self.trials,)),
            visible_loss_trace=self._loss(
                "visible_loss_trace", recovery.visible_loss_trace, (self.trials, TRACE_LIMIT)
            ),
            model_evaluations=_evaluations(recovery.model_evaluations),
            notes=self._notes(recovery.notes),
        )

    def claim(self, tensors: Mapping[str, Tensor], evaluations: object, target: str) -> Recovery:
        """Rebuild and check a recovery that came over the process boundary.

        Raises:
            InvalidOutput: See `check`; also unknown tensors, or a count of evaluations that is none.
        """
        fields = {"label_counts", "inputs", "scores", "visible_loss", "visible_loss_trace"}
        notes = {name.removeprefix(NOTE): value for name, value in tensors.items() if name.startswith(NOTE)}
        claimed = {name: value for name, value in tensors.items() if not name.startswith(NOTE)}
        if not set(claimed) <= fields:
            raise InvalidOutput(f"sent {sorted(set(claimed) - fields)[0]!r}, which is no field of a Recovery")
        if evaluations is None:
            raise InvalidOutput("sent no count of model evaluations")
        recovery = Recovery(**claimed, model_evaluations=evaluations, notes=notes)  # type: ignore[arg-type]
        return self.check(recovery, frozenset({target}))

    def _notes(self, notes: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
        if len(notes) > NOTES_LIMIT:
            raise InvalidOutput(f"Recovery.notes: expected at most {NOTES_LIMIT}, got {len(notes)}")
        checked = {}
        for name, value in notes.items():
            numbers = torch.as_tensor(value).detach().to("cpu", torch.float32)
            if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) is None or tuple(numbers.shape) not in ((), (self.trials,)):
                shape = tuple(numbers.shape)
                raise InvalidOutput(
                    f"Recovery.notes: expected a name and ({self.trials},) numbers, got {name!r}, {shape}"
                )
            checked[name] = numbers.expand(self.trials).contiguous()
        return checked

    def _counts(self, counts: Tensor | None) -> Tensor:
        expected = f"({self.trials}, {self.clients} or 1, {self.num_classes})"
        if counts is None:
            raise InvalidOutput(f"Recovery.label_counts: expected integer counts {expected}, got None")
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise InvalidOutput(f"Recovery.label_counts: expected an integer dtype, got {counts.dtype}")
        allowed = {(self.trials, k, self.num_classes) for k in (1, self.clients)}
        if tuple(counts.shape) not in allowed:
            raise InvalidOutput(f"Recovery.label_counts: expected shape {expected}, got {tuple(counts.shape)}")
        counts = counts.detach().to("cpu", torch.int64)
        # A claim of 2**60 labels would overflow the scores; nobody holds more than a few times N.
        most = 1000 * self.inputs
        if bool((counts < 0).any()) or bool((counts > most).any()):
            raise InvalidOutput(f"Recovery.label_counts: expected counts in 0..{most}")
        return counts

    def _inputs(self, inputs: Tensor | None) -> Tensor:
        total = self.inputs
        expected = f"({self.trials}, at most {total}, {', '.join(map(str, self.input_shape))})"
        if inputs is None:
            raise InvalidOutput(f"Recovery.inputs: expected inputs {expected}, got None")
        if not inputs.is_floating_point():
            raise InvalidOutput(f"Recovery.inputs: expected a floating dtype, got {inputs.dtype}")
        shape = tuple(inputs.shape)
        if len(shape) != 2 + len(self.input_shape) or shape[0] != self.trials or shape[2:] != self.input_shape:
            raise InvalidOutput(f"Recovery.inputs: expected shape {expected}, got {shape}")
        if shape[1] > total:
            raise InvalidOutput(f"Recovery.inputs: at most {total} candidates per trial, got {shape[1]}")
        return _float32("inputs", inputs)

    def _scores(self, scores: Tensor | None) -> Tensor:
        expected = f"probabilities ({self.trials},)"
        if scores is None:
            raise InvalidOutput(f"Recovery.scores: expected {expected}, got None")
        if not scores.is_floating_point():
            raise InvalidOutput(f"Recovery.scores: expected a floating dtype, got {scores.dtype}")
        if tuple(scores.shape) != (self.trials,):
            raise InvalidOutput(f"Recovery.scores: expected {expected}, got shape {tuple(scores.shape)}")
        scores = scores.detach().to("cpu", torch.float64)
        if bool((scores < 0).any()) or bool((scores > 1).any()):
            raise InvalidOutput(
                f"Recovery.scores: expected {expected}, got values from {scores.min()} to {scores.max()}"
            )
        return scores

    def _loss(self, name: str, loss: Tensor | None, most: tuple[int, ...]) -> Tensor | None:
        if loss is None:
            return None
        if not loss.is_floating_point():
            raise InvalidOutput(f"Recovery.{name}: expected a floating dtype, got {loss.dtype}")
        shape = tuple(loss.shape)
        if len(shape) != len(most) or shape[0] != self.trials or any(a > b for a, b in zip(shape, most, strict=True)):
            expected = f"({self.trials},)" if len(most) == 1 else f"({self.trials}, at most {TRACE_LIMIT})"
            raise InvalidOutput(f"Recovery.{name}: expected shape {expected}, got {shape}")
        return _float32(name, loss)


def _float32(name: str, values: Tensor) -> Tensor:
    values = values.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InvalidOutput(f"Recovery.{name}: overflows float32")
    return values


def _evaluations(count: object) -> int | None:
    if count is not None and (not isinstance(count, int) or not 0 <= count < 1 << 62):
        raise InvalidOutput(f"Recovery.model_evaluations: expected a count, got {str(count)[:40]}")
    return count


class Attack(Entry, ABC):
    """One paper's attack. A subclass overrides `run`, and `prepare` or `plant` where the idea needs them."""

    recovers: ClassVar[frozenset[str]]
    """What it claims: ``labels``, ``inputs``, ``attribute``, ``membership``."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Names out of `NEEDS`; a task that lacks one gives ``not_applicable`` rows."""
    exact: ClassVar[bool] = False
    """Whether the inputs it returns are meant to be exact: ``recovered`` then takes 40 dB instead of 20."""
    reads: ClassVar[tuple[str, ...]] = ("*",)
    """Update tensors it reads: names, patterns, or ``head.weight`` / ``head.bias`` for the last linear layer.

    An attack that recovers both may read less for one target: ``("labels:head.weight", "inputs:*")``.
    """

    inserts: ClassVar[str | None] = None
    """Module of `leakbench.models.imprint` that is inserted in front of the net, as its submodule ``imprint``.

    Its parameters are the attack's own of the same names, and ``clients`` (K); before planting it is the identity.
    """

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:  # noqa: ARG002  (neutral default of a hook)
        """Compute what depends on the model alone; called once per (attack, defense, model), sees no update.

        Returns:
            Tensors of any names, given to each `run` as ``observation.prepared``.

        Raises:
            NotApplicable: The attack cannot work on such a task, e.g. a closed form for another kind of net. Only here,
                where no update was seen, may an attack decline: its rows are ``not_applicable`` with the reason. A
                `NotGranted` that is raised here counts as the same.
        """
        return {}

    def plant(
        self,
        model: Model,  # noqa: ARG002
        cohort: Cohort,  # noqa: ARG002
        history: Sequence[Mapping[str, Tensor]],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Choose the parameters that are sent to the clients (malicious server only); called once a round.

        Args:
            model: The honest global model, with the module that `inserts` names.
            cohort: What is known of the clients, and what was prepared.
            history: What earlier rounds granted, an update per round, tensors (T, *shape) by name.

        Returns:
            Only the parameters it replaces, each with a leading dimension of 1 (all clients) or K (one per client;
            needs ``per_client``). Where K = 1 every trial is a client, so that it may also be T; behind an aggregate
            all trials get the same, whatever weights each has of its own.
        """
        return {}

    @abstractmethod
    def run(self, observation: Observation) -> Recovery:
        """Recover what `recovers` names for all T trials at once.

        Args:
            observation: Everything the threat model grants.
        """

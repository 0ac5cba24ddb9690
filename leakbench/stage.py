"""How far a model was trained: stages by name, and papers' own schedules of SGD. No torch here."""

from __future__ import annotations

import json
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from leakbench.errors import did_you_mean
from leakbench.parts import Part

STAGES = ("untrained", "early", "mid", "converged", "pretrained")
"""Stages by name; the others are runs of SGD, see `SGDStage`."""

IN_TRAINING = "in_training"
"""The stage of updates that a federated training kept as they were sent, each with the model that it answered."""


class SGDStage(Part):
    """A model after some steps of SGD on the private split, written ``sgd(steps=100, ...)``: papers' own schedules.

    Batches are drawn without replacement within a pass over the split; the last, smaller batch of a pass is left out.
    """

    steps: Annotated[int, Field(ge=1)]
    """Steps."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples per step."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Nesterov momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 weight decay."""
    drops: bool = False
    """Whether the learning rate drops tenfold after 3/8, 5/8 and 7/8 of the steps."""
    augment: bool = False
    """Whether images are padded by 4 black pixels, cropped at random and flipped left to right half of the time."""

    @classmethod
    def parse(cls, stage: str) -> SGDStage | None:
        """Return what ``stage`` spells, or None where it is a name.

        Raises:
            ValueError: It is neither a name nor an ``sgd(...)`` that can be read.
        """
        if stage in (*STAGES, IN_TRAINING):
            return None
        inner = re.fullmatch(r"sgd\((.*)\)", stage.replace(" ", ""))
        fields = [part.partition("=") for part in inner[1].split(",")] if inner else []
        try:
            return cls.model_validate_json(json.dumps({key: json.loads(value) for key, _, value in fields}))
        except ValueError:
            options = ", ".join(list(cls.model_fields)[1:])
            raise ValueError(
                f"stage: expected {', '.join(STAGES)}, or sgd(steps=N) with any of {options}, e.g. "
                f"sgd(steps=100, lr=0.1, batch_size=8); got {stage!r}.{did_you_mean(stage, STAGES)}"
            ) from None

    @property
    def label(self) -> str:
        """Short name, e.g. ``sgd100`` or ``sgd100-batch_size128``."""
        changed = self.model_dump(exclude_defaults=True, exclude={"steps"})
        return f"sgd{self.steps}" + "".join(f"-{key}{value}" for key, value in changed.items())

    def __str__(self) -> str:
        changed = self.model_dump(exclude_defaults=True)
        return "sgd(" + ", ".join(f"{key}={json.dumps(value)}" for key, value in changed.items()) + ")"


def stage_order(stage: str) -> tuple[int, int, str]:
    """Return where a stage stands among others: those by name, then runs of SGD by their steps, then `IN_TRAINING`."""
    sgd = SGDStage.parse(stage)
    if sgd is None and stage == IN_TRAINING:
        return (2, 0, stage)
    return (1, sgd.steps, stage) if sgd else (0, STAGES.index(stage), stage)


def _stage(value: str) -> str:
    """Return the one spelling of a stage, so that equal stages have equal hashes."""
    return str(SGDStage.parse(value) or value)


Stage = Annotated[str, AfterValidator(_stage)]

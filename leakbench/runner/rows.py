"""From a job's outcome to its rows: scoring happens here, in the process that holds the truth."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leakbench.attack import Recovery
from leakbench.data import Victims, decoder_versions
from leakbench.entries import EntrySpec, chain_label
from leakbench.metrics import METRICS
from leakbench.metrics.images import Measure, score_images
from leakbench.metrics.inference import CHANCE, score_inference
from leakbench.metrics.labels import score_labels
from leakbench.metrics.perceptual import lpips
from leakbench.results import blank_row, task_columns
from leakbench.runner.children import one_line
from leakbench.runner.plan import Job
from leakbench.runner.scene import Scenes, Weights, pixels, true_pixels
from leakbench.schema import DEFENDED, SENT


@dataclass
class Outcome:
    """What a job came to.

    Args:
        status: ``ok`` or why not.
        error: One line where not ok.
        recovery: The checked claim.
        wall_seconds: Of the attack, whole block.
        client_seconds: Of the clients, whole block.
        prepare_seconds: Of the preparation, once per artefact.
        peak_memory: Of the attack's process, bytes.
        isolation: What confined the children.
        update_bytes: Most bytes that an update may have.
        model_shown: What the adversary sees of the model: ``sent`` or ``defended``.
        refused: Share of each trial's clients that refused, in any round.
        planted: Parameters that were replaced, per round; see `leakbench.Attack.plant`.
        stealth: See `leakbench.runner.stealth`; empty where nothing was planted, or the job failed.
    """

    status: str
    error: str | None = None
    recovery: Recovery | None = None
    wall_seconds: float | None = None
    client_seconds: float = 0.0
    prepare_seconds: float | None = None
    peak_memory: int | None = None
    isolation: dict[str, Any] = field(default_factory=dict)
    update_bytes: int = 0
    model_shown: str = SENT
    refused: list[float] | None = None
    planted: list[dict[str, Tensor]] = field(default_factory=list)
    stealth: dict[str, Any] = field(default_factory=dict)

    def fail(self, status: str, error: str) -> None:
        """Note why there is no recovery; the text may come from an entry."""
        self.status, self.error, self.recovery = status, one_line(error), None


def job_columns(job: Job, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that the job alone decides, of an attack or a measure, and those of ``provenance``."""
    return {
        **task_columns(job.task),
        **entry_columns("defense", job.defense),
        **defense_columns(job.defense),
        **provenance,
        "season": job.season.name,
        "season_commitment": job.season.commitment,
        "suite": job.suite,
        "job_id": job.id,
        "block_start": job.start,
        "block_stop": job.stop,
        "model_draws": job.model_draws,
        "threads": job.threads,
        "utc": dt.datetime.now(dt.UTC),
    }


def job_rows(
    job: Job,
    outcome: Outcome,
    scenes: Scenes,
    victims: Victims | None,
    weights: Weights | None,
    provenance: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return one row for every trial of the job, whatever happened to it."""
    count = len(job.trials)
    fixed = {
        **blank_row(),
        **job_columns(job, provenance),
        **entry_columns("attack", (job.attack,)),
        "budget_model_evaluations": job.model_evaluations,
        "budget_wall_seconds": job.wall_seconds,
        "model_shown": outcome.model_shown,
        "inserted": weights.inserted or None if weights is not None else None,
        "status": outcome.status,
        "error": outcome.error,
        "prepare_seconds": outcome.prepare_seconds,
        "peak_memory_bytes": outcome.peak_memory,
    }
    if outcome.model_shown == DEFENDED:
        fixed["lane"] = None
    columns: dict[str, Sequence[Any]] = {"trial": list(job.trials)}
    if outcome.wall_seconds is not None:
        fixed["wall_seconds"] = outcome.wall_seconds / count
        fixed["device_seconds"] = outcome.wall_seconds / count if fixed["device"] != "cpu" else None
    if outcome.client_seconds:
        fixed["client_seconds"] = outcome.client_seconds / count
    columns["draw"] = list(job.trials) if job.model_draws == "per_trial" else [0] * count
    if weights is not None:
        columns["draw"] = [weights.draws[t % len(weights.draws)] for t in range(count)]
        columns["checkpoint_sha256"] = [weights.sha256[t % len(weights.sha256)] for t in range(count)]
        fixed["checkpoint_origin"] = weights.origin
    if victims is not None:
        data = scenes.dataset(job.task)
        fixed["dataset_fingerprint"] = data.fingerprint
        fixed["decoder"] = decoder_versions()
        fixed["num_classes"] = data.num_classes
        counts = _counts(victims, data.num_classes)
        columns["distinct_labels"] = (counts.sum(1) > 0).sum(1).tolist()
        columns["max_label_count"] = counts.sum(1).amax(1).tolist()
        if job.task.target == "labels":
            scores = _label_scores(job, outcome.recovery, scenes, counts)
        elif victims.truth is not None:
            scores = _inference_scores(outcome.recovery, torch.tensor(victims.truth))
        else:
            identification, judge = scenes.identification(job.task, victims), scenes.judge(job.task)
            columns["identification_gallery"] = identification.sizes
            fixed["feature_checkpoint"] = None if judge is None else judge.name
            measures: list[Measure] = [lpips, identification, *(() if judge is None else (judge.distance,))]
            scores = _image_scores(job, outcome.recovery, scenes, victims, measures)
        columns |= {name: values.tolist() for name, values in scores.items()}
    recovery = outcome.recovery
    if outcome.refused is not None:
        columns["refused"] = outcome.refused
    for name, value in outcome.stealth.items():
        if isinstance(value, Tensor):
            columns[name] = value.tolist()
        else:
            fixed[name] = value
    if recovery is not None:
        fixed["model_evaluations"] = recovery.model_evaluations
        if recovery.label_counts is not None:
            fixed["attributed"] = recovery.label_counts.shape[1] == job.task.protocol.clients
        if recovery.notes:
            notes = {name: torch.as_tensor(value).tolist() for name, value in recovery.notes.items()}
            columns["notes"] = [json.dumps({n: values[t] for n, values in notes.items()}) for t in range(count)]
        if recovery.visible_loss is not None:
            columns["visible_loss"] = recovery.visible_loss.double().tolist()
    return [{**fixed, **{name: values[t] for name, values in columns.items()}} for t in range(count)]


def entry_columns(kind: str, chain: Sequence[EntrySpec]) -> dict[str, Any]:
    """Return the columns of an attack, a measure or a chain of defenses; a chain's parts are joined by ``+``."""
    hashes = [part.description.source_sha256 for part in chain]
    params = [dict(part.params) for part in chain]
    shown: Any = params[0] if len(params) == 1 else params or {}
    return {
        kind: "+".join(part.name for part in chain) or "none",
        f"{kind}_label": chain_label(chain),
        f"{kind}_version": max((part.description.version for part in chain), default=1),
        f"{kind}_params": json.dumps(shown, sort_keys=True, separators=(",", ":")),
        f"{kind}_source_sha256": "+".join(h for h in hashes if h) or None,
    }


def defense_columns(chain: Sequence[EntrySpec]) -> dict[str, str]:
    """Return what the parts of a chain declare, for the board of defenses."""
    strengths = [None if part.description.strength is None else list(part.description.strength) for part in chain]
    adaptive = [list(part.description.adaptive) for part in chain]
    return {"defense_strength": json.dumps(strengths), "defense_adaptive": json.dumps(adaptive)}


def _counts(victims: Victims, classes: int) -> Tensor:
    """Return the true label counts (T, K, C)."""
    labels = torch.tensor(victims.labels) + 1  # 0: an example that a smaller client of the cohort lacks
    return torch.nn.functional.one_hot(labels, classes + 1).sum(2)[..., 1:]


def _label_scores(job: Job, recovery: Recovery | None, scenes: Scenes, counts: Tensor) -> dict[str, Tensor]:
    """Return the label metrics and their chance levels, (T,) each; without a claim the latter only."""
    claim = None if recovery is None else recovery.label_counts
    # Without a claim the union counts: its chance level is the higher one.
    levels = scenes.chance(job.task, union=claim is None or claim.shape[1] == 1)
    scores = {f"{n}_chance": torch.full((len(counts),), level) for n, level in levels.items()}
    return scores if claim is None else scores | score_labels(counts, claim)


def _inference_scores(recovery: Recovery | None, truth: Tensor) -> dict[str, Tensor]:
    """Return truth, claim, metrics and their chance levels, (T,) each; without a claim truth and chance only."""
    known = {"inference_truth": truth}
    known |= {f"{name}_chance": torch.full((len(truth),), level) for name, level in CHANCE.items()}
    if recovery is None or recovery.scores is None:
        return known
    return known | {"inference_score": recovery.scores} | score_inference(truth, recovery.scores)


def _image_scores(
    job: Job, recovery: Recovery | None, scenes: Scenes, victims: Victims, measures: Sequence[Measure]
) -> dict[str, Tensor]:
    """Return the image metrics and their floors, (T,) each; without a claim the latter only."""
    data, exact = scenes.dataset(job.task), job.attack.description.exact
    true, floors = true_pixels(job.task, victims, data), scenes.floors(job.task, job.trials)
    if recovery is not None and recovery.inputs is not None:
        return score_images(pixels(recovery.inputs, job.task, data), true, floors, exact=exact, measures=measures)
    scores = score_images(floors["mean_image"].expand_as(true), true, floors, measures=measures)
    return {name: values for name, values in scores.items() if name not in METRICS}

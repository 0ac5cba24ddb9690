"""The schema of result rows, in one place: every column, its type and what it holds. No torch here.

Rows are stored and read by `leakbench.results`; `schema_markdown` prints this for readers without leakbench.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from leakbench.metrics import METRICS
from leakbench.tasks import Task

SCHEMA_VERSION = 7
"""Raised when a column is added, removed, renamed or changes its type."""

BENCHMARK_VERSION = "0.3"
"""MAJOR.MINOR; raised when a task, the client, a metric, a chance level or the scoring can move a number."""

STATUSES = ("ok", "error", "timeout", "oom", "invalid", "not_applicable", "unavailable")
"""What became of a trial: recovered and scored; the entry raised or died; ran past its limit; out of memory; returned
something invalid; the task does not grant what the attack needs, or the attack declined before it saw an update; data
or weights are not at hand."""

FAILURES = ("error", "timeout", "oom", "invalid")
"""The statuses that are the entry's failure."""

SENT, DEFENDED = "sent", "defended"
"""Values of ``model_shown``."""


@dataclass(frozen=True)
class Field:
    """One column.

    Args:
        name: Column name.
        type: Arrow type.
        doc: What it holds, with its unit.
        nullable: Whether null is a value.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False


_TEXT, _INT, _FLOAT, _BOOL, _TIME = pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.timestamp("us", tz="UTC")

ROW_FIELDS: tuple[Field, ...] = (
    # Identity: the benchmark and the season
    Field("schema_version", _INT, "SCHEMA_VERSION of the writer"),
    Field("benchmark_version", _TEXT, "BENCHMARK_VERSION of the writer; rows of different ones are not compared"),
    Field("season", _TEXT, "Name of the key that victims are drawn with; `development` is public"),
    Field("season_commitment", _TEXT, "Sha256 of the season key"),
    # Identity: the task
    Field("suite", _TEXT, "Suite that planned the job; empty where there was none"),
    Field("lane", _TEXT, "Board the task belongs to; null for a combination without a rank", nullable=True),
    Field("task", _TEXT, "Readable task id"),
    Field("task_version", _INT, "Version of the task definition"),
    Field("task_hash", _TEXT, "Sha256 of the task definition"),
    Field("target", _TEXT, "What is to be recovered: labels, inputs, attribute or membership"),
    Field("attribute", _TEXT, "Name of the attribute that is asked for; null: none is", nullable=True),
    Field("attribute_value", _INT, "Value of an example that has it; null: none is asked for", nullable=True),
    Field(
        "attribute_mix",
        _FLOAT,
        "Share of a batch's examples that have it, in a client that has it; null: none is asked for",
        nullable=True,
    ),
    Field("dataset", _TEXT, "Dataset name"),
    Field("dataset_fingerprint", _TEXT, "Sha256 over decoded uint8 values and labels; null: not read", nullable=True),
    Field("decoder", _TEXT, "Versions of the libraries that decoded and resized; null: not read", nullable=True),
    Field("normalise", _BOOL, "Whether inputs are normalised with the dataset's mean and std"),
    Field("num_classes", _INT, "C; null: dataset not read", nullable=True),
    Field("architecture", _TEXT, "Architecture name"),
    Field("architecture_init", _TEXT, "`default`, `kaiming` or `uniform(A)`"),
    Field("architecture_params", _TEXT, "Constructor arguments, JSON"),
    Field("stage", _TEXT, "How far the model was trained"),
    Field("checkpoint_sha256", _TEXT, "Sha256 of the weights of this trial's model; null: not built", nullable=True),
    Field("checkpoint_origin", _TEXT, "init, official, local, pretrained or training; null: not built", nullable=True),
    Field("batch_size", _INT, "B: examples per local batch; of the largest client where they differ"),
    Field(
        "batch_sizes",
        _TEXT,
        "Batch sizes that the clients of a cohort have in turn, JSON; null: all have batch_size",
        nullable=True,
    ),
    Field("sampler", _TEXT, "Label sampler"),
    Field("sampler_alpha", _FLOAT, "Concentration of the dirichlet sampler; null elsewhere", nullable=True),
    Field("sampler_classes", _INT, "Classes of a batch of the balanced sampler; null elsewhere", nullable=True),
    # Identity: the protocol
    Field("sends", _TEXT, "gradient, delta or weights"),
    Field("local_steps", _INT, "Optimiser steps before sending"),
    Field("lr", _FLOAT, "Local learning rate"),
    Field("momentum", _FLOAT, "SGD momentum"),
    Field("weight_decay", _FLOAT, "L2 weight decay"),
    Field("reduction", _TEXT, "Loss reduction over a batch: mean or sum"),
    Field("batches", _TEXT, "Batches of the local steps: fresh, same or epochs"),
    Field("batches_per_epoch", _INT, "Distinct batches of one pass with `epochs`"),
    Field("batch_norm", _TEXT, "Mode of BatchNorm layers on the client: train or eval"),
    Field("send_buffers", _BOOL, "Whether BatchNorm running statistics are sent"),
    Field("rounds", _INT, "R: rounds of plant and update that one attack sees"),
    Field("clients", _INT, "K: clients behind one update"),
    Field("secure_aggregation", _BOOL, "Whether only the sum over clients is seen"),
    Field("weighting", _TEXT, "Weights of the clients in the sum: equal, or by their numbers of examples"),
    Field("precision", _TEXT, "Arithmetic of the client; TF32 is off"),
    # Identity: the threat model
    Field("adversary", _TEXT, "honest_but_curious or malicious_server"),
    Field("knows_labels", _BOOL, "Knows the private labels, in batch order"),
    Field("knows_batch_size", _BOOL, "Knows B and the number of local batches"),
    Field("knows_lr", _BOOL, "Knows learning rate, momentum and weight decay"),
    Field("knows_local_steps", _BOOL, "Knows the number of local steps"),
    Field("knows_batch_order", _BOOL, "Knows which example was in which local batch"),
    Field("bn_statistics", _TEXT, "BatchNorm statistics it knows"),
    Field("auxiliary_examples", _INT, "Labelled examples of the auxiliary split that it owns"),
    Field("knows_label_prior", _BOOL, "Knows the class frequencies of the data source"),
    Field("knows_weights", _BOOL, "Knows architecture and weights"),
    Field("knows_defense", _BOOL, "Knows which defense runs and with which parameters, never its draws"),
    Field("may_change_parameters", _BOOL, "May replace parameters of the model sent to clients"),
    Field("may_differ_per_client", _BOOL, "May send different models to different clients"),
    Field("may_change_architecture", _BOOL, "May insert a named module of leakbench.models"),
    Field("budget_model_evaluations", _INT, "Model evaluations granted per trial; null: unlimited", nullable=True),
    Field("budget_wall_seconds", _FLOAT, "Wall seconds granted per trial; null: unlimited", nullable=True),
    # Identity: the entries
    Field("attack", _TEXT, "Attack id"),
    Field("attack_label", _TEXT, "Id with the parameters that differ from the defaults, and the strength"),
    Field("attack_version", _INT, "Version of the entry"),
    Field("attack_params", _TEXT, "Constructor arguments, canonical JSON"),
    Field("attack_source_sha256", _TEXT, "Sha256 of the entry's source; null: it has no file", nullable=True),
    Field("defense", _TEXT, "Defense id; `none` where there is none"),
    Field("defense_label", _TEXT, "Id with the parameters that differ from the defaults, and the strength"),
    Field("defense_version", _INT, "Version of the entry"),
    Field("defense_params", _TEXT, "Constructor arguments, canonical JSON"),
    Field("defense_source_sha256", _TEXT, "Sha256 of the entry's source; null: it has no file", nullable=True),
    Field(
        "defense_strength",
        _TEXT,
        "JSON list, a part of the chain each: [swept parameter, `higher` or `lower` is stronger], or null",
    ),
    Field("defense_adaptive", _TEXT, "JSON list, a part each: names of the attacks it has to face to be ranked"),
    # Identity: the trial
    Field("job_id", _TEXT, "Content hash of task, block, entries and their parameters"),
    Field("block_start", _INT, "First trial of the job"),
    Field("block_stop", _INT, "One past the last trial of the job"),
    Field("trial", _INT, "Number of the trial; it names the victim"),
    Field("model_draws", _TEXT, "one: all trials share a model; per_trial: each has its own draw"),
    Field(
        "model_shown",
        _TEXT,
        "What the adversary sees of the model: sent, as the client got it; defended: a defense changed what the "
        "adversary sees of the model, which overstates protection against a server (such rows have no lane)",
    ),
    Field("inserted", _TEXT, "Module that the attack had inserted in front of the net; null: none", nullable=True),
    Field(
        "planted_share",
        _FLOAT,
        "Share of the parameters that the attack replaced; null: none, or it failed",
        nullable=True,
    ),
    Field(
        "planted_tensors",
        _TEXT,
        "Names of the parameters that it replaced, JSON; null: none, or it failed",
        nullable=True,
    ),
    Field("draw", _INT, "Number of the init or checkpoint that the trial uses"),
    Field("distinct_labels", _INT, "Distinct labels among the victim's; null: not drawn", nullable=True),
    Field("max_label_count", _INT, "Count of the victim's most frequent label; null: not drawn", nullable=True),
    # Outcome
    Field("status", _TEXT, "One of " + ", ".join(STATUSES)),
    Field("error", _TEXT, "One line on what went wrong; null when ok", nullable=True),
    *(
        Field(
            spec.name,
            _FLOAT,
            f"{spec.description} [{spec.unit}, {'higher' if spec.higher_is_better else 'lower'} is better]",
            nullable=True,
        )
        for spec in METRICS.values()
    ),
    *(
        Field(
            spec.reference,
            _FLOAT,
            f"{spec.name} of the better of a prior-drawn and the best constant guess, same sampler; on failed rows too"
            if spec.target == "labels"
            else f"{spec.name} of a claim of .5; on failed rows too"
            if spec.target == "inference"
            else f"{spec.name} of the honest model for the same batch"
            if spec.target == "stealth"
            else f"{spec.name} of the best floor (random image, dataset mean, ...) for this victim; on failed rows too",
            nullable=True,
        )
        for spec in METRICS.values()
    ),
    Field(
        "inference_truth",
        _INT,
        "1 where the client has the attribute or the candidate, else 0; null: neither is asked",
        nullable=True,
    ),
    Field("inference_score", _FLOAT, "Claimed probability of a truth of 1; null: no such claim", nullable=True),
    Field(
        "refused",
        _FLOAT,
        "Share of the clients that refused a model, in any round; null: no update",
        nullable=True,
    ),
    Field(
        "attributed",
        _BOOL,
        "Whether label counts were claimed client by client, not of all clients together; null: no such claim",
        nullable=True,
    ),
    Field("feature_checkpoint", _TEXT, "Architecture:sha256 of the net behind feature_distance", nullable=True),
    Field("identification_gallery", _INT, "Images that identification_rank orders", nullable=True),
    Field("visible_loss", _FLOAT, "The attack's own final objective, self-reported, never scored", nullable=True),
    Field("notes", _TEXT, "Further numbers that the attack reports of itself, JSON, never scored", nullable=True),
    Field("model_evaluations", _INT, "Gradient evaluations of the attack, per trial", nullable=True),
    Field("wall_seconds", _FLOAT, "Attack: wall seconds of the job divided by its trials", nullable=True),
    Field("client_seconds", _FLOAT, "Client and defense: wall seconds of the job divided by its trials", nullable=True),
    Field("prepare_seconds", _FLOAT, "Wall seconds of the attack's preparation, once per artefact", nullable=True),
    Field("device_seconds", _FLOAT, "Accelerator seconds of the attack divided by trials; null on CPU", nullable=True),
    Field("peak_memory_bytes", _INT, "Peak memory of the attack's process", nullable=True),
    # Provenance
    Field("leakbench_version", _TEXT, "Version of the package"),
    Field("code_sha256", _TEXT, "Sha256 over leakbench's number-moving modules"),
    Field("git_sha", _TEXT, "Commit of the checkout; null: not a checkout", nullable=True),
    Field("git_dirty", _BOOL, "Whether the checkout had changes; null: not a checkout", nullable=True),
    Field("host_kind", _TEXT, "CPU model and machine architecture"),
    Field("device", _TEXT, "Device that computed: cpu or the accelerator's name"),
    Field("python", _TEXT, "Python version"),
    Field("torch", _TEXT, "PyTorch version"),
    Field("cuda", _TEXT, "CUDA version of PyTorch; null: none", nullable=True),
    Field("driver", _TEXT, "Accelerator driver version; null: none", nullable=True),
    Field("threads", _INT, "Threads per process"),
    Field("isolation", _TEXT, "none, process, bwrap or container"),
    Field("isolation_detail", _TEXT, "What the isolation closed on this machine", nullable=True),
    Field("utc", _TIME, "When the row was written"),
)
"""Every column of a result row, in order."""

THREAT_COLUMNS = {
    "adversary": "adversary",
    "bn_statistics": "bn_statistics",
    "auxiliary": "auxiliary_examples",
    "change_parameters": "may_change_parameters",
    "per_client": "may_differ_per_client",
    "change_architecture": "may_change_architecture",
}
"""Columns of a threat model whose names are not its fields' led by ``knows_``."""


def arrow_schema(fields: Sequence[Field] = ROW_FIELDS) -> pa.Schema:
    """Return the Arrow schema of a file of such rows, without metadata."""
    return pa.schema([pa.field(f.name, f.type, nullable=f.nullable) for f in fields])


def schema_markdown(fields: Sequence[Field] = ROW_FIELDS) -> str:
    """Return the documented schema as a Markdown table."""
    lines = ["| column | type | null | meaning |", "|---|---|---|---|"]
    for f in fields:
        meaning = f.doc.replace("|", r"\|")
        lines.append(f"| `{f.name}` | {f.type} | {'yes' if f.nullable else 'no'} | {meaning} |")
    return "\n".join(lines)


def blank_row(fields: Sequence[Field] = ROW_FIELDS) -> dict[str, Any]:
    """Return the versions and a null for every nullable column: where a row starts."""
    versions = {"schema_version": SCHEMA_VERSION, "benchmark_version": BENCHMARK_VERSION}
    return versions | {field.name: None for field in fields if field.nullable}


def task_columns(task: Task) -> dict[str, Any]:
    """Return the columns that the task alone decides."""
    threat = {THREAT_COLUMNS.get(k, f"knows_{k}"): v for k, v in task.threat_model.content().items()}
    return {
        "lane": task.lane,
        "task": task.id,
        "task_version": task.version,
        "task_hash": task.hash,
        "target": task.target,
        "attribute": None if task.attribute is None else task.attribute.name,
        "attribute_value": None if task.attribute is None else task.attribute.value,
        "attribute_mix": None if task.attribute is None else task.attribute.mix,
        "dataset": task.dataset,
        "normalise": task.normalise,
        "architecture": task.architecture.name,
        "architecture_init": task.architecture.init,
        "architecture_params": json.dumps(task.architecture.params, sort_keys=True),
        "stage": task.stage,
        "batch_size": task.batch.size,
        "batch_sizes": None if task.batch.sizes is None else json.dumps(task.batch.sizes),
        "sampler": task.batch.sampler,
        "sampler_alpha": task.batch.alpha,
        "sampler_classes": task.batch.classes,
        **task.protocol.content(),
        "weighting": task.protocol.weighting,
        **threat,
    }


def check_rows(rows: Sequence[Mapping[str, Any]], fields: Sequence[Field] = ROW_FIELDS) -> None:
    """Check that rows have exactly the columns of the schema, and nulls only where they may be.

    Raises:
        ValueError: They do not; it is the writer's mistake, never a user's.
    """
    if not rows:
        raise ValueError("a job has at least one row")
    names = [f.name for f in fields]
    for row in rows:
        if unknown := sorted(row.keys() - set(names)):
            raise ValueError(f"row has columns that the schema lacks: {unknown}")
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"row lacks columns: {missing}")
        if null := [f.name for f in fields if row[f.name] is None and not f.nullable]:
            raise ValueError(f"columns must not be null: {null}")
        if row["status"] not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {row['status']!r}")

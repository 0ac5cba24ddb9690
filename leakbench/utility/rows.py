"""The schema of utility rows: one row per federated training."""

from __future__ import annotations

import pyarrow as pa

from leakbench.measures.rows import result_columns
from leakbench.schema import Field

_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()

UTILITY_FIELDS: tuple[Field, ...] = (
    *result_columns("schema_version", "lane"),
    *result_columns("dataset", "stage"),
    *result_columns("checkpoint_sha256", "batch_sizes"),
    *result_columns("sends", "rounds"),
    *result_columns("precision", "adversary"),
    Field("clients", _INT, "K: clients, all of which take part in every round"),
    Field("rounds", _INT, "Rounds of training"),
    Field("partition", _TEXT, "How examples are spread over clients: iid or dirichlet(alpha)"),
    Field("client_sizes", _TEXT, "Examples of every client, JSON; null: not drawn", nullable=True),
    Field("holdout", _FLOAT, "Share of the private split by which learning rates are chosen"),
    Field("lr_grid", _TEXT, "Learning rates to choose from, JSON list: the budget of the choice"),
    Field("planned_seeds", _INT, "Repetitions of the plan that it is part of"),
    Field("evaluate_every", _INT, "Rounds between evaluations"),
    Field("seed", _INT, "Number of the repetition: init, partition, order of examples, the defense's draws"),
    *result_columns("defense", "job_id"),
    Field("job_id", _TEXT, "Content hash of the training, its defense and their parameters"),
    *result_columns("block_start", "trial"),
    # Outcome
    Field("status", _TEXT, "As of result rows"),
    Field("error", _TEXT, "One line on what went wrong; null when ok", nullable=True),
    Field(
        "accuracy",
        _FLOAT,
        "Mean accuracy on the test split of the last 5 evaluations; of a training that failed or diverged the chance "
        "level; null: nothing was trained, as data is not at hand",
        nullable=True,
    ),
    Field("accuracy_chance", _FLOAT, "Accuracy of the constant guess that is best for the clients", nullable=True),
    Field(
        "accuracy_holdout",
        _FLOAT,
        "The same as accuracy on what was held out: by it learning rates are chosen",
        nullable=True,
    ),
    Field("curve", _TEXT, "JSON list: [rounds done, accuracy on the test split] of every evaluation", nullable=True),
    Field("rounds_done", _INT, "Rounds until the end or failure"),
    Field(
        "client_seconds",
        _FLOAT,
        "Client and defense: median CPU seconds of a round in the clients' process, all clients; null: none done",
        nullable=True,
    ),
    Field(
        "upload_bytes",
        _FLOAT,
        "Mean bytes of one client's update: its float32 values, deflated (zlib level 6); null: none done",
        nullable=True,
    ),
    Field("update_numbers", _INT, "Numbers in one update; null: not built", nullable=True),
    Field(
        "epsilon",
        _FLOAT,
        "Of the example that is used most often, replaced by another, over all rounds, at delta 1e-5 and without gain "
        "by sampling: what the defense declares, composed as Gaussian; null: it promises nothing. The learning rate "
        "was chosen on held-out private data, which is not accounted for",
        nullable=True,
    ),
    Field("refused", _FLOAT, "Mean share of the clients that refused the model; null: none done", nullable=True),
    Field("wall_seconds", _FLOAT, "Wall seconds of the training, evaluations included", nullable=True),
    Field("peak_memory_bytes", _INT, "Peak memory of the clients' process", nullable=True),
    *result_columns("leakbench_version", None),
)
"""Every column of a utility row, in order."""

"""Which attacks of a suite are run on the updates that its federated trainings kept. No torch here.

The threat models, targets, attacks and budgets are those of the suite's cells with the same dataset and defense; the
model, the batch and what was sent are the training's. A defense that behaves only where it is attacked is found here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, product, takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from leakbench.errors import UserError
from leakbench.grids import Cell, KeptFile
from leakbench.keys import Season
from leakbench.parts import content_hash
from leakbench.results import load_utility
from leakbench.stage import IN_TRAINING
from leakbench.tasks import BatchSpec, Protocol, Task
from leakbench.utility.spec import SLOTS, dirichlet_alpha

WHERE = Path("utility", "kept")
"""Where in an output directory `leakbench utility` keeps updates; see `leakbench.utility.kept`."""
TARGETS = ("labels", "inputs")
"""What can be asked of a batch that was drawn without asking: the others need a fair coin."""
_NO_TRAINING = "of trainings that failed, or at a learning rate that was not chosen"


@dataclass(frozen=True)
class KeptCells:
    """Cells of stage ``in_training``.

    Args:
        cells: The cells.
        left_out: How many kept updates no cell attacks, by the reason.
    """

    cells: list[Cell]
    left_out: dict[str, int]


def kept_cells(out: Path, cells: Iterable[Cell], season: Season, *, trials: int | None = None) -> KeptCells:
    """Return the cells that attack what was kept under ``out``.

    One cell holds the kept updates of one defense, dataset, net, batch and protocol, each a trial with a model of its
    own. Of the same victim the trial has the same number under every defense; where a defense has gaps, as a training
    failed, its trials are several cells. Only trainings that came to an end at a learning rate that was chosen count.

    Args:
        out: Output directory of `leakbench utility`.
        cells: The suite's.
        season: Of the run; the training's must be the same.
        trials: Most trials of a defense and federation, the same for all defenses; all where None.

    Raises:
        UserError: Nothing was kept there, it is of another season, or damaged, no cell fits any of it, or the rows of
            its trainings are missing.
    """
    paths = sorted((out / WHERE).glob("[!.]*.safetensors"))
    if not paths:
        raise UserError(
            f"--in-training {out}: expected updates in {out / WHERE}, got none; make some with: leakbench utility "
            f"SUITE --out {out}"
        )
    notes = [(path, _note(path)) for path in paths]
    for path, note in notes:
        if note["season"] != season.name:
            raise UserError(
                f"--in-training {out}: {path.name} is of season {note['season']}, expected {season.name}; use the same "
                "--season-key as for leakbench utility"
            )
    rows = load_utility(out)
    made = rows[rows["status"] == "ok"].set_index("job_id")["utc"].to_dict()
    left_out: Counter[str] = Counter()
    groups: dict[str, dict[int, tuple[dict[str, Any], Path]]] = {}
    # Of the same trial, the latest: a rate may have been chosen from several grids.
    for path, note in sorted(notes, key=lambda one: str(made.get(one[1]["run"]))):
        if note["run"] not in made:
            left_out[_NO_TRAINING] += 1
        elif trials is None or note["trial"] % SLOTS < trials:
            key = content_hash([_training(note).content(), note["defense_content"]])
            groups.setdefault(key, {})[note["trial"]] = note, path
    suited = [cell for cell in cells if _suits(cell)]
    found: dict[str, Cell] = {}
    for members in groups.values():
        note = next(iter(members.values()))[0]
        files = {trial: _file(path) for trial, (_, path) in members.items()}
        training, fitting = _training(note), _fitting(note, suited)
        for cell, first in product(fitting, sorted(trial for trial in files if trial - 1 not in files)):
            own = {"threat_model": cell.task.threat_model, "target": cell.task.target, "stage": IN_TRAINING}
            task = Task(**{**dict(training), **own})
            kept = tuple(files[trial] for trial in takewhile(files.__contains__, count(first)))
            block = replace(cell, task=task, first=first, trials=len(kept), model_draws="per_trial", kept=kept)
            entries = [entry.id_content() for entry in (cell.attack, *cell.defense)]
            found.setdefault(content_hash([task.hash, entries, first]), block)
        if not fitting:
            left_out[_reason(note, suited)] += len(members)
    if not found:
        raise UserError(f"--in-training {out}: nothing to attack: {'; '.join(left_out)}")
    return KeptCells(list(found.values()), dict(left_out))


def _file(path: Path) -> KeptFile:
    return KeptFile(path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest())


def _note(path: Path) -> dict[str, Any]:
    """Return what is written of a kept update, without its tensors."""
    try:
        with safe_open(path, framework="numpy") as file:
            note = json.loads(file.metadata()["leakbench"])
        note["task"] = Task.model_validate_json(json.dumps(note["task"]))
        own = {"season": str(note["season"]), "trial": int(note["trial"]), "run": str(note["run"])}
        return {**note, **own, "defense_content": list(note["defense_content"])}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected an update that leakbench utility kept, got {' '.join(str(error).split())}; remove it"
        ) from None


def _training(note: Mapping[str, Any]) -> Task:
    """Return what the clients did, as tasks have it.

    The rate of the server's own step is left out: it moves no gradient. What guessing is worth is told by the sampler
    next to the partition: a client's labels are as skewed by ``dirichlet(alpha)`` of one as of the other.
    """
    task: Task = note["task"]
    changed: dict[str, Any] = {}
    if task.protocol.sends == "gradient":
        rate = Protocol.model_fields["lr"].default
        changed["protocol"] = task.protocol.model_copy(update={"lr": rate})
    if (alpha := dirichlet_alpha(note["partition"])) is not None:
        changed["batch"] = BatchSpec(size=task.batch.size, sampler="dirichlet", alpha=alpha)
    return task.model_copy(update=changed)


def _suits(cell: Cell) -> bool:
    """Return whether a cell's threat model and target are of single updates of honest rounds, after the fact."""
    task = cell.task
    passive = task.threat_model.adversary == "honest_but_curious"
    return passive and task.target in TARGETS and task.protocol.clients == task.protocol.rounds == 1


def _fitting(note: Mapping[str, Any], cells: Sequence[Cell]) -> list[Cell]:
    same = [cell for cell in cells if cell.task.dataset == note["task"].dataset]
    return [cell for cell in same if [part.id_content() for part in cell.defense] == note["defense_content"]]


def _reason(note: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Return why no cell fits a kept update."""
    params = [(part["name"], part["params"]) for part in note["defense_content"]]
    if any([(part.name, dict(part.params)) for part in cell.defense] == params for cell in cells):
        same = any([part.id_content() for part in cell.defense] == note["defense_content"] for cell in cells)
        where = "of another dataset" if same else "of another version of the defense"
        return f"{note['defense']}: the suite's attacks are {where} than the training on {note['task'].dataset}"
    return f"{note['defense']}: the suite has no attack on labels or inputs of it"

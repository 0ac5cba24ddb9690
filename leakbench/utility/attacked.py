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
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from leakbench.errors import UserError
from leakbench.grids import Cell, KeptFile
from leakbench.keys import Season
from leakbench.parts import content_hash
from leakbench.stage import IN_TRAINING
from leakbench.tasks import BatchSpec, Protocol, Task
from leakbench.utility.spec import dirichlet_alpha

WHERE = Path("utility", "kept")
"""Where in an output directory `leakbench utility` keeps updates; see `leakbench.utility.kept`."""
TARGETS = ("labels", "inputs")
"""What can be asked of a batch that was drawn without asking: the others need a fair coin."""


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

    One cell holds the kept updates of one defense, dataset, net, batch and protocol, in the order of seed, partition,
    round and client; each is a trial with a model of its own.

    Args:
        out: Output directory of `leakbench utility`.
        cells: The suite's.
        season: Of the run; the training's must be the same.
        trials: Most trials of a cell; all where None.

    Raises:
        UserError: Nothing was kept there, it is of another season, or damaged, or no cell fits any of it.
    """
    groups: dict[str, list[tuple[dict[str, Any], KeptFile]]] = {}
    for path in sorted((out / WHERE).glob("[!.]*.safetensors")):
        note = _note(path)
        if note["season"] != season.name:
            raise UserError(
                f"--in-training {out}: {path.name} is of season {note['season']}, expected {season.name}; use the same "
                "--season-key as for leakbench utility"
            )
        file = KeptFile(path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest())
        key = content_hash([_training(note).content(), note["defense_content"]])
        groups.setdefault(key, []).append((note, file))
    if not groups:
        raise UserError(
            f"--in-training {out}: expected updates in {out / WHERE}, got none; make some with: leakbench utility "
            f"SUITE --out {out}"
        )
    suited = [cell for cell in cells if _suits(cell)]
    found: dict[str, Cell] = {}
    left_out: Counter[str] = Counter()
    for members in groups.values():
        members.sort(key=lambda member: [member[0][key] for key in ("seed", "partition", "round", "client", "run")])
        note, files = members[0][0], tuple(file for _, file in members)[:trials]
        training, fitting = _training(note), _fitting(note, suited)
        for cell in fitting:
            own = {"threat_model": cell.task.threat_model, "target": cell.task.target, "stage": IN_TRAINING}
            task = Task(**{**dict(training), **own})
            made = replace(cell, task=task, trials=len(files), model_draws="per_trial", kept=files)
            entries = [entry.id_content() for entry in (cell.attack, *cell.defense)]
            found.setdefault(content_hash([task.hash, entries]), made)
        if not fitting:
            left_out[_reason(note, suited)] += len(members)
    if not found:
        raise UserError(f"--in-training {out}: nothing to attack: {'; '.join(left_out)}")
    return KeptCells(list(found.values()), dict(left_out))


def _note(path: Path) -> dict[str, Any]:
    """Return what is written of a kept update, without its tensors."""
    try:
        with safe_open(path, framework="numpy") as file:
            note = json.loads(file.metadata()["leakbench"])
        note["task"] = Task.model_validate_json(json.dumps(note["task"]))
        return {**note, "defense_content": list(note["defense_content"]), "season": str(note["season"])}
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
        where = "of another dataset" if _same_code(note, cells) else "of another version of the defense"
        return f"{note['defense']}: the suite's attacks are {where} than the training on {note['task'].dataset}"
    return f"{note['defense']}: the suite has no attack on labels or inputs of it"


def _same_code(note: Mapping[str, Any], cells: Sequence[Cell]) -> bool:
    return any([part.id_content() for part in cell.defense] == note["defense_content"] for cell in cells)

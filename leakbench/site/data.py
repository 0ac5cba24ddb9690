"""What pages are made from: rows, boards, measures, pictures, and where each thing has its page."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from leakbench.board.columns import CELL_KEYS, Cell, entry_label, entry_parameters
from leakbench.board.lanes import LaneTable, lane_frame, lane_tables
from leakbench.board.measures import tables as measure_tables
from leakbench.board.score import board_of, build_cells
from leakbench.compact import FOLDERS, commands
from leakbench.entries import Description, try_describe
from leakbench.errors import UserError
from leakbench.gallery import Entry, read_gallery
from leakbench.results import holds_measures, holds_utility, load_measures, load_rows, load_utility
from leakbench.site.checking import LANE_TITLES, check_rows
from leakbench.site.loading import load, row_files
from leakbench.sources import Kind, sources
from leakbench.stage import stage_order
from leakbench.store import job_files, read_compacted, result_folders
from leakbench.submitting.badges import Statements, badges, least, read_statements, sealed_jobs


@dataclass(frozen=True)
class Options:
    """What the caller asked for.

    Args:
        repository: Address of the code for links, or None.
        changelog: File with the version history, or None.
        again: Folder with rows of the same jobs that another machine made, or None.
        signers: Who may sign seals, as `leakbench.submitting.badges.sealed_jobs` has it, or None.
    """

    repository: str | None = None
    changelog: Path | None = None
    again: Path | None = None
    signers: Path | None = None


class Data:
    """The rows under several results, and what boards make of them; computed when first asked for.

    Args:
        results: Folders of runs, folders of such folders, or Parquet files of rows.
        options: See `Options`.

    Raises:
        UserError: There are no rows, rows of another schema version, or some that no page can show.
    """

    def __init__(self, results: Sequence[Path], options: Options) -> None:
        self.results, self.options = tuple(result_folders(results)), options
        self.files = row_files(self.results)
        for path in self.files:
            check_rows(path)
        self.rows = load(self.files)

    @cached_property
    def cells(self) -> list[Cell]:
        """Every cell, in the order of the rows."""
        return build_cells(self.rows)

    @cached_property
    def board(self) -> pd.DataFrame:
        """A line per cell: see `leakbench.board.score.cells`; with ``id``, ``badge`` and a few facts of the task."""
        board = board_of(self.cells)
        ids = [cell_id([line[key] for key in CELL_KEYS]) for line in board[list(CELL_KEYS)].to_dict("records")]
        facts = self.rows.drop_duplicates("task_hash").set_index("task_hash")
        told = {key: facts[key].astype(object).to_dict() for key in ("architecture", "stage", "batch_size")}
        board = board.assign(id=ids, **{key: board["task_hash"].map(values) for key, values in told.items()})
        return board.assign(badge=board["id"].map(self.badge))

    @cached_property
    def cell(self) -> dict[str, Cell]:
        """Cells by id."""
        return {cell_id(list(cell.keys.values())): cell for cell in self.cells}

    @cached_property
    def statements(self) -> Statements:
        """What was said of entries, beside the rows."""
        return read_statements(self.folders)

    @cached_property
    def badge(self) -> dict[str, str]:
        """Badges of cells by id: see `leakbench.submitting.badges`."""
        again = None if self.options.again is None else load_rows(result_folders([self.options.again]))
        sealed = sealed_jobs(self.folders, self.options.signers)
        found = badges(self.rows, sealed=sealed, again=again, statements=self.statements).to_numpy()
        return {name: least(set(found[cell.places])) for name, cell in self.cell.items()}

    @cached_property
    def lane_tables(self) -> list[LaneTable]:
        """See `leakbench.board.lanes.lane_tables`; demonstrations last, by lane, suite and stage."""
        order = list(LANE_TITLES)

        def place(table: LaneTable) -> tuple[bool, int, str, tuple[int, int, str]]:
            line = table.lines[0]
            return line["demonstration"], order.index(line["lane"]), line["suite"], stage_order(line["stage"])

        return sorted(lane_tables(self.rows, self.cells), key=place)

    @cached_property
    def lanes(self) -> pd.DataFrame:
        """The lines of `lane_tables`."""
        return lane_frame(self.lane_tables)

    @cached_property
    def folders(self) -> list[Path]:
        """Results that are folders."""
        return [path for path in self.results if path.is_dir()]

    @cached_property
    def origin(self) -> dict[str, Path]:
        """Where the job of every row is, by its id: one of the results, or the folder of one that is a file."""
        found: dict[str, Path] = {}
        for path in self.results:
            single = [] if path.is_dir() else read_compacted(path) or []
            kinds = FOLDERS.values() if path.is_dir() else ()
            jobs = [*single, *(job for folder in kinds for job in job_files(path / folder))]
            found |= dict.fromkeys((job.job_id for job in jobs), path if path.is_dir() else path.parent)
        return found

    @cached_property
    def commands(self) -> dict[Path, dict[str, list[str]]]:
        """What was typed for the rows of every result, by its folder and kind of rows: see `stored_commands`."""
        folders = dict.fromkeys(self.origin.values())
        return {path: {kind: stored_commands(path / part) for kind, part in FOLDERS.items()} for path in folders}

    def typed(self, job: str, kind: str) -> list[str]:
        """Return what was typed for the rows of a kind (see `leakbench.compact.FOLDERS`) of a job's run."""
        return self.commands[self.origin[job]][kind] if job in self.origin else []

    def rows_option(self, job: str) -> str:
        """Return what `leakbench reproduce` needs behind a row's name to find it: nothing below runs and results."""
        folder = self.origin.get(job)
        default = folder is None or folder.parts[:1] in (("runs",), ("results",))
        return "" if default else f" --rows {shlex.quote(str(folder))}"

    @cached_property
    def measured(self) -> pd.DataFrame | None:
        """Rows of measures; None where nothing was measured."""
        folders = [path for path in self.folders if holds_measures(path)]
        return load_measures(folders) if folders else None

    @cached_property
    def measures(self) -> dict[str, pd.DataFrame]:
        """Tables of measures by kind; empty where nothing was measured."""
        return {} if self.measured is None else measure_tables(self.measured)

    @cached_property
    def trained(self) -> pd.DataFrame | None:
        """Rows of federated trainings at the rate that each defense chose; None where nothing was trained."""
        folders = [path for path in self.folders if holds_utility(path)]
        return load_utility(folders) if folders else None

    @cached_property
    def task_hashes(self) -> frozenset[str]:
        """Tasks that have a page: those with rows of attacks."""
        return frozenset(self.board["task_hash"])

    @cached_property
    def pictures(self) -> list[list[Entry]]:
        """Pictures of every result, cell by cell."""
        found = []
        for folder in self.folders:
            try:
                found += read_gallery(folder)
            except UserError:  # it has none
                continue
        return found

    @cached_property
    def date(self) -> str:
        """Day of the latest row: a build tells no other time, so that the same rows give the same pages."""
        return str(self.rows["utc"].max().date())

    @cached_property
    def descriptions(self) -> dict[tuple[Kind, str], dict[str, Any]]:
        """What installed entries that have rows say of themselves, by kind and name."""
        found: dict[tuple[Kind, str], dict[str, Any]] = {}
        for kind in get_args(Kind):
            registry = sources(kind)
            known = [registry.get(name) for name in sorted(set(self.board[kind])) if name in registry]
            for source, answer in zip(known, try_describe(known), strict=True):
                if isinstance(answer, Description):
                    found[(kind, source.name)] = answer.content()
        return found


def stored_commands(store: Path) -> list[str]:
    """Return the leakbench commands that a store says its rows were made with, each with its words quoted anew."""
    found = []
    for command in commands(store):
        try:
            words = shlex.split(command)
        except ValueError:
            continue
        if words[:1] == ["leakbench"]:
            found.append(shlex.join(words).replace("\n", " "))
    return list(dict.fromkeys(found))


def cell_id(keys: Sequence[Any]) -> str:
    """Return the name of a cell's page, from the values of `CELL_KEYS`."""
    plain = [None if pd.isna(key) else int(key) if isinstance(key, float) and key.is_integer() else key for key in keys]
    return hashlib.sha256(json.dumps(plain, default=str).encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """Return a file name for anything, whoever named it: distinct names have distinct files."""
    plain = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def cell_page(identity: str) -> str:
    """Return where the rows of a cell are."""
    return f"cells/{identity[:2]}/{identity}.html"


def attack_page(name: str) -> str:
    """Return where an attack is described."""
    return f"attacks/{slug(name)}.html"


def defense_page(name: str) -> str:
    """Return where a defense is described."""
    return f"defenses/{slug(name)}.html"


def task_page(task: str, task_hash: str) -> str:
    """Return where a task is described; tasks of one id and another definition have pages of their own."""
    return f"tasks/{slug(task)}-{slug(task_hash[:8])}.html"


def short_label(name: str, params: str) -> str:
    """Return an entry with all its parameters."""
    return entry_label(name, entry_parameters(params))

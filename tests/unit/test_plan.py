"""Planning: blocks, identities and shards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakbench.entries import Description, EntrySpec
from leakbench.errors import UserError
from leakbench.grids import Budget, Cell
from leakbench.keys import DEVELOPMENT, Season
from leakbench.runner.plan import parse_shard, plan, shard
from leakbench.tasks import Architecture, BatchSpec, Task


def entry(kind="attack", name="a", version=1, sha="0" * 64, **params):
    description = Description(
        kind=kind, name=name, class_name="X", version=version, reference="", summary="", source_sha256=sha, params={}
    )
    return EntrySpec(description, params, None)


TASK = Task(dataset="digits", architecture=Architecture(name="mlp"))
CELL = Cell(suite="s", task=TASK, attack=entry(), trials=10, trials_per_job=4)


def ids(*cells, season=DEVELOPMENT):
    return {job.id for job in plan(cells, season)}


@settings(deadline=None)  # a busy machine is no failure
@given(trials=st.integers(1, 300), size=st.integers(1, 100))
def test_the_blocks_of_a_cell_tile_its_trials_in_fixed_places(trials, size):
    jobs = plan([replace(CELL, trials=trials, trials_per_job=size)], DEVELOPMENT)
    assert [trial for job in jobs for trial in job.trials] == list(range(trials))
    assert all(job.start % size == 0 and job.stop - job.start <= size for job in jobs)
    assert len({job.id for job in jobs}) == len(jobs)


@settings(deadline=None)  # a busy machine is no failure
@given(few=st.integers(1, 60), more=st.integers(0, 60))
def test_more_trials_keep_the_whole_blocks_there_are(few, more):
    first = {job.id for job in plan([replace(CELL, trials=few)], DEVELOPMENT) if job.stop - job.start == 4}
    assert first <= ids(replace(CELL, trials=few + more))


@pytest.mark.parametrize(
    "change",
    [
        {"task": TASK.model_copy(update={"stage": "early"})},
        {"task": TASK.model_copy(update={"batch": BatchSpec(size=2)})},
        {"task": TASK.model_copy(update={"version": 2})},
        {"attack": entry(name="b")},
        {"attack": entry(version=2)},
        {"attack": entry(sha="1" * 64)},
        {"attack": entry(p=1)},
        {"defense": (entry("defense", "d"),)},
        {"model_draws": "per_trial"},
        {"threads": 2},
        {"budget": Budget(wall_seconds=1.0)},
        {"budget": Budget(model_evaluations=5)},
    ],
)
def test_whatever_can_move_a_number_changes_every_id(change):
    assert not ids(CELL) & ids(replace(CELL, **change))


def test_the_order_of_defenses_is_part_of_the_identity():
    first, second = entry("defense", "d"), entry("defense", "e")
    assert not ids(replace(CELL, defense=(first, second))) & ids(replace(CELL, defense=(second, first)))


def test_a_season_is_part_of_the_identity_and_its_key_is_not_in_the_content():
    season = Season("spring", b"a secret of sixteen bytes or more")
    assert not ids(CELL) & ids(CELL, season=season)
    (job, *_) = plan([CELL], season)
    assert "a secret" not in repr(job)
    assert "a secret" not in repr(job.content())


def test_the_suite_and_other_cells_are_no_part_of_the_identity():
    other = replace(CELL, attack=entry(name="b"))
    assert ids(CELL) == ids(replace(CELL, suite="t"))
    assert ids(CELL, other) == ids(CELL) | ids(other)


def test_equal_cells_are_planned_once():
    assert len(plan([CELL, replace(CELL, suite="t")], DEVELOPMENT)) == 3


def test_an_id_is_the_same_in_every_process():
    (job,) = plan([replace(CELL, trials=1)], DEVELOPMENT)
    import json
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_plan import *; "
        "print(plan([replace(CELL, trials=1)], DEVELOPMENT)[0].id)"
    )
    from pathlib import Path

    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == job.id
    assert json.loads(json.dumps(job.content())) == job.content()


# --- shards -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no failure
@given(count=st.integers(1, 9), trials=st.integers(1, 60))
def test_shards_are_disjoint_and_together_all(count, trials):
    jobs = plan([replace(CELL, trials=trials, trials_per_job=1)], DEVELOPMENT)
    parts = [shard(jobs, index, count) for index in range(1, count + 1)]
    assert sorted(job.id for part in parts for job in part) == sorted(job.id for job in jobs)


def test_a_jobs_shard_does_not_depend_on_other_jobs():
    alone = plan([CELL], DEVELOPMENT)
    together = plan([CELL, replace(CELL, attack=entry(name="b"))], DEVELOPMENT)
    mine = {job.id for job in alone}
    assert [j.id for j in shard(together, 1, 3) if j.id in mine] == [j.id for j in shard(alone, 1, 3)]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "1.0/2"])
def test_a_bad_shard_is_one_line(text):
    with pytest.raises(UserError, match="expected I/N") as error:
        parse_shard(text)
    assert "\n" not in str(error.value)


def test_shards_count_from_one():
    assert parse_shard("1/2") == (1, 2)
    assert parse_shard("2/2") == (2, 2)

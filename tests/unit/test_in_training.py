"""Attacks on updates that a federated training kept: the very model, batch and update, and no client asked again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from forging import refused, rewrite

from leakbench.board.curves import board
from leakbench.data import load_dataset
from leakbench.entries import resolve
from leakbench.errors import InvalidOutput, UserError
from leakbench.federation.client import Client, ClientState
from leakbench.federation.inputs import to_inputs
from leakbench.grids import KeptFile
from leakbench.keys import DEVELOPMENT, Season
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.results import load_rows, write_job
from leakbench.runner import session
from leakbench.runner.exchange import _check_finite as check_finite
from leakbench.runner.plan import plan
from leakbench.stage import IN_TRAINING, SGDStage, stage_order
from leakbench.submitting.verify import verify
from leakbench.suites import load_suite
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel
from leakbench.utility.attacked import kept_cells
from leakbench.utility.kept import Kept, write_kept
from leakbench.utility.rows import UTILITY_FIELDS
from leakbench.utility.session import run_utility
from leakbench.utility.spec import SLOTS

ENTRIES = """
import torch
from leakbench import Attack, Defense, Recovery, register


class Look(Attack):
    '''Tells what it was handed, and guesses that all labels are the class of the steepest bias.'''

    recovers = frozenset({"labels"})

    def run(self, observation):
        def total(tensors):
            parts = [value.double().reshape(observation.trials, -1).sum(1) for value in tensors.values()]
            return torch.stack(parts).sum(0)

        model = observation.model
        notes = {
            "update": total(observation.update),
            "weights": total(model.parameters),
            "steps": float(observation.local_steps),
            "lr": observation.lr,
        }
        first = observation.update[f"{model.head}.bias"].argmin(1)
        counts = torch.nn.functional.one_hot(first, observation.num_classes) * observation.inputs_per_client
        return Recovery(label_counts=counts[:, None], notes=notes)


@register("crashes")
class Crashes(Defense):
    acts_on = frozenset({"update"})

    def update(self, update, ctx):
        raise RuntimeError("the client was asked")


@register("shows")
class Shows(Defense):
    acts_on = frozenset({"broadcast"})

    def broadcast(self, weights, ctx):
        return {name: 0 * value for name, value in weights.items()}
"""
SUITE = {
    "name": "trained",
    "version": 1,
    "description": "attacks on what was kept",
    "trials": 8,
    "trials_per_job": 2,
    "grids": [
        {
            "dataset": "digits",
            "architecture": "mlp",
            "batch": 1,
            "target": "labels",
            "attacks": ["{entries}:Look"],
            "defenses": ["none", "{entries}:Crashes", "{entries}:Shows"],
        },
        {
            "dataset": "digits",
            "architecture": "mlp",
            "batch": 1,
            "target": "inputs",
            "attacks": ["analytic"],
        },
        {
            "dataset": "digits",
            "architecture": "mlp",
            "batch": 1,
            "threat_model": {"bn_statistics": "exact_batch"},
            "attacks": ["{entries}:Look"],
        },
    ],
}
MLP = Task(dataset="digits", architecture=Architecture(name="mlp", params={"width": 12}), batch=BatchSpec(size=1))
STEPS = MLP.model_copy(
    update={
        "batch": BatchSpec(size=2),
        "protocol": Protocol(sends="delta", local_steps=4, batches="epochs", batches_per_epoch=2, lr=0.05),
    }
)
BN = MLP.model_copy(
    update={
        "architecture": Architecture(name="resnet20", params={"width": 4}),
        "batch": BatchSpec(size=2),
        "protocol": Protocol(batch_norm="train", send_buffers=True),
    }
)
SEED = 5


def row_of(out, run, **columns):
    """Write the row of a training: of a setting of its own, unless ``partition`` says otherwise."""
    blank = {pa.string(): "", pa.int64(): 0, pa.float64(): 0.1, pa.bool_(): False}
    row = {field.name: blank.get(field.type) for field in UTILITY_FIELDS}
    row |= {
        "utc": datetime(2026, 1, 1, tzinfo=UTC),
        "job_id": run,
        "season": "development",
        "partition": run,
        "defense": "none",
    }
    row |= {"status": "ok", "error": None, "curve": "[]", **columns}
    write_job(out / "utility", run, "development", [row], UTILITY_FIELDS)


def trained(out, task, *, defense="none", rounds=3, run=None, season="development", change=None, trial=0, row=None):
    """Train with one client by plain gradient steps, and keep the update of every round but the first.

    Nobody defends; ``defense`` is what it is called. ``trial`` is the number of the first.
    """
    run = run or task.hash[:16]
    row_of(out, run, **(row or {}))
    data, protocol = load_dataset(task.dataset), task.protocol
    count, stream = protocol.local_batches * task.batch.size, np.random.default_rng(SEED)
    shape, named = data.input_spec.shape, resolve("defense", defense)
    client, state = Client(protocol, task.batch.size), ClientState()
    model = build_model(task.architecture, shape, data.num_classes, seeds=[SEED])
    made = []
    for round_index in range(rounds):
        rows = stream.choice(data.rows("private"), count, replace=False)
        inputs, labels = to_inputs(data.images[rows][None], data.input_spec, True), torch.tensor(data.labels[rows])
        order = None
        if protocol.batches == "epochs":
            order = torch.tensor(np.stack([stream.permutation(count) for _ in range(2)])).view(1, 4, -1)
        random = TrialRandom(torch.zeros(1, 32, dtype=torch.uint8))
        update = client.update(
            model, inputs, labels[None], random=random, state=state, order=order, round_index=round_index
        )
        kept = Kept(
            run=run,
            season=season,
            task=task,
            fingerprint=data.fingerprint,
            num_classes=data.num_classes,
            partition="iid",
            seed=0,
            defense=defense,
            defense_content=[part.id_content() for part in named],
            trial=trial + round_index - 1,
            round=round_index,
            client=0,
            head=model.head,
            model=model.tensors(),
            update={name: value for name, value in update.items() if value.is_floating_point()},
            indices=torch.tensor(rows),
            labels=labels,
            order=None if order is None else order[0],
        )
        if round_index:
            made.append(kept if change is None else change(kept))
            write_kept(out, made[-1])
        moved = {name: value - 0.1 * update[name] for name, value in model.parameters.items()}
        model = model.with_state(parameters=moved)
    return made


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "mine.py").write_text(ENTRIES)
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE).replace("{entries}", str(folder / "mine.py")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(folder / "cache"))
        yield folder / "suite.yaml"


@pytest.fixture(scope="module")
def made(suite):
    """The output directory of a training, and what it kept by what was trained."""
    out, entries = suite.parent / "out", suite.parent / "mine.py"

    def spoil(kept):
        return replace(kept, update={name: value * np.nan for name, value in kept.update.items()})

    kept = {
        "plain": trained(out, MLP, rounds=5),
        "steps": trained(out, STEPS),
        "bn": trained(out, BN, rounds=2),
        "crashes": trained(out, MLP, defense=f"{entries}:Crashes", run="crashes"),
        "shows": trained(out, MLP, defense=f"{entries}:Shows", run="shows", rounds=2),
        "spoiled": trained(out, MLP.model_copy(update={"normalise": False}), run="spoiled", change=spoil),
    }
    return out, kept


def request(suite, out, **options):
    """Run nothing but what attacks kept updates."""
    return session.Request(
        suite=str(suite), in_training=out, out=out, workers=1, isolation="process", keep_cell=lambda _: True, **options
    )


@pytest.fixture(scope="module")
def rows(suite, made):
    with pytest.MonkeyPatch.context() as patch:
        asked = session.plan
        patch.setattr(session, "plan", lambda cells, season: asked([c for c in cells if c.kept], season))
        report = session.run_suite(request(suite, made[0]))
        again = session.run_suite(request(suite, made[0]))
    assert (again.run, again.skipped) == (0, report.planned)
    return load_rows(made[0])


def of(rows, task, attack="mine", **columns):
    found = rows[(rows.batch_size == task.batch.size) & (rows.normalise == task.normalise)]
    found = found[(found.architecture == task.architecture.name) & found.attack.str.lower().eq(attack)]
    for name, value in {"defense_label": "none", "target": "labels", "bn_statistics": "running", **columns}.items():
        found = found[found[name] == value]
    return found.sort_values("trial").reset_index(drop=True)


def total(tensors):
    return float(sum(value.double().sum() for value in tensors.values()))


@pytest.mark.parametrize(("which", "task"), [("plain", MLP), ("steps", STEPS), ("bn", BN)])
def test_an_attack_is_handed_the_very_model_and_update_that_were_kept(rows, made, which, task):
    found, kept = of(rows, task), made[1][which]
    assert set(found.status) == {"ok"}, found.error.tolist()
    notes = pd.DataFrame([json.loads(text) for text in found.notes])
    parameters = [{k: v for k, v in each.model.items() if k.startswith("parameter/")} for each in kept]
    np.testing.assert_allclose(notes["update"], [total(each.update) for each in kept], rtol=1e-6)
    np.testing.assert_allclose(notes.weights, [total(each) for each in parameters], rtol=1e-6)
    assert notes.weights.nunique() == len(kept)
    assert notes.steps.tolist() == [task.protocol.local_steps] * len(kept)
    assert notes.lr.tolist() == pytest.approx([task.protocol.lr] * len(kept))
    assert found.checkpoint_sha256.tolist() == [each.model_sha256 for each in kept]
    assert set(found.checkpoint_origin) == {"training"}
    assert set(found.stage) == {IN_TRAINING}


@pytest.mark.parametrize(("which", "task"), [("plain", MLP), ("steps", STEPS)])
def test_the_claim_is_scored_against_the_batch_that_was_kept(rows, made, which, task):
    found, kept = of(rows, task), made[1][which]
    counts = np.stack([np.bincount(each.labels, minlength=10) for each in kept])
    guesses = [int(each.update[f"{each.head}.bias"][0].argmin()) for each in kept]
    right = [row[guess] / row.sum() for row, guess in zip(counts, guesses, strict=True)]
    assert found.instance_recall.tolist() == pytest.approx(right)
    assert found.distinct_labels.tolist() == (counts > 0).sum(1).tolist()
    assert set(found.lane) == {"passive_labels"}


def test_a_first_layer_gives_the_kept_images_back(rows):
    found = of(rows, MLP, "analytic", target="inputs")
    assert len(found) == 4
    assert found.recovered.eq(1).all()
    assert found.psnr.min() > 60
    assert set(found.lane) == {"passive_images"}


def test_no_client_is_asked_again(rows):
    found = of(rows, MLP, defense_label="crashes")
    assert found.status.tolist() == ["ok", "ok"], found.error.tolist()
    assert found.client_seconds.isna().all()


def test_what_was_not_kept_is_not_made_up(rows):
    assert of(rows, MLP, defense_label="shows").error.str.contains("shows of the model").all()
    found = of(rows, BN, bn_statistics="exact_batch")
    assert found.error.str.contains("BatchNorm statistics").all()
    assert set(found.status) == set(of(rows, MLP, defense_label="shows").status) == {"not_applicable"}
    assert set(of(rows, MLP, bn_statistics="exact_batch").status) == {"ok"}


def test_an_update_that_is_not_finite_is_the_clients_failure(rows):
    found = of(rows, MLP.model_copy(update={"normalise": False}))
    assert set(found.status) == {"invalid"}
    assert found.error.str.match("client: the update's .* is not finite").all()


def test_only_a_buffer_that_counts_is_sent_as_whole_numbers():
    count, mean = torch.tensor([3]), torch.zeros(1, 2)
    buffers = {"norm.num_batches_tracked": count, "norm.running_mean": mean}
    check_finite({"norm.num_batches_tracked": count, "norm.running_mean": mean, "weight": mean}, buffers)
    for name in ("weight", "norm.running_mean"):
        with pytest.raises(InvalidOutput, match=f"the update's '{name}' is not finite"):
            check_finite({name: count}, buffers)
    with pytest.raises(InvalidOutput, match="is not finite"):
        check_finite({"norm.num_batches_tracked": torch.tensor([np.nan])}, buffers)


# --- the plan ---------------------------------------------------------------------------------------------------------


def cells_of(suite):
    return load_suite(str(suite)).expand()


def test_cells_are_those_of_the_suite_with_the_trainings_task(suite, made):
    found = kept_cells(made[0], cells_of(suite), DEVELOPMENT)
    assert {cell.task.stage for cell in found.cells} == {IN_TRAINING}
    assert {cell.model_draws for cell in found.cells} == {"per_trial"}
    own = [cell for cell in found.cells if cell.task.batch == STEPS.batch and cell.task.protocol == STEPS.protocol]
    assert {cell.task.architecture.params["width"] for cell in own} == {12}
    assert sorted((cell.attack.name, cell.task.target) for cell in own) == [
        ("analytic", "inputs"),
        ("mine", "labels"),
        ("mine", "labels"),
    ]
    assert all(cell.trials == len(cell.kept) == 2 for cell in own)
    assert not found.left_out
    few = kept_cells(made[0], cells_of(suite), DEVELOPMENT, trials=1)
    assert {cell.trials for cell in few.cells} == {1}


def test_gradients_of_trainings_at_other_rates_are_trials_of_one_task(suite, tmp_path):
    for rate in (0.1, 0.5):
        first = 0 if rate == 0.1 else 2
        trained(tmp_path, MLP.model_copy(update={"protocol": Protocol(lr=rate)}), run=f"lr{first}", trial=first)
        trained(tmp_path, STEPS.model_copy(update={"protocol": STEPS.protocol.model_copy(update={"lr": rate})}))
    found = kept_cells(tmp_path, cells_of(suite), DEVELOPMENT).cells
    rates = {(c.task.protocol.sends, c.task.protocol.lr, c.trials) for c in found}
    assert rates == {("gradient", 0.1, 4), ("delta", 0.1, 2), ("delta", 0.5, 2)}


def test_what_guessing_is_worth_follows_the_partition(suite, tmp_path):
    for partition in ("iid", "dirichlet(0.1)"):
        trained(tmp_path, MLP, run=partition[0], change=lambda kept, own=partition: replace(kept, partition=own))
    found = {cell.task.batch: cell.trials for cell in kept_cells(tmp_path, cells_of(suite), DEVELOPMENT).cells}
    assert found == {BatchSpec(size=1): 2, BatchSpec(size=1, sampler="dirichlet", alpha=0.1): 2}


def test_only_trainings_that_came_to_an_end_at_the_chosen_rate_are_attacked(suite, tmp_path):
    one = {"partition": "iid"}
    trained(tmp_path, MLP, run="good", row=one | {"lr": 0.3, "accuracy_holdout": 0.8})
    trained(tmp_path, MLP, run="bad", trial=2, row=one | {"lr": 0.1, "accuracy_holdout": 0.7})
    trained(tmp_path, MLP, run="broken", trial=4, row={"status": "invalid"})
    found = kept_cells(tmp_path, cells_of(suite), DEVELOPMENT)
    assert {cell.trials for cell in found.cells} == {2}
    assert {Path(file.path).name.partition("-")[0] for cell in found.cells for file in cell.kept} == {"good"}
    assert found.left_out == {"of trainings that failed, or at a learning rate that was not chosen": 4}


def test_a_gap_moves_no_trial(suite, tmp_path):
    base = 7 * SLOTS
    for seed in range(4):
        status = "invalid" if seed == 1 else "ok"
        trained(tmp_path, MLP, run=f"s{seed}", trial=base + 2 * seed, row={"status": status})
    found = kept_cells(tmp_path, cells_of(suite), DEVELOPMENT).cells
    jobs = [job for job in plan(found, DEVELOPMENT) if job.attack.name == "analytic"]
    numbers = {trial - base: file.path.name for job in jobs for trial, file in zip(job.trials, job.kept, strict=True)}
    assert numbers == {2 * seed + i: f"s{seed}-{i + 1}-0.safetensors" for seed in (0, 2, 3) for i in (0, 1)}
    few = plan(kept_cells(tmp_path, cells_of(suite), DEVELOPMENT, trials=5).cells, DEVELOPMENT)
    assert {trial - base for job in few for trial in job.trials} == {0, 1, 4}


def test_of_two_trainings_behind_a_trial_the_later_is_attacked(suite, tmp_path):
    for run, day in (("old", 1), ("new", 3), ("mid", 2)):
        trained(tmp_path, MLP, run=run, row={"utc": datetime(2026, 1, day, tzinfo=UTC), "lr_grid": run})
    found = kept_cells(tmp_path, cells_of(suite), DEVELOPMENT).cells
    assert {file.path.name for cell in found for file in cell.kept} == {f"new-{i}-0.safetensors" for i in (1, 2)}


def cell_with(suite, **changes):
    cell = cells_of(suite)[0]
    return replace(cell, task=Task(**{**dict(cell.task), **changes}))


def test_only_attacks_after_the_fact_on_single_updates_suit(suite, made):
    malicious = ThreatModel(adversary="malicious_server")
    cohort = Protocol(clients=2, secure_aggregation=True)
    for changes in (
        {"threat_model": malicious},
        {"protocol": cohort},
        {"protocol": Protocol(rounds=2)},
        {"target": "membership"},
        {"dataset": "mnist"},
    ):
        with pytest.raises(UserError, match="nothing to attack: none: "):
            kept_cells(made[0], [cell_with(suite, **changes)], DEVELOPMENT)


def test_updates_of_another_version_of_a_defense_are_not_attacked_in_its_name(suite, tmp_path):
    entries = suite.parent / "mine.py"

    def older(kept):
        return replace(kept, defense_content=[{**kept.defense_content[0], "source_sha256": "other"}])

    trained(tmp_path, MLP, defense=f"{entries}:Crashes", change=older)
    trained(tmp_path, MLP, run="plain")
    found = kept_cells(tmp_path, cells_of(suite), DEVELOPMENT)
    assert {cell.defense for cell in found.cells} == {()}
    ((reason, count),) = found.left_out.items()
    assert count == 2
    assert "of another version of the defense" in reason


def test_the_command_line_says_what_it_does_not_find(leakbench, suite, tmp_path):
    code, _, error = leakbench("run", suite, "--in-training", tmp_path, "--out", tmp_path)
    assert code == 2
    assert f"expected updates in {tmp_path / 'utility' / 'kept'}, got none" in error
    report = session.Report("out", "board", 1, 1, 0, [], {}, {}, not_attacked={"none: of another dataset": 3})
    assert "3 kept updates not attacked: none: of another dataset" in report.text()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("nothing", "expected updates in .*, got none; make some with: leakbench utility"),
        ("season", "is of season spring, expected development"),
        ("damaged", "expected an update that leakbench utility kept"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(suite, tmp_path, case, says):
    if case != "nothing":
        trained(tmp_path, MLP, season="spring" if case == "season" else "development")
    if case == "damaged":
        next((tmp_path / "utility" / "kept").iterdir()).write_bytes(b"12")
    with pytest.raises(UserError, match=says):
        kept_cells(tmp_path, cells_of(suite), DEVELOPMENT)


def test_a_file_that_changed_since_it_was_planned_is_not_attacked(suite, tmp_path):
    trained(tmp_path, MLP)
    jobs = plan(kept_cells(tmp_path, cells_of(suite), DEVELOPMENT).cells, DEVELOPMENT)
    trained(tmp_path, MLP, change=lambda kept: replace(kept, seed=1))
    with execute_runner(tmp_path) as runner, pytest.raises(UserError, match="changed since the run was planned"):
        runner.preflight(jobs)


def test_another_dataset_than_the_trainings_is_refused(suite, tmp_path):
    trained(tmp_path, MLP, change=lambda kept: replace(kept, fingerprint="f" * 64))
    jobs = plan(kept_cells(tmp_path, cells_of(suite), DEVELOPMENT).cells, DEVELOPMENT)
    with execute_runner(tmp_path) as runner, pytest.raises(UserError, match="is another one than the training had"):
        runner.preflight(jobs)


def execute_runner(out):
    from leakbench.runner.execute import Runner

    return Runner(out, season=DEVELOPMENT, isolation="none")


def test_the_job_is_named_by_its_kept_updates_and_others_as_before(suite):
    cell = replace(cells_of(suite)[0], trials=4)
    kept = tuple(KeptFile(suite.with_name(name), name * 64) for name in "abcd")
    task = cell.task.model_copy(update={"stage": IN_TRAINING})
    jobs = plan([replace(cell, task=task, kept=kept)], DEVELOPMENT)
    assert [job.content()["kept"] for job in jobs] == [["a" * 64, "b" * 64], ["c" * 64, "d" * 64]]
    swapped = plan([replace(cell, task=task, kept=(kept[1], kept[0], *kept[2:]))], DEVELOPMENT)
    assert jobs[0].id != swapped[0].id
    assert jobs[1].id == swapped[1].id
    moved = plan([replace(cell, task=task, kept=tuple(KeptFile(suite, file.sha256) for file in kept))], DEVELOPMENT)
    assert [job.id for job in moved] == [job.id for job in jobs]
    assert "kept" not in plan([cell], DEVELOPMENT)[0].content()


def test_the_stage_cannot_be_asked_for_without_kept_updates(suite):
    cell = cells_of(suite)[0]
    task = cell.task.model_copy(update={"stage": IN_TRAINING})
    with pytest.raises(UserError, match="leakbench run SUITE --in-training OUT"):
        plan([replace(cell, task=task)], Season("spring", b"k" * 32))


def test_the_stage_stands_after_all_others():
    assert SGDStage.parse(IN_TRAINING) is None
    stages = ["sgd(steps=9)", IN_TRAINING, "pretrained", "untrained", "sgd(steps=2)"]
    assert sorted(stages, key=stage_order) == ["untrained", "pretrained", "sgd(steps=2)", "sgd(steps=9)", IN_TRAINING]


def test_what_a_federation_sends_has_a_lane_and_elsewhere_a_known_rate_has_none():
    threat = STEPS.threat_model
    for lr, lane in ((True, "passive_labels"), (False, "passive_update")):
        own = {"stage": IN_TRAINING, "threat_model": threat.model_copy(update={"lr": lr})}
        assert STEPS.model_copy(update=own).lane == lane
    assert STEPS.lane is None
    malicious = {"stage": IN_TRAINING, "threat_model": ThreatModel(adversary="malicious_server")}
    assert STEPS.model_copy(update=malicious).lane == "malicious_server"


# --- a defense that behaves only when attacked ------------------------------------------------------------------------

EXPLOIT = Path(__file__).parents[1] / "exploits" / "noise_when_attacked.py"
CHEAT = {
    "name": "cheat",
    "version": 1,
    "description": "a defense under attack, and what it sent in training",
    "trials": 12,
    "utility": {
        "dataset": "digits",
        "architecture": {"name": "mlp", "params": {"width": 12}},
        "partition": "iid",
        "batch_size": 4,
        "rounds": 12,
        "evaluate_every": 12,
        "seeds": 1,
        "keep": 12,
    },
    "grids": [
        {
            "dataset": "digits",
            "architecture": {"name": "mlp", "params": {"width": 12}},
            "batch": 4,
            "attacks": ["bias_count"],
            "defenses": ["none", f"{EXPLOIT}:NoiseWhenAttacked"],
        }
    ],
}


@pytest.fixture(scope="module")
def cheat(tmp_path_factory):
    """Rows of attacks on the exploit, and on what it sent in training."""
    out = tmp_path_factory.mktemp("cheat")
    (out / "suite.yaml").write_text(yaml.safe_dump(CHEAT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(out / "cache"))
        asked = request(out / "suite.yaml", out)
        assert run_utility(replace(asked, in_training=None)).failed == []
        report = session.run_suite(asked)
    assert (report.planned, report.failed) == (4, [])
    rows = load_rows(out)
    rows.attrs["out"] = out
    return rows


def test_a_defense_that_behaves_only_when_attacked_is_private_where_it_is_attacked_and_leaks_in_training(cheat):
    cheats = cheat.defense == "noise_when_attacked"
    means = cheat.groupby([cheats, "stage"]).instance_recall.mean()
    chance = cheat.instance_recall_chance.iloc[0]
    assert means[False, "untrained"] > means[True, "untrained"] + 0.2
    assert means[True, "untrained"] < chance + 0.1
    # Which rounds were kept is nobody's to know; few are the first.
    assert means[True, IN_TRAINING] > (means[False, IN_TRAINING] + chance) / 2 > means[True, "untrained"]


def test_attacks_on_what_was_kept_are_paired_and_verified(cheat):
    sent = cheat[cheat.stage == IN_TRAINING]
    shown = sent.pivot_table(index="trial", columns="defense", values=["distinct_labels", "max_label_count"])
    assert len(shown) == 12
    for name in ("distinct_labels", "max_label_count"):
        assert shown[name].nunique(axis=1).eq(1).all()
    found = verify([cheat.attrs["out"]], entries=[f"{EXPLOIT}:NoiseWhenAttacked"])
    assert found.problems == []
    assert not any("not recomputed" in note.text for note in found.notes)
    (cheat.attrs["out"] / "utility" / "kept").rename(cheat.attrs["out"] / "elsewhere")
    texts = [note.text for note in verify([cheat.attrs["out"]], entries=[f"{EXPLOIT}:NoiseWhenAttacked"]).notes]
    (cheat.attrs["out"] / "elsewhere").rename(cheat.attrs["out"] / "utility" / "kept")
    assert sum("not recomputed" in text for text in texts) == 2


FORGED_TRAININGS = [
    ({"lr": 0.25}, "is none of lr_grid"),
    ({"lr": 0.25, "lr_grid": "[0.25]"}, "job id"),
    ({"partition": "dirichlet(0.1)"}, "job id"),
    ({"clients": 99}, "job id"),
    ({"rounds": 1}, "job id"),
    ({"batch_size": 3}, "job id"),
    ({"holdout": 0.4}, "job id"),
    ({"architecture_params": '{"width":99}'}, "job id"),
    ({"precision": "none"}, "describe no training"),
    ({"defense_params": '{"std":0.5}'}, "job id"),
    ({"defense": "gaussian_noise", "defense_source_sha256": "a" * 64}, "job id"),
    ({"threads": 7}, "job id"),
    ({"seed": 1}, "is not the one trial"),
    ({"accuracy": 0.999}, "is not the mean of the last evaluations"),
    ({"accuracy": 1.999}, "is no share"),
]


def one_job(out, folder, to, **columns):
    """Copy the first undefended job whose rows have these columns, without any other."""
    columns |= {"defense": "none"}
    paths = [*sorted((out / folder).rglob("*.parquet"))]
    path = next(p for p in paths if pq.read_table(p, columns=[*columns]).to_pylist()[0] == columns)
    place = to / path.relative_to(out)
    place.parent.mkdir(parents=True)
    shutil.copy(path, place)
    assert refused(to) == []
    return place


@pytest.mark.parametrize(("values", "says"), FORGED_TRAININGS, ids=["-".join(f[0]) for f in FORGED_TRAININGS])
def test_a_training_with_a_changed_setting_is_refused(cheat, tmp_path, values, says):
    rewrite(one_job(cheat.attrs["out"], "utility", tmp_path), values)
    assert any(says in text for text in refused(tmp_path)), refused(tmp_path)


ON_KEPT = [{"checkpoint_sha256": "a" * 64}, {"attack_version": 9}, {"budget_model_evaluations": 3}]


@pytest.mark.parametrize("values", ON_KEPT, ids=["-".join(values) for values in ON_KEPT])
def test_an_attack_on_what_was_kept_with_a_changed_column_is_refused(cheat, tmp_path, values):
    out = cheat.attrs["out"]
    path = one_job(out, "development", tmp_path, stage=IN_TRAINING)
    shutil.copytree(out / "utility" / "kept", tmp_path / "utility" / "kept")
    rewrite(path, values)
    assert any("job id" in text for text in refused(tmp_path)), refused(tmp_path)


def test_the_board_ranks_such_a_defense_by_what_it_sent_in_training(cheat):
    tables = {name: table[table.role == "defense"] for name, table in board(cheat).items() if "role" in table}
    privacy = tables["tasks"].set_index("task").privacy
    static, seen = (
        privacy[f"digits-mlp-width12-{stage}-b4-iid-gradient-labels"] for stage in ("untrained", IN_TRAINING)
    )
    assert static > 0.9
    assert seen < 0.5
    # The verdict is the leak, not a mean over tasks: whoever is attacked on many tasks must not drown what it sent.
    assert tables["settings"].privacy.tolist() == [seen]
    assert IN_TRAINING in tables["settings"].worst_task.item()

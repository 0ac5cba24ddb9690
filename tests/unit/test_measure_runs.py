"""`leakbench measure`: rows of every layer whatever happens, computed where the defense is, independent of the cut."""

from __future__ import annotations

import importlib
import inspect
import re

import pandas as pd
import pytest
import torch

from leakbench.entries import resolve, resolve_all
from leakbench.errors import UserError
from leakbench.federation.client import Client
from leakbench.federation.inputs import to_inputs
from leakbench.grids import Cell
from leakbench.keys import DEVELOPMENT
from leakbench.measures.catalogue import ALL, MEASURES, resolve_measure
from leakbench.measures.rows import MEASURE_FIELDS
from leakbench.measures.subject import Clients, Subject
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.results import MEASURES_FOLDER, load_measures, read_job_status
from leakbench.runner.measure import MeasureRunner
from leakbench.runner.plan import plan
from leakbench.runner.scene import Scenes
from leakbench.tasks import Architecture, AttributeSpec, BatchSpec, Protocol, Task, ThreatModel

pytestmark = pytest.mark.usefixtures("one_cache")
TRIALS = 24
NET = Architecture(name="mlp", params={"width": 6, "depth": 1})
PLAIN = Task(dataset="digits", architecture=NET, batch=BatchSpec(size=2))
ASKED = Task(
    dataset="digits_parity",
    architecture=NET,
    batch=BatchSpec(size=2),
    threat_model=ThreatModel(auxiliary=50),
    target="attribute",
    attribute=AttributeSpec(name="ge5"),
)
DEFENSES = '''
import torch
from leakbench import Defense

class Crash(Defense):
    def update(self, update, ctx):
        raise ValueError("a defense that crashes")

class Nonsense(Defense):
    def update(self, update, ctx):
        return {name: value * float("nan") for name, value in update.items()}

class Forge(Defense):
    """Would rather have the measure say nothing."""
    def __init__(self):
        from leakbench.measures import sensitivity
        sensitivity.sensitivity = lambda subject, probes: {}

class Hang(Defense):
    def update(self, update, ctx):
        import time
        time.sleep(60)
        return update
'''


@pytest.fixture(scope="module")
def defenses(one_cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("entries") / "mine.py"
    path.write_text(DEFENSES)
    resolve_all([("defense", f"{path}:{name}") for name in ("Crash", "Nonsense", "Forge", "Hang")])
    return path


@pytest.fixture(scope="module")
def runner(defenses, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with MeasureRunner(out, season=DEVELOPMENT, isolation="process", files=[defenses]) as started:
        yield started


def jobs(measure, task=PLAIN, *, defense="none", trials=TRIALS, per_job=None, draws="one"):
    chain = resolve("defense", defense)
    cell = Cell("", task, resolve_measure(measure), chain, trials, per_job or trials, model_draws=draws)
    return plan([cell], DEVELOPMENT)


def rows_of(runner, *planned):
    outcomes = [runner.run(job) for job in planned]
    assert all(read_job_status(outcome.path) is not None for outcome in outcomes)
    rows = pd.concat([pd.read_parquet(outcome.path) for outcome in outcomes], ignore_index=True)
    assert list(rows.columns) == [field.name for field in MEASURE_FIELDS]
    return rows


CHEAP = {
    "sensitivity": "sensitivity(probes=4)",
    "spectrum": "spectrum(exact=200)",
    "subspace_distance": "subspace_distance(k=3, permutations=20, projection=64, train=64)",
    "v_information": "v_information(train=64, families='logistic')",
    "v_information_original": "v_information_original(train=64)",
    "latent_sensitivity": "latent_sensitivity(probes=4, train=32)",
    "bayes_cramer_rao": "bayes_cramer_rao(probes=4, train=32)",
    "fisher": "fisher(probes=4)",
    "reference_fisher": "reference_fisher(probes=4)",
}


@pytest.mark.parametrize("name", list(MEASURES))
def test_every_measure_gives_what_it_declares_for_every_trial_and_layer(runner, name):
    spec = MEASURES.get(name)
    noise = "clip_l2(bound=1.0)+gaussian_noise(std=0.1)"
    (job,) = jobs(CHEAP.get(name, name), ASKED, defense=noise)
    rows = rows_of(runner, job)
    assert set(rows["status"]) == {"ok"}, rows["error"].iloc[0]
    declared = {quantity.name: quantity for quantity in spec.quantities}
    assert set(rows["quantity"]) <= set(declared)
    assert set(rows["layer"]) <= {"body.linear0", "fc", ALL}
    assert rows["value"].notna().all()
    for quantity, own in rows.groupby("quantity"):
        assert set(own["kind"]) == {declared[quantity].kind}
        per_layer = own.groupby("layer").size()
        assert (per_layer == (1 if spec.fitted else TRIALS)).all()
        assert own["trial"].isna().all() == spec.fitted


@pytest.mark.parametrize("name", list(MEASURES))
def test_parameters_are_those_of_the_function_that_measures(name):
    spec = MEASURES.get(name)
    function = getattr(importlib.import_module(f"leakbench.measures.{spec.module}"), name)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    assert {p.name: p.default for p in parameters} == spec.params
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    assert spec.fitted or all(q.kind != "lower_bound" for q in spec.quantities)


def test_rows_do_not_depend_on_how_trials_are_cut(runner):
    whole = rows_of(runner, *jobs("sensitivity(probes=4)"))
    parts = rows_of(runner, *jobs("sensitivity(probes=4)", per_job=10))
    keys = ["quantity", "layer", "trial"]
    joined = whole.merge(parts, on=keys, suffixes=("", "_cut"))
    assert len(joined) == len(whole) == len(parts)
    torch.testing.assert_close(
        torch.tensor(joined["value"].to_numpy()), torch.tensor(joined["value_cut"].to_numpy()), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("draws", ["one", "per_trial"])
def test_the_norm_is_that_of_the_gradient_of_the_jobs_own_victims(runner, draws):
    """Computed here from the victims, the weights and the client alone."""
    (job,) = jobs("sensitivity(probes=4)", draws=draws)
    rows = rows_of(runner, job)
    scenes = Scenes(DEVELOPMENT)
    victims, weights = scenes.victims(PLAIN, job.trials), scenes.weights(PLAIN, draws, job.trials)
    data = scenes.dataset(PLAIN)
    model = build_model(NET, data.input_spec.shape, 10, seeds=[0]).with_state(weights.parameters)
    client = Client(Protocol(), 2)
    inputs = to_inputs(victims.inputs[:, 0], data.input_spec, True)
    random = TrialRandom(torch.zeros(TRIALS, 32, dtype=torch.uint8))
    update = client.update(model, inputs, torch.tensor(victims.labels[:, 0]), random=random)
    whole = torch.cat([value.flatten(1) for value in update.values()], 1).norm(dim=1)
    own = rows[(rows["quantity"] == "gradient_norm") & (rows["layer"] == ALL)].sort_values("trial")
    torch.testing.assert_close(torch.tensor(own["value"].to_numpy()).float(), whole, rtol=1e-4, atol=1e-6)
    assert own["checkpoint_sha256"].tolist() == [weights.sha256[t % len(weights.sha256)] for t in range(TRIALS)]


@pytest.mark.parametrize(
    ("measure", "task", "defense", "status", "says"),
    [
        ("latent_sensitivity", PLAIN, "none", "not_applicable", "target: attribute"),
        ("fisher", PLAIN, "none", "not_applicable", "noise"),
        ("sensitivity(probes=2)", PLAIN, "Crash", "error", "a defense that crashes"),
        ("sensitivity(probes=2)", PLAIN, "Nonsense", "invalid", "NaN or infinity"),
        ("i2f", PLAIN.model_copy(update={"batch": BatchSpec(size=5000)}), "none", "unavailable", "batch larger"),
    ],
)
def test_what_went_wrong_is_one_row_that_says_so(runner, defenses, measure, task, defense, status, says):
    text = defense if defense == "none" else f"{defenses}:{defense}"
    (job,) = jobs(measure, task, defense=text)
    rows = rows_of(runner, job)
    assert len(rows) == 1
    assert rows["status"].tolist() == [status]
    assert says in rows["error"].iloc[0]
    assert rows["value"].isna().all()


@pytest.mark.parametrize("name", ["v_information", "v_information_original", "subspace_distance", "sensitivity"])
def test_a_layer_that_is_withheld_says_nothing(runner, name):
    (job,) = jobs(CHEAP[name], ASKED, defense="withhold_layers")
    rows = rows_of(runner, job)
    assert set(rows["status"]) == {"ok"}, rows["error"].iloc[0]
    withheld = rows[(rows["layer"] == "body.linear0") & rows["quantity"].isin([name, "sensitivity_rms"])]
    assert withheld["value"].abs().max() < 0.1


def test_a_defense_that_hangs_is_the_clients_failure_before_the_measure_starts(runner, defenses, monkeypatch):
    monkeypatch.setattr("leakbench.runner.measure.CLIENT_SECONDS_PER_TRIAL", 0.5)
    monkeypatch.setattr("leakbench.runner.measure.GRACE_SECONDS", 10.0)
    (job,) = jobs("sensitivity(probes=2)", defense=f"{defenses}:Hang")
    rows = rows_of(runner, job)
    assert rows["status"].tolist() == ["timeout"]
    assert rows["error"].iloc[0].startswith("client: took longer")


def test_the_measure_is_found_before_the_defense_is_imported(runner, defenses):
    (job,) = jobs("sensitivity(probes=2)", defense=f"{defenses}:Forge")
    rows = rows_of(runner, job)
    assert set(rows["status"]) == {"ok"}
    assert len(rows[rows["quantity"] == "gradient_norm"]) == 3 * TRIALS


def test_every_failed_block_is_read_and_counts_its_trials(runner, defenses, tmp_path):
    with MeasureRunner(tmp_path, season=DEVELOPMENT, isolation="process", files=[defenses]) as other:
        for job in jobs("sensitivity(probes=2)", defense=f"{defenses}:Crash", per_job=10):
            outcome = other.run(job)
            assert read_job_status(outcome.path).statuses == {"error": len(job.trials)}
    read = load_measures(tmp_path)
    assert sorted(read["block_start"]) == [0, 10, 20]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sensitivity(probes=0)", "probes: expected at least 1, got 0"),
        ("robustness(kappa=2.0)", "kappa: expected more than 0 and less than 1"),
        ("v_information(families='svm')", "got 'svm'"),
        ("i2f(damping=-1.0)", "damping: expected more than 0"),
        ("sensitivity+spectrum", "expected one measure, got 2"),
        ("sensitivty", "Did you mean 'sensitivity'"),
    ],
)
def test_a_wrong_measure_is_one_line_before_anything_runs(text, says):
    with pytest.raises(UserError, match=re.escape(says)):
        resolve_measure(text)


def test_a_fitted_measure_needs_trials_that_share_a_model(runner):
    rows = rows_of(runner, *jobs("v_information_original(train=32)", draws="per_trial"))
    assert rows["status"].tolist() == ["not_applicable"]
    assert "model_draws: one" in rows["error"].iloc[0]


def test_a_block_of_many_large_updates_is_not_refused(runner, monkeypatch):
    monkeypatch.setattr(runner._shop, "memory", 1000)
    assert runner.preflight(jobs("sensitivity(probes=4)")) == {}


def test_rows_lie_beside_those_of_attacks_and_are_read_from_there(runner):
    rows_of(runner, *jobs("sensitivity(probes=4)"))
    read = load_measures(runner._out)
    assert (runner._out / MEASURES_FOLDER).is_dir()
    again = read.groupby(["task_hash", "measure_params", "defense_label", "model_draws", "quantity", "layer", "trial"])
    assert (again.size() == 1).all()


def test_a_subject_sums_cohorts_as_the_protocol_does():
    """K clients of unequal sizes: the mean of their own updates, by examples where the protocol weighs so."""
    model = build_model(NET, (1, 8, 8), 10, seeds=[0])
    protocol = Protocol(clients=2, secure_aggregation=True, weighting="examples")
    clients, sizes = [Client(protocol, 1), Client(protocol, 3)], [1, 3]
    images, labels = torch.rand(2, 4, 1, 8, 8), torch.randint(10, (2, 4))
    random = TrialRandom(torch.zeros(2, 32, dtype=torch.uint8))
    subject = Subject(
        model=model,
        cohort=Clients(protocol=protocol, clients=clients, sizes=sizes, weights=(1, 3)),
        spec=Scenes(DEVELOPMENT).dataset(PLAIN).input_spec,
        normalise=False,
        images=images,
        labels=labels,
        random=random,
    )
    alone = [
        client.update(model, images[:, a:b], labels[:, a:b], random=random)
        for client, (a, b) in zip(clients, [(0, 1), (1, 4)], strict=True)
    ]
    for name, value in subject.update().items():
        torch.testing.assert_close(value, (alone[0][name] + 3 * alone[1][name]) / 4)
    part = subject.part(1, 2).update()
    for name, value in subject.update().items():
        torch.testing.assert_close(value[1:], part[name])

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch

import leakbench
from leakbench import UserError, evaluate, load_task
from leakbench.entries import describe
from leakbench.federation.inputs import to_inputs
from leakbench.keys import DEVELOPMENT, Season
from leakbench.runner.scene import Scenes
from leakbench.sources import find_source, sources
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

NET = Architecture(name="mlp", params={"width": 4, "depth": 1})
TASK = Task(dataset="digits", architecture=NET, batch=BatchSpec(size=3))
TRIALS = 3

ENTRIES = '''
import torch

from leakbench import Attack, Defense, Recovery, register


def projection(update):
    """One number per trial that every coordinate of the update moves."""
    total = 0
    for index, name in enumerate(sorted(update)):
        flat = update[name].double().flatten(1)
        total = total + (flat * torch.sin(torch.arange(flat.shape[1]) + index)).sum(1)
    return total.float()


@register("project", version=3)
class Project(Attack):
    """Claims one class for everything, and reports a projection of what it saw.

    Reference: nobody, nothing, 2026
    """

    recovers = frozenset({"labels"})

    def __init__(self, *, guess: int = 0, factor: float = 1.0) -> None:
        self.guess = guess
        self.factor = factor

    def run(self, observation):
        T = observation.trials
        if any(len(value) != T for update in observation.updates for value in update.values()):
            raise RuntimeError("sees something per client")
        counts = torch.zeros(T, observation.clients, observation.num_classes, dtype=torch.int64)
        counts[:, :, self.guess] = observation.inputs_per_client
        return Recovery(label_counts=counts, visible_loss=self.factor * projection(observation.update))


class Plant(Attack):
    """Sends a head of zeros in round 1, whose bias gradient holds the label counts; another head in round 0."""

    recovers = frozenset({"labels"})
    needs = frozenset({"weights", "change_parameters"})
    reads = ("head.bias",)

    def plant(self, model, cohort, history):
        seen = self.__dict__.setdefault("seen", [])
        seen.append([update[f"{model.head}.bias"].clone() for update in history])
        weight, bias = (model.parameters[f"{model.head}.{part}"][:1] for part in ("weight", "bias"))
        first = torch.zeros_like(bias)
        first[:, 0] = 0.0 if history else 50.0
        return {f"{model.head}.weight": torch.zeros_like(weight), f"{model.head}.bias": first}

    def run(self, observation):
        if [len(history) for history in self.seen] != [0, 1]:
            raise RuntimeError("expected two rounds")
        # A head that is sure of class 0 has a bias gradient of 1 - n/B there, and of -n/B elsewhere.
        before, now = (update[f"{observation.model.head}.bias"] for update in observation.updates)
        if not torch.equal(before, self.seen[1][0]):
            raise RuntimeError("the history is not what was observed")
        C, B = observation.num_classes, observation.batch_size
        counts, earlier = (1 / C - now) * B, -before * B
        earlier[:, 0] += B
        if not torch.allclose(counts, earlier, atol=1e-4):
            raise RuntimeError("the rounds disagree")
        return Recovery(label_counts=counts.round().long()[:, None])


@register("scale")
class Scale(Defense):
    """Multiplies the update."""

    def __init__(self, *, by: float) -> None:
        self.by = by

    def update(self, update, ctx):
        return {name: value * self.by for name, value in update.items()}


@register("shift")
class Shift(Scale):
    """Adds to the update."""

    def update(self, update, ctx):
        return {name: value + self.by for name, value in update.items()}


class Positional(Attack):
    recovers = frozenset({"labels"})

    def __init__(self, guess=1):
        self.guess = guess

    def run(self, observation):
        return Recovery()


class Forgets(Positional):
    def __init__(self, *, guess=1):
        pass


class Nothing(Attack):
    def run(self, observation):
        return Recovery()
'''


@pytest.fixture(scope="module", autouse=True)
def path(one_cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("entries") / "mine.py"
    path.write_text(ENTRIES)
    own = [("attack", "Project"), ("attack", "Plant"), ("defense", "Scale"), ("defense", "Shift")]
    installed = [find_source(kind, name) for kind in ("attack", "defense") for name in sources(kind)]
    describe([*(find_source(kind, f"{path}:{name}") for kind, name in own), *installed])  # in one child
    return path


@pytest.fixture(scope="module")
def mine(path):
    """The file as a module of this process."""
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "mine", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def cell():
    """The same classes without a file, as in a notebook's cell."""
    names = {"__name__": "a_notebook_cell"}
    exec(ENTRIES, names)
    return type("Cell", (), names)


def quick(attack, task=TASK, defense=None, **options):
    """Evaluate without a child server, and expect that everything went well."""
    rows = evaluate(attack, task, defense, **({"trials": TRIALS, "isolation": "none"} | options))
    assert set(rows.status) == {"ok"}, rows.error.iloc[0]
    return rows


# --- entries in every form --------------------------------------------------------------------------------------------


def test_names_with_parameters_run_behind_the_boundary():
    task = load_task("quick:digits-mlp-untrained-b8-unbalanced-gradient-labels")
    rows = evaluate(
        "bias_count(confidence='uniform')",
        "quick:digits-mlp-untrained-b8-unbalanced-gradient-labels",
        "topk(p=0.5)+gaussian_noise(std=0.01)",
        trials=TRIALS,
        trials_per_job=2,
        isolation="process",
    )
    assert rows.status.tolist() == ["ok"] * TRIALS
    assert rows.trial.tolist() == [0, 1, 2]
    assert set(rows.isolation) == {"process"}
    assert set(rows.task_hash) == {task.hash}
    assert json.loads(rows.attack_params[0])["confidence"] == "uniform"
    assert set(rows.defense) == {"topk+gaussian_noise"}
    assert [part.get("p", part.get("std")) for part in json.loads(rows.defense_params[0])] == [0.5, 0.01]
    assert rows.job_id.nunique() == 2


def test_an_instance_from_a_file_is_the_entry_of_that_file(path, mine):
    rows = quick(mine.Project(guess=3))
    named = quick(f"{path}:Project(guess=3)")
    same = [c for c in rows if not c.endswith("_seconds") and c not in ("utc", "peak_memory_bytes")]
    assert rows[same].equals(named[same])
    assert json.loads(rows.attack_params[0]) == {"guess": 3, "factor": 1.0}
    assert rows.attack_version[0] == 3
    assert rows.attack[0] == "project"
    assert rows.attack_source_sha256[0] == find_source("attack", f"{path}:Project").sha256
    other = quick(mine.Project(guess=4))
    assert other.job_id[0] != rows.job_id[0]
    assert other.attack_source_sha256[0] == rows.attack_source_sha256[0]


def test_a_class_without_a_file_runs_without_isolation_and_its_rows_say_so(cell, mine):
    rows = quick(cell.Project(guess=3), defense=cell.Scale(by=2.0), isolation="auto")
    assert set(rows.isolation) == {"none"}
    assert rows.attack_source_sha256.isna().all()
    assert rows.defense_source_sha256.isna().all()
    assert json.loads(rows.attack_params[0]) == {"guess": 3, "factor": 1.0}
    assert json.loads(rows.defense_params[0]) == {"by": 2.0}
    from_file = quick(mine.Project(guess=3), defense=mine.Scale(by=2.0))
    for column in ("instance_recall", "visible_loss"):
        assert rows[column].tolist() == from_file[column].tolist()


def test_a_defense_that_was_never_registered_goes_by_the_name_of_its_class(mine):
    class Local(leakbench.Defense):
        """Reads its streams and its state, which are kept by name."""

        def update(self, update, ctx):
            ctx.state["seen"] = ctx.random.randn(1)
            return update

    rows = quick(mine.Project(), defense=Local())
    assert set(rows.defense) == {"Local"}
    assert rows.visible_loss.tolist() == quick(mine.Project()).visible_loss.tolist()


def test_a_chain_of_instances_acts_in_order(mine):
    plain_loss = quick(mine.Project()).visible_loss
    chain = quick(mine.Project(), defense=[mine.Scale(by=2.0), "gaussian_noise(std=0)", mine.Scale(by=3.0)])
    assert chain.visible_loss.tolist() == pytest.approx((6 * plain_loss).tolist(), rel=1e-4)
    assert chain.defense[0] == "scale+gaussian_noise+scale"
    first = quick(mine.Project(), defense=[mine.Scale(by=2.0), mine.Shift(by=1.0)]).visible_loss
    last = quick(mine.Project(), defense=[mine.Shift(by=1.0), mine.Scale(by=2.0)]).visible_loss
    shift = last - first  # shifted before scaling: once more the projection of ones
    assert shift.std() < 1e-3
    assert shift.abs().min() > 1e-3


# --- rows -------------------------------------------------------------------------------------------------------------


def test_out_keeps_the_rows_and_a_later_call_does_only_what_is_missing(tmp_path, mine):
    first = quick(mine.Project(), out=tmp_path, trials=4, trials_per_job=2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(files) == 2
    more = quick(mine.Project(), out=tmp_path, trials=6, trials_per_job=2)
    assert more.trial.tolist() == list(range(6))
    assert more[:4].equals(first)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(list(tmp_path.rglob("*.parquet"))) == 3
    assert quick(mine.Project(guess=1), out=tmp_path, trials=2).trial.tolist() == [0, 1]


def test_a_class_without_a_file_is_measured_again_because_its_code_may_have_changed(tmp_path, cell):
    before = quick(cell.Project(), out=tmp_path)
    cell.Project.run = lambda self, seen: leakbench.Recovery(
        label_counts=torch.zeros(seen.trials, 1, 10, dtype=torch.int64), visible_loss=torch.full((seen.trials,), 7.0)
    )
    after = quick(cell.Project(), out=tmp_path)
    assert after.job_id.tolist() == before.job_id.tolist()
    assert after.visible_loss.tolist() == [7.0] * TRIALS


def test_a_season_decides_the_victims(mine):
    first, again, other = (
        quick(mine.Project(), season=season).visible_loss.tolist()
        for season in (DEVELOPMENT, DEVELOPMENT, Season("secret", b"0123456789abcdef"))
    )
    assert first == again
    assert first != other


# --- federations ------------------------------------------------------------------------------------------------------


def reference(task, mine):
    """Return what every client's update projects to, (K, T), from single trials in plain PyTorch."""
    scenes = Scenes(DEVELOPMENT)
    victims, weights = scenes.victims(task, range(TRIALS)), scenes.weights(task, "one", range(TRIALS))
    inputs = to_inputs(victims.inputs, scenes.dataset(task).input_spec, task.normalise)
    labels = torch.tensor(victims.labels)
    net = plain_net(weights)
    projections = []
    for k in range(task.protocol.clients):
        rows = []
        for t in range(TRIALS):
            loss = torch.nn.functional.cross_entropy(net(inputs[t, k]), labels[t, k])
            rows.append(torch.autograd.grad(loss, list(net.parameters())))
        names = [name for name, _ in net.named_parameters()]
        update = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
        projections.append(mine.projection(update))
    return torch.stack(projections)


def plain_net(weights):
    hidden, head = torch.nn.Linear(64, 4), torch.nn.Linear(4, 10)
    net = torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.ReLU(), head)
    for layer, name in ((hidden, "body.linear0"), (head, "fc")):
        layer.load_state_dict({part: weights.parameters[f"{name}.{part}"][0] for part in ("weight", "bias")})
    names = torch.nn.Module()
    names.body, names.fc = torch.nn.Module(), head
    names.body.linear0 = hidden
    names.forward = net.forward
    return names


def test_of_an_aggregate_only_the_mean_over_its_clients_is_seen(mine):
    task = TASK.model_copy(update={"protocol": Protocol(clients=3, secure_aggregation=True)})
    each = reference(task, mine)
    assert each.std(0).min() > 1e-3
    rows = quick(mine.Project(), task)
    assert rows.visible_loss.tolist() == pytest.approx(each.mean(0).tolist(), rel=1e-4, abs=1e-5)
    assert set(rows.lane) == {"aggregate"}


def test_secure_aggregation_of_one_client_changes_nothing_but_the_task(mine):
    alone = quick(mine.Project())
    secure = quick(mine.Project(), TASK.model_copy(update={"protocol": Protocol(clients=1, secure_aggregation=True)}))
    for column in ("visible_loss", "instance_recall", "distinct_labels", "checkpoint_sha256"):
        assert secure[column].tolist() == alone[column].tolist()
    assert alone.visible_loss.tolist() == pytest.approx(reference(TASK, mine)[0].tolist(), rel=1e-4, abs=1e-5)


MALICIOUS = TASK.model_copy(
    update={
        "protocol": Protocol(rounds=2),
        "threat_model": ThreatModel(adversary="malicious_server", change_parameters=True),
    }
)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_what_a_malicious_server_plants_reaches_the_clients_round_by_round(path, isolation):
    rows = quick(f"{path}:Plant", MALICIOUS, isolation=isolation)
    assert rows.count_exact_match.tolist() == [1.0] * TRIALS
    assert set(rows.lane) == {"malicious_server"}


def test_a_server_that_may_not_plant_gives_rows_that_say_so(path):
    rows = evaluate(f"{path}:Plant", TASK, trials=2, isolation="none")
    assert set(rows.status) == {"not_applicable"}
    assert "change_parameters" in rows.error[0]
    assert rows.instance_recall.isna().all()
    assert not math.isnan(rows.instance_recall_chance[0])


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials: expected a whole number of at least 1, got 0"),
        ({"trials": 2.5}, "trials: expected a whole number of at least 1, got 2.5"),
        ({"trials": "4"}, "trials: expected a whole number of at least 1, got '4'"),
        ({"trials_per_job": -1}, "trials_per_job: expected a whole number"),
        ({"threads": 0}, "threads: expected a whole number"),
        ({"model_draws": "two"}, "model_draws: expected 'one' or 'per_trial', got 'two'"),
        ({"budget": {"wall_second": 3}}, "budget: wall_second: "),
        ({"budget": {"wall_seconds": -3}}, "budget: wall_seconds: .*got -3"),
        ({"isolation": "jail"}, "jail"),
        ({"device": "tpu"}, "--device tpu: expected cpu, cuda or cuda:N"),
        ({"task": "quick"}, "expected SUITE:TASK"),
        ({"task": 3}, "task: expected a Task or 'suite:task-id', got int"),
        (
            {"task": TASK.model_copy(update={"target": "inputs"})},
            "'bias_count' recovers labels, the task's target is in",
        ),
        ({"attack": "bias_cont"}, "unknown attack 'bias_cont'. Did you mean 'bias_count'"),
        ({"attack": "bias_count(x=1)"}, "no parameter 'x'"),
        ({"attack": 3}, "attack: expected a name, 'file.py:Class' or an instance of Attack, got int"),
        ({"attack": []}, "attack: expected one attack, got 0"),
        ({"attack": "gone.py:Mine"}, "gone.py"),
        ({"defense": "topkk"}, "unknown defense 'topkk'. Did you mean 'topk'"),
        ({"defense": ["topk", 3]}, "defense: expected a name, 'file.py:Class' or an instance of Defense, got int"),
    ],
)
def test_a_mistake_is_one_line(options, message, tmp_path):
    arguments = {"attack": "bias_count", "task": TASK, "trials": 2, "isolation": "none", "out": tmp_path} | options
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        evaluate(**arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda cell: {"attack": cell.Project}, "an instance of Attack, got the class Project"),
        (lambda cell: {"attack": cell.Scale(by=1.0)}, "an instance of Attack, got Scale"),
        (lambda cell: {"attack": cell.Positional()}, "make 'guess' keyword-only"),
        (lambda cell: {"attack": cell.Forgets()}, "must store its argument as self.guess"),
        (lambda cell: {"attack": cell.Project(guess=[1])}, "expected a number, a string, a bool or None"),
    ],
)
@pytest.mark.parametrize("origin", ["cell", "mine"])
def test_a_mistake_in_an_instance_is_one_line(make, message, origin, request):
    refused(message, **make(request.getfixturevalue(origin)))


def test_a_declaration_that_is_missing_is_one_line(cell):
    refused("recovers: expected a set out of labels, inputs, attribute, membership", attack=cell.Nothing())


def test_what_needs_a_file_says_so(cell):
    refused("project has none; save the class in a file", attack=cell.Project(), isolation="process")
    twice = [cell.Scale(by=1.0), cell.Scale(by=2.0)]
    refused("two instances without a file are called 'scale'", attack=cell.Project(), defense=twice)


def refused(message, **arguments):
    with pytest.raises(UserError) as error:
        evaluate(**({"task": TASK, "trials": 2, "isolation": "none"} | arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_public_names_are_those_that_are_documented():
    assert set(leakbench.__all__) >= {
        "Attack", "Defense", "Observation", "Recovery", "evaluate", "load_suite", "load_task", "register",
    }  # fmt: skip
    for name in leakbench.__all__:
        assert getattr(leakbench, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        _ = leakbench.evaluat

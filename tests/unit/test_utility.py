"""`leakbench utility`: the training is federated SGD with the defense in it, and a row says what it cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from leakbench.data import load_dataset
from leakbench.entries import resolve, resolve_all
from leakbench.errors import InvalidOutput
from leakbench.federation.client import Client
from leakbench.federation.inputs import to_inputs
from leakbench.grids import Suite
from leakbench.keys import DEVELOPMENT
from leakbench.models.functional import build_model, flat_state
from leakbench.randomness import TrialRandom
from leakbench.results import load_utility
from leakbench.runner.loading import load_chain
from leakbench.runner.pool import run_jobs
from leakbench.runner.scene import Scenes
from leakbench.tasks import Protocol
from leakbench.utility.federation import Server, upload_bytes
from leakbench.utility.kept import expression, read_file
from leakbench.utility.partition import LEAST, LEAST_HELD, batches, cut
from leakbench.utility.plan import best_rate, settings
from leakbench.utility.rows import UTILITY_FIELDS
from leakbench.utility.runner import UtilityRunner
from leakbench.utility.spec import SLOTS, UtilityGrid
from leakbench.utility.summary import compared, interval, lines, table

pytestmark = pytest.mark.usefixtures("one_cache")
NET = {"name": "mlp", "params": {"width": 8, "depth": 1}}
SMALL = {"dataset": "digits", "architecture": NET, "clients": 3, "rounds": 4, "batch_size": 8, "lr": [0.5], "seeds": 1}
HEAD = "from leakbench import Defense\n\nclass Mine(Defense):\n"
DEFENSES = {
    "crash": """
    def step(self, grads, ctx):
        if ctx.round == 2:
            raise ValueError("a defense that crashes")
        return grads
""",
    "nonsense": """
    def update(self, update, ctx):
        return {name: value * float("nan") for name, value in update.items()}
""",
    "sleepy": """
    def update(self, update, ctx):
        import time
        time.sleep(0.5)
        return update
""",
    # Has the net built and judged in a child, and changes nothing.
    "same": """
    acts_on = frozenset({"model"})
    def model(self, model):
        return model
""",
}
PRIVATE, FED_BACK = "dp_sgd(noise_multiplier=0.0, clip=1e9)", "topk(p=0.9, error_feedback=True)"
EPSILON = "dp_sgd(noise_multiplier=4.0, clip=1.0)"
NOISE, SPARSE = "gaussian_noise(std=0.1)", "topk(p=0.8)"


@pytest.fixture(scope="module")
def mine(one_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("entries")
    for name, body in DEFENSES.items():
        (folder / f"{name}.py").write_text(HEAD + body)
    own = {name: f"{folder / name}.py:Mine" for name in DEFENSES}
    known = (PRIVATE, EPSILON, FED_BACK, NOISE, SPARSE, "sign", "fp16", "qsgd")
    resolve_all([("defense", text) for text in (*own.values(), *known)])  # in one child instead of many
    return own


@pytest.fixture(scope="module")
def runner(mine, tmp_path_factory):
    out, files = tmp_path_factory.mktemp("out"), [Path(text.rpartition(":")[0]) for text in mine.values()]
    with UtilityRunner(out, season=DEVELOPMENT, isolation="process", files=files) as started:
        yield started


def suite(**changes):
    grids = [{"dataset": "digits", "architecture": "mlp", "attacks": "bias_count"}]
    return Suite.model_validate(
        {"name": "u", "version": 1, "description": "d", "trials": 1, "grids": grids, "utility": SMALL | changes}
    )


def jobs(*defenses, **changes):
    """The trainings of every partition and rate under the defenses, and none."""
    chosen = settings(suite(**{"partition": "iid"} | changes), defenses)
    return [job for setting in chosen for job in setting.candidates(DEVELOPMENT)]


def row_of(runner, job):
    row = pd.read_parquet(runner.run(job).path)
    assert list(row.columns) == [field.name for field in UTILITY_FIELDS]
    assert len(row) == 1
    return row.iloc[0]


def kept_of(runner, job):
    found = map(read_file, (runner._out / "utility" / "kept").glob(f"{job.id}-*.safetensors"))
    return {(kept.round, kept.client): kept for kept in found}


# --- who holds what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["iid", "dirichlet(0.5)", "dirichlet(0.1)"])
def test_every_private_example_is_held_out_or_held_by_one_client(partition):
    data = load_dataset("digits")
    shares = cut(data, partition, clients=10, holdout=0.1, seed=3, key=b"k")
    every = np.concatenate([shares.holdout, *shares.clients])
    assert sorted(every) == sorted(data.rows("private"))
    assert len(shares.holdout) == round(0.1 * len(every))
    assert min(shares.sizes) >= LEAST
    assert np.array_equal(shares.holdout, cut(data, "iid", clients=4, holdout=0.1, seed=0, key=b"k").holdout)
    again, other = (cut(data, partition, clients=10, holdout=0.1, seed=seed, key=b"k") for seed in (3, 4))
    assert all(map(np.array_equal, again.clients, shares.clients))
    assert not all(np.array_equal(a, b) for a, b in zip(other.clients, shares.clients, strict=True))


def test_labels_are_the_more_skewed_the_smaller_alpha():
    data = load_dataset("digits")

    def largest_share(partition):
        """Mean over clients and seeds of the share of their most frequent class."""
        cuts = [cut(data, partition, clients=10, holdout=0.1, seed=seed, key=b"k") for seed in range(4)]
        counts = [np.bincount(data.labels[rows]).max() / len(rows) for each in cuts for rows in each.clients]
        return float(np.mean(counts))

    iid, half, tenth = map(largest_share, ("iid", "dirichlet(0.5)", "dirichlet(0.1)"))
    assert iid < 0.22 < half < 0.5 < tenth  # of 97 examples in 10 classes the largest class has about 16%


def test_a_client_passes_over_its_examples_before_one_comes_again():
    data = load_dataset("digits")
    shares = cut(data, "dirichlet(0.5)", clients=4, holdout=0.1, seed=0, key=b"k")
    taken = batches(shares, 8, 60, ("here",), b"k")
    assert taken.shape == (60, 4, 8)
    for k, rows in enumerate(shares.clients):
        stream = taken[:, k].reshape(-1)
        whole = len(stream) // len(rows)
        turns = stream[: whole * len(rows)].reshape(whole, len(rows))
        assert all(np.array_equal(np.sort(turn), np.sort(rows)) for turn in turns)
        assert whole < 2 or not np.array_equal(turns[0], turns[1])


# --- the training is federated SGD ------------------------------------------------------------------------------------


def examples(data, indices):
    indices = np.asarray(indices)
    return to_inputs(data.images[indices], data.input_spec, True).double(), torch.tensor(data.labels[indices])


def first_weights(job):
    return Scenes(DEVELOPMENT).weights(job.task, "per_trial", [job.start])


def net_of(job):
    """The initial net as a plain torch function of its parameters."""
    data, weights = load_dataset("digits"), first_weights(job)
    state = flat_state(weights.parameters, weights.buffers)
    module = build_model(job.task.architecture, data.input_spec.shape, 10, state=state).module
    start = {name: value[0].double() for name, value in weights.parameters.items()}
    return lambda values, x: torch.func.functional_call(module, values, (x,)), start


def gradient(net, values, x, y):
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    loss = cross_entropy(net(leaves, x), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(model, values):
    for name, value in values.items():
        torch.testing.assert_close(model[f"parameter/{name}"][0], value, rtol=0, atol=1e-6)


def test_one_client_with_all_examples_is_gradient_descent(runner):
    count = len(load_dataset("digits").rows("private"))
    held = count - round(0.1 * count)
    protocol = {"sends": "gradient", "precision": "float64"}
    (job,) = jobs(clients=1, batch_size=held, rounds=5, protocol=protocol, keep=5)
    assert row_of(runner, job)["status"] == "ok"
    kept = kept_of(runner, job)
    net, values = net_of(job)
    assert sorted(kept) == [(i, 0) for i in range(5)]
    x, y = examples(load_dataset("digits"), kept[0, 0].indices)
    for i in range(5):
        assert_close(kept[i, 0].model, values)
        moved = gradient(net, values, x, y)
        values = {name: value - 0.5 * moved[name] for name, value in values.items()}
    assert not torch.equal(kept[0, 0].indices, kept[1, 0].indices)  # another order, the same examples


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_several_clients_with_local_steps_are_federated_averaging(runner, sends):
    protocol = {"sends": sends, "local_steps": 2, "precision": "float64"}
    (job,) = jobs(partition="dirichlet(0.5)", protocol=protocol, rounds=3, keep=9)
    sizes = json.loads(row_of(runner, job)["client_sizes"])
    assert len(set(sizes)) > 1
    kept, data = kept_of(runner, job), load_dataset("digits")
    net, values = net_of(job)
    for i in range(3):
        assert_close(kept[i, 0].model, values)
        trained = []
        for k in range(3):
            own = dict(values)
            for step in range(2):
                x, y = examples(data, kept[i, k].indices[8 * step : 8 * step + 8])
                moved = gradient(net, own, x, y)
                own = {name: value - 0.5 * moved[name] for name, value in own.items()}
            trained.append(own)
        values = {n: sum(s * own[n] for s, own in zip(sizes, trained, strict=True)) / sum(sizes) for n in values}


def test_dp_sgd_without_noise_and_bound_changes_nothing(runner):
    plain, private = (jobs(PRIVATE, keep=12)[i] for i in (0, 1))
    rows = [row_of(runner, job) for job in (plain, private)]
    assert rows[0]["curve"] == rows[1]["curve"]
    last, same = (kept_of(runner, job)[3, 0].model for job in (plain, private))
    assert_close(same, {name.partition("/")[2]: value[0] for name, value in last.items()})


def test_epsilon_is_that_of_the_noise_and_of_how_often_an_example_is_used(runner):
    plain, private = jobs(EPSILON, keep=12)
    assert pd.isna(row_of(runner, plain)["epsilon"])
    epsilon = row_of(runner, private)["epsilon"]
    used = torch.cat([kept.indices for kept in kept_of(runner, private).values()]).bincount().max()
    mu = 2 / 4.0 * math.sqrt(used)  # replacing an example moves the sum of clipped gradients by 2 C; the noise is 4 C
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    ends = (torch.tensor(sign * mu / 2 - epsilon / mu, dtype=torch.float64) for sign in (1, -1))
    above, below = (float(normal.cdf(end)) for end in ends)
    assert above - math.exp(epsilon) * below == pytest.approx(1e-5, rel=1e-6)


def test_running_statistics_are_averaged_by_examples():
    protocol = Protocol(sends="delta", local_steps=2, batch_norm="train", send_buffers=True)
    count = torch.zeros(1, dtype=torch.int64)
    server = Server({"w": torch.zeros(1, 2)}, {"mean": torch.zeros(1, 2), "n": count}, protocol, torch.tensor([1, 3]))
    assert server.sent() == {"w": (2, 2), "mean": (2, 2)}
    server.take({"w": torch.tensor([[4.0, 0.0], [0.0, 8.0]]), "mean": torch.tensor([[1.0, 2.0], [5.0, 2.0]])})
    assert server.parameters["w"].tolist() == [[-1.0, -6.0]]
    assert server.buffers["mean"].tolist() == [[4.0, 2.0]]
    with pytest.raises(InvalidOutput, match="not finite"):
        server.check({"w": torch.full((2, 2), math.nan), "mean": torch.zeros(2, 2)})
    with pytest.raises(InvalidOutput, match="'mean' as nothing"):
        server.check({"w": torch.zeros(2, 2)})


def test_a_net_with_batch_norm_is_judged_with_the_statistics_that_clients_sent(runner):
    net = {"name": "mlp", "params": {"width": 16, "depth": 1, "batch_norm": True}}
    protocol = {"sends": "delta", "local_steps": 4, "batch_norm": "train", "send_buffers": True}
    (job,) = jobs(architecture=net, protocol=protocol, rounds=8, keep=24)
    row, kept = row_of(runner, job), kept_of(runner, job)
    assert row["accuracy"] > 0.6
    name = next(name for name in kept[0, 0].model if name.endswith("running_mean"))
    sizes = np.array(json.loads(row["client_sizes"]))
    sent = torch.cat([kept[0, k].update[name.partition("/")[2]] for k in range(3)])
    expected = torch.tensor(sizes / sizes.sum()).float() @ sent
    torch.testing.assert_close(kept[1, 0].model[name][0], expected)


# --- rows -------------------------------------------------------------------------------------------------------------

SAME = ["status", "accuracy", "accuracy_holdout", "curve", "upload_bytes", "checkpoint_sha256", "client_sizes"]


def test_rows_do_not_depend_on_workers(runner, tmp_path):
    planned = jobs(NOISE, FED_BACK, lr=[0.2, 0.5])

    class Quiet:
        def finished(self, outcome):
            pass

    with UtilityRunner(tmp_path, season=DEVELOPMENT, isolation="process", workers=2) as other:
        assert run_jobs(planned, other, Quiet(), workers=2).statuses == {"ok": 6}
        found = {path.stem: pd.read_parquet(path).iloc[0] for path in (tmp_path / "utility").glob("*/*/*.parquet")}
    for job in planned:
        alone = row_of(runner, job)
        assert found[job.id][SAME].to_list() == alone[SAME].to_list()
    curves = {(row["defense"], row["lr"]): row["curve"] for row in found.values()}
    assert len(set(curves.values())) == 6
    assert len({row["client_sizes"] + row["checkpoint_sha256"] for row in found.values()}) == 1  # paired


def test_a_net_that_a_defense_builds_is_judged_like_any_other(runner, mine):
    plain, built = jobs(mine["same"])
    assert row_of(runner, built)["curve"] == row_of(runner, plain)["curve"]


def test_client_time_is_what_the_client_computes_and_not_what_it_waits_for(runner, mine):
    sleepy = jobs(mine["sleepy"], rounds=2)[1]
    assert 0 < row_of(runner, sleepy)["client_seconds"] < 0.4


def test_what_fails_or_diverges_is_of_no_use_and_the_others_go_on(leakbench, mine, tmp_path):
    out, path = tmp_path / "out", tmp_path / "tiny.yaml"
    content = suite(partition=["iid"], seeds=2, defenses=[mine["crash"], mine["nonsense"], "sign"]).content()
    path.write_text(json.dumps(content))
    command = ("utility", path, "--out", out, "--workers", 1, "--isolation", "process")
    code, printed, _ = leakbench(*command)
    assert code == 1
    assert printed.count("a defense that crashes") == printed.count("  utility 0: ") == 2
    assert (
        f"next: leakbench run {path} --out {out} --in-training {out}\nnext: leakbench board {out} --defenses" in printed
    )
    assert "8 of 8 trainings run" in printed
    rows = load_utility(out).set_index(["defense", "seed"])
    for seed in (0, 1):
        crash, nonsense = rows.loc[("crash", seed)], rows.loc[("nonsense", seed)]
        assert (crash["status"], nonsense["status"]) == ("error", "invalid")
        assert (crash["rounds_done"], nonsense["rounds_done"]) == (2, 0)
        for failed in (crash, nonsense):
            assert failed["accuracy"] == failed["accuracy_chance"] < 0.15
            assert failed["utility"] == 0
            assert failed["drop"] == pytest.approx(100 * (rows.loc[("none", seed)]["accuracy"] - failed["accuracy"]))
        assert rows.loc[("sign", seed)]["status"] == rows.loc[("none", seed)]["status"] == "ok"

    code, printed, _ = leakbench(*command)
    assert "0 of 8 trainings run, 8 were there" in printed
    gone = next(p for p in out.glob("utility/*/*/*.parquet") if pd.read_parquet(p)["defense"][0] == "sign")
    before = pd.read_parquet(gone).iloc[0]
    gone.unlink()
    code, printed, _ = leakbench(*command)
    assert "1 of 8 trainings run, 7 were there" in printed
    assert pd.read_parquet(gone).iloc[0][SAME].to_list() == before[SAME].to_list()
    code, printed, _ = leakbench("status", out / "utility")
    assert "8 of 8 jobs done, 4 failed" in printed

    code, printed, _ = leakbench(*command, "--defense", mine["nonsense"])
    assert code == 0
    assert "0 of 4 trainings run, 4 were there" in printed
    assert "crash" not in printed.partition("next:")[0]
    assert printed.count("  utility 0: ") == 2


def test_upload_is_what_deflates():
    values = torch.randn(2, 4000)
    sparse = values * (torch.rand(2, 4000) < 0.05)
    dense = upload_bytes({"w": values}, 0)
    assert 0.85 * 16000 < dense < 16000
    assert upload_bytes({"w": sparse}, 1) < 0.2 * dense
    assert upload_bytes({"w": values.sign()}, 0) < 0.1 * dense  # one bit of 32, and what marks it


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_kept_update_is_what_the_client_makes_of_the_kept_model_and_batch(runner):
    job = jobs(SPARSE, keep=5)[1]
    row_of(runner, job)
    kept, data = kept_of(runner, job), load_dataset("digits")
    assert len(kept) == 5
    chain = [part.id_content() for part in resolve("defense", expression(job.defense))]
    assert chain == [part.id_content() for part in job.defense]
    for one in kept.values():
        assert one.defense_content == chain
        assert one.task == job.task
        model = build_model(one.task.architecture, data.input_spec.shape, 10, state=one.model)
        inputs = to_inputs(data.images[one.indices.numpy()], data.input_spec, True)[None]
        client = Client(one.task.protocol, 8, load_chain([part.request() for part in job.defense], {}))
        random = TrialRandom(torch.zeros(1, 32, dtype=torch.uint8))
        again = client.update(model, inputs, one.labels[None], random=random)
        for name, value in again.items():
            torch.testing.assert_close(one.update[name], value, rtol=1e-5, atol=1e-7)
        assert torch.equal(one.labels, torch.tensor(data.labels[one.indices.numpy()]))


def victims(runner, job):
    row_of(runner, job)
    return {kept.trial: (pair, kept.indices.tolist()) for pair, kept in kept_of(runner, job).items()}


def test_a_trial_is_of_the_same_victim_whatever_the_defense_and_the_learning_rate(runner):
    planned = jobs(SPARSE, keep=5, lr=[0.2, 0.5])
    found = [victims(runner, job) for job in planned]
    assert len(found) == 4
    assert all(own == found[0] for own in found)
    first = min(found[0])
    assert first % SLOTS == 0
    assert sorted(found[0]) == list(range(first, first + 5))


def test_trials_of_other_seeds_and_federations_are_others(runner):
    one, other = jobs(keep=5, seeds=2)
    (longer,) = jobs(keep=5, rounds=5)
    first, second, third = (victims(runner, job) for job in (one, other, longer))
    assert min(second) == min(first) + 5
    assert {pair for pair, _ in first.values()} != {pair for pair, _ in second.values()}
    assert min(third) // SLOTS != min(first) // SLOTS


# --- plans and summaries ----------------------------------------------------------------------------------------------


def test_the_undefended_client_is_always_trained_and_defenses_are_those_of_the_attacks(mine):
    grids = {"dataset": "digits", "architecture": "mlp", "attacks": "bias_count", "defenses": ["sign", "fp16"]}
    content = suite().content()
    whole = Suite.model_validate(content | {"grids": [grids]})
    names = [tuple(part.name for part in setting.defense) for setting in settings(whole)]
    assert names == [()] * 3 + [("sign",)] * 3 + [("fp16",)] * 3
    given = settings(suite(partition="dirichlet(.50)"), ["qsgd"])
    assert [(s.partition, len(s.defense)) for s in given] == [("dirichlet(0.5)", 0), ("dirichlet(0.5)", 1)]


def test_entries_that_differ_in_their_defenses_train_what_they_share_once():
    content = suite(partition=["iid"], seeds=2, defenses=["sign"]).content()
    content["utility"] = [content["utility"][0] | {"defenses": own} for own in (["sign"], ["fp16"])]
    found = settings(Suite.model_validate(content))
    assert [[part.name for part in setting.defense] for setting in found] == [[], ["sign"], ["fp16"]]


def test_least_are_held_out():
    data = load_dataset("digits")
    assert len(cut(data, "iid", clients=4, holdout=0.01, seed=0, key=b"k").holdout) == LEAST_HELD == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.001}, "greater than or equal to 0.01"),
        ({"partition": "dirichlet(0)"}, "expected iid or dirichlet"),
        ({"protocol": {"clients": 2, "secure_aggregation": True}}, "one client does in one round"),
        ({"protocol": {"sends": "delta", "batch_norm": "train"}}, "send_buffers: true"),
        ({"keep": 13}, "at most clients"),
    ],
)
def test_a_grid_of_trainings_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UtilityGrid.model_validate(SMALL | change)


def test_the_rate_of_the_best_held_out_accuracy_is_chosen_and_of_equal_ones_the_first():
    planned = jobs(lr=[0.1, 0.2, 0.3])
    ids = [job.id for job in planned]
    assert best_rate(planned, dict(zip(ids, [0.5, 0.9, 0.9], strict=True))) == 0.2
    assert best_rate(planned, {ids[0]: None, ids[2]: 0.1}) == 0.3
    assert best_rate(planned, {}) is None


def made_row(defense="none", seed=0, lr=0.1, accuracy=0.9, holdout=0.9, **changes):
    filled = {field.name: 0 for field in UTILITY_FIELDS}
    return filled | {
        "defense": defense,
        "defense_label": defense,
        "defense_strength": "[null]",
        "defense_source_sha256": None,
        "dataset": "digits",
        "architecture": "mlp",
        "sends": "gradient",
        "partition": "iid",
        "seed": seed,
        "lr": lr,
        "status": "ok",
        "error": None,
        "accuracy": accuracy,
        "accuracy_chance": 0.1,
        "accuracy_holdout": holdout,
        "curve": json.dumps([[2, 0.2], [4, 0.86], [6, accuracy]]),
        "client_seconds": 2.0,
        "upload_bytes": 100.0,
        "epsilon": math.nan,
        "utc": pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(seconds=seed),
        **changes,
    }


def test_a_defense_is_compared_at_its_own_rate_with_the_undefended_training_of_the_same_seed():
    rows = pd.DataFrame(
        [
            made_row(lr=0.1, accuracy=0.5, holdout=0.5),
            made_row(lr=0.3, accuracy=0.9, holdout=0.8),
            made_row(lr=0.3, accuracy=0.8, holdout=0.1, seed=1),
            made_row("d", lr=0.1, accuracy=0.7, holdout=0.7, client_seconds=3.0, upload_bytes=20.0),
            made_row("d", lr=0.1, accuracy=0.9, holdout=0.7, seed=1),
            made_row("d", lr=0.3, accuracy=0.99, holdout=0.6),
            made_row("f", lr=0.1, accuracy=0.1, holdout=0.1, status="error", error="no", curve="[]"),
        ]
    )
    found = compared(rows).set_index(["defense", "seed"])
    assert set(found.index) == {("none", 0), ("none", 1), ("d", 0), ("d", 1), ("f", 0)}
    assert found["lr"].to_dict()["none", 0] == 0.3
    assert found.loc[("d", 0)]["drop"] == pytest.approx(20)
    assert found.loc[("d", 1)]["drop"] == pytest.approx(-10)
    assert found.loc[("d", 0)]["utility"] == pytest.approx(0.75)
    assert found.loc[("d", 1)]["utility"] == 1
    assert found.loc[("f", 0)]["utility"] == 0
    assert found.loc[("d", 0)][["client_time_ratio", "upload_ratio"]].to_list() == [1.5, 0.2]
    assert found.loc[("none", 0)]["rounds_to_target"] == 4  # .86 is at least 95% of .9
    assert math.isnan(found.loc[("f", 0)]["rounds_to_target"])
    line = table(compared(rows)).set_index("defense").loc["d"]
    assert line["drop"] == pytest.approx(5)
    assert (line["seeds"], line["failed"]) == (2, 0)
    assert line["drop_high"] - line["drop"] == pytest.approx(12.7062 * 15, rel=1e-4)  # t of one degree of freedom


def test_a_rate_is_chosen_among_those_of_its_own_budget():
    wide = {"lr_grid": "[0.1, 0.3]"}
    rows = [made_row(), made_row("d", accuracy=0.7, holdout=0.7)]
    rows += [made_row(**wide), made_row("d", lr=0.3, accuracy=0.8, holdout=0.8, **wide)]
    found = compared(pd.DataFrame(rows).astype({"lr_grid": str})).set_index(["defense", "lr_grid"])["drop"]
    assert found["d", "0"] == pytest.approx(20)
    assert found["d", "[0.1, 0.3]"] == pytest.approx(10)
    assert set(compared(pd.DataFrame([*rows[:2], made_row(planned_seeds=5)]))["planned_seeds"]) == {0, 5}


@pytest.mark.parametrize("level", [0.08, 0.149])
def test_nothing_is_lost_where_the_undefended_training_is_not_clearly_above_chance(level):
    rows = [made_row(accuracy=level), made_row("d", accuracy=0.05)]
    rows += [made_row("f", accuracy=0.1, status="invalid", error="nan")]
    found = compared(pd.DataFrame(rows))
    assert found[["drop", "utility", "rounds_to_target"]].isna().all(axis=None)
    assert found["utility_note"].str.contains(f"{100 * level:.1f}% is not clearly above chance, 10.0%").all()
    assert f"iid, none, d, f: without a defense {100 * level:.1f}%" in "\n".join(lines(table(found)))
    enough = compared(pd.DataFrame([made_row(accuracy=0.16), *rows[1:]])).set_index("defense")
    assert enough["utility"].to_dict() == {"none": 1, "d": 0, "f": 0}


def test_one_failed_training_is_no_utility_and_is_told():
    rows = [made_row(seed=seed) for seed in (0, 1)] + [made_row("d", accuracy=0.8)]
    rows += [made_row("d", seed=1, accuracy=0.1, status="invalid", error="nan", curve="[]")]
    found = compared(pd.DataFrame(rows)).set_index(["defense", "seed"])
    assert found.loc["d"]["utility"].to_list() == [0, 0]
    assert found.loc["d"]["drop"].to_list() == pytest.approx([10, 80])
    assert set(found.loc["d"]["utility_note"]) == {"1 of 2 trainings failed"}
    assert found.loc["none"]["utility"].to_list() == [1, 1]
    assert found.loc["none"]["utility_note"].isna().all()


def test_a_failed_undefended_training_is_told():
    rows = pd.DataFrame([made_row(accuracy=0.1, status="invalid", error="it diverged"), made_row("d", accuracy=0.8)])
    found = compared(rows)
    assert set(found["utility_note"]) == {"the undefended training failed: it diverged"}
    assert found[["drop", "utility", "upload_ratio", "client_time_ratio"]].isna().all(axis=None)
    assert set(compared(rows[1:])["utility_note"]) == {"there is no undefended training"}


def test_time_is_compared_at_the_same_rate_and_upload_at_the_chosen():
    rows = [made_row(lr=0.1, client_seconds=2.0), made_row(lr=0.3, holdout=0.95, client_seconds=8.0, upload_bytes=50.0)]
    rows += [made_row("d", lr=0.1, client_seconds=3.0), made_row("e", lr=0.2, client_seconds=3.0)]
    found = compared(pd.DataFrame(rows)).set_index("defense")
    assert found["client_time_ratio"].to_dict() == pytest.approx({"none": 1, "d": 1.5, "e": math.nan}, nan_ok=True)
    assert found["upload_ratio"].to_dict() == {"none": 1, "d": 2, "e": 2}


def test_intervals_are_those_of_student():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert all(map(math.isnan, interval([1.0])))

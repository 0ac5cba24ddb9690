"""Cohorts: unequal clients, the weighted sum, what a malicious server plants, who refuses, what is inserted."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakbench import Attack, Cohort, Defense, NotGranted, Recovery, UserError, evaluate
from leakbench.data import draw_victims, load_dataset
from leakbench.errors import InvalidOutput
from leakbench.federation.aggregation import StreamedSum, aggregation_weights
from leakbench.federation.gradients import per_trial_gradients
from leakbench.federation.inputs import to_inputs
from leakbench.federation.planting import Planted, check_planted
from leakbench.keys import DEVELOPMENT
from leakbench.models.functional import build_model
from leakbench.runner.scene import Scenes
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

NET = Architecture(name="mlp", params={"width": 4, "depth": 1})
SERVER = ThreatModel(adversary="malicious_server", change_parameters=True, per_client=True, change_architecture=True)
TRIALS, K = 3, 4
SIZES = (2, 5, 3)

pytestmark = pytest.mark.usefixtures("one_cache")


def task(*, clients=K, batch=None, threat=SERVER, target="labels", **protocol):
    return Task(
        dataset="digits",
        architecture=NET,
        batch=batch or BatchSpec(sizes=SIZES),
        protocol=Protocol(clients=clients, secure_aggregation=clients > 1, precision="float64", **protocol),
        threat_model=threat,
        target=target,
    )


def outcome(attack, of, *, defense="none", trials=TRIALS):
    for entry in (attack, defense):
        if not isinstance(entry, str):
            type(entry).__module__ = "a_notebook_cell"  # without a file it stays in this process, where tests look in
    return evaluate(attack, of, defense, trials=trials, isolation="none")


def run(attack, of, **options):
    rows = outcome(attack, of, **options)
    assert set(rows.status) == {"ok"}, rows.error[0]
    return rows


class Sees(Attack):
    """Keeps what it sees, claims what it is told."""

    recovers = frozenset({"labels"})
    claim = None

    def run(self, observation):
        type(self).observation = observation
        counts = torch.zeros(observation.trials, observation.clients, observation.num_classes, dtype=torch.int64)
        return Recovery(label_counts=counts if self.claim is None else self.claim)


class Plants(Sees):
    """Plants what it is told, round by round."""

    needs = frozenset({"change_parameters"})
    planted: tuple = ()

    def plant(self, model, cohort, history):
        type(self).cohort = cohort
        return self.planted[len(history)](model, cohort)


def seen_by(attack, of, **options):
    run(attack(), of, **options)
    return attack.observation


def truth(of, trials=TRIALS):
    """Each client's gradient (K of name -> (T, *shape)) on the honest model, and the victims."""
    scenes = Scenes(DEVELOPMENT)
    victims = scenes.victims(of, range(trials))
    weights = scenes.weights(of, "one", range(trials))
    data = scenes.dataset(of)
    state = {f"parameter/{n}": v.double() for n, v in weights.parameters.items()}
    model = build_model(NET, data.input_spec.shape, 10, state=state)
    every = []
    for k, size in enumerate(of.client_sizes):
        inputs = to_inputs(victims.inputs[:, k, :size], data.input_spec, of.normalise).double()
        every.append(per_trial_gradients(model, inputs, torch.tensor(victims.labels[:, k, :size])).tensors)
    return every, victims


# --- unequal clients --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), clients=st.integers(1, 5))
def test_every_client_draws_a_batch_of_its_own_size_and_no_example_twice(sizes, clients):
    batch = BatchSpec(sizes=tuple(sizes))
    data = load_dataset("digits")
    victims = draw_victims(data, batch, clients=clients, local_batches=2, trials=[0, 4], key=b"k")
    each = [2 * sizes[k % len(sizes)] for k in range(clients)]
    held = victims.indices >= 0
    assert held.sum(2).tolist() == [each, each]
    assert victims.held.sum() == sum(each)
    assert (victims.labels[held] == data.labels[victims.indices[held]]).all()
    assert set(victims.labels[~held]) <= {-1}
    assert not victims.inputs[~held].any()
    for row, mask in zip(victims.indices, held, strict=True):
        assert len(np.unique(row[mask])) == sum(each)


def test_the_true_counts_of_unequal_clients_score_one_and_their_union_too():
    of = task()
    _, victims = truth(of)
    counts = np.stack([[np.bincount(c[c >= 0], minlength=10) for c in trial] for trial in victims.labels])
    for claim in (counts, counts.sum(1, keepdims=True)):
        rows = run(type("Knows", (Sees,), {"claim": torch.tensor(claim)})(), of)
        assert rows.count_exact_match.tolist() == [1.0] * TRIALS
        assert rows.batch_sizes[0] == "[2, 5, 3]"
        assert rows.batch_size[0] == 5


def test_chance_of_unequal_clients_is_the_mean_over_the_clients():
    of = task(clients=3)
    alone = [Scenes(DEVELOPMENT).chance(task(clients=1, batch=BatchSpec(size=s)), union=False) for s in SIZES]
    mean = Scenes(DEVELOPMENT).chance(of, union=False)
    assert mean["instance_recall"] == pytest.approx(np.mean([level["instance_recall"] for level in alone]))


def test_images_of_unequal_clients_are_scored_without_the_padding():
    class Images(Attack):
        recovers = frozenset({"inputs"})

        def run(self, observation):
            return Recovery(inputs=type(self).claim)

    of = task(target="inputs")
    _, victims = truth(of)
    data = load_dataset("digits")
    flat = victims.inputs.reshape(TRIALS, -1, *data.input_spec.shape)[:, victims.held]
    assert flat.shape[1] == of.total_inputs == 12
    Images.claim = to_inputs(flat, data.input_spec, of.normalise).flip(1)
    assert run(Images(), of).psnr.tolist() == [120.0] * TRIALS


def test_what_a_server_knows_of_the_sizes():
    observation = seen_by(Sees, task(weighting="examples"))
    assert observation.client_sizes.tolist() == [2, 5, 3, 2]
    assert observation.client_weights.tolist() == pytest.approx([1 / 6, 5 / 12, 1 / 4, 1 / 6])
    assert observation.inputs_per_client == 3  # 12 / 4
    withheld = SERVER.model_copy(update={"batch_size": False})

    class Blind(Sees):
        def run(self, observation):
            for read in (lambda: observation.client_sizes, lambda: observation.inputs_per_client):
                with pytest.raises(NotGranted):
                    read()
            return super().run(observation)

    seen_by(Blind, task(threat=withheld))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": (2, 3), "size": 2}, "leave it out, or give the largest"),
        ({"sizes": (2, 3), "size": "3"}, "leave it out, or give the largest"),
        ({"sizes": (4, 2), "sampler": "balanced", "classes": 3}, "at most the batch size, 2"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BatchSpec(**fields)
    with pytest.raises(ValueError, match="fresh or same"):
        task(sends="delta", local_steps=2, batches="epochs", batches_per_epoch=2)
    with pytest.raises(ValueError, match="at most one per client, 2"):
        task(clients=2)


def test_equal_sizes_are_one_size():
    assert BatchSpec(sizes=(3, 3)) == BatchSpec(size=3)


# --- secure aggregation -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), by=st.sampled_from(["equal", "examples"]))
def test_the_streamed_sum_is_the_weighted_mean(sizes, by):
    weights = aggregation_weights(Protocol(weighting=by), sizes)
    updates = torch.randn(len(sizes), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))
    total = StreamedSum(weights)
    for update in updates:
        total.add({"w": update})
    expected = np.average(updates.numpy(), axis=0, weights=sizes if by == "examples" else None)
    np.testing.assert_allclose(total.mean()["w"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_an_adversary_sees_the_weighted_mean_of_the_updates_and_no_tensor_of_one_client(weighting):
    of = task(weighting=weighting)
    observation = seen_by(Sees, of)
    every, _ = truth(of)
    weights = of.client_sizes if weighting == "examples" else [1] * K
    for name, value in observation.update.items():
        mean = sum(w * each[name] for w, each in zip(weights, every, strict=True)) / sum(weights)
        torch.testing.assert_close(value, mean)
    found, todo = {}, [observation.__dict__]
    while todo:  # everything that can be reached from what the attack holds, code and modules aside
        for child in gc.get_referents(todo.pop()):
            kept = isinstance(child, dict | list | tuple | torch.Tensor) or _ours(child)
            if kept and id(child) not in found:
                found[id(child)] = child
                todo.append(child)
    tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
    assert any(value is observation.update["fc.weight"] for value in tensors)
    own = [each[name] for each in every for name in each]
    for value in tensors:
        alike = [each for each in own if value.shape == each.shape]
        assert not any(torch.allclose(value.double(), each, atol=1e-9) for each in alike)


def _ours(value):
    return type(value).__module__.startswith("leakbench") and not isinstance(value, type)


def test_a_cohort_of_one_is_no_aggregation():
    alone = task(clients=1, batch=BatchSpec(size=3))
    secure = alone.model_copy(update={"protocol": Protocol(secure_aggregation=True, precision="float64")})
    one, other = (seen_by(Sees, each).update for each in (alone, secure))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# --- planting ---------------------------------------------------------------------------------------------------------


def planting(*rounds):
    return type("Planting", (Plants,), {"planted": rounds})


def per_client(model, cohort):
    bias = model.parameters["fc.bias"][:1]
    return {"fc.bias": bias + torch.arange(cohort.clients, dtype=bias.dtype)[:, None]}


def one_for_all(model, cohort):
    return {"fc.bias": model.parameters["fc.bias"][:1] + 7}


def test_every_client_gets_its_own_model_and_the_attack_knows_which():
    attack = planting(per_client)
    rows = run(attack(), task(clients=3))
    observation, cohort = attack.observation, attack.cohort
    assert isinstance(cohort, Cohort)
    assert cohort.clients == 3
    assert cohort.client_sizes.tolist() == [2, 5, 3]
    honest = observation.model.parameters["fc.bias"]
    for k in range(3):
        torch.testing.assert_close(observation.client_model(k).parameters["fc.bias"], honest + k)
    assert observation.planted["fc.bias"].shape == (3, 10)
    assert rows.planted_tensors[0] == '["fc.bias"]'
    # A third of the clients got the bias as it was.
    total = sum(value[0].numel() for value in observation.model.parameters.values())
    assert rows.planted_share[0] == pytest.approx(10 * 2 / 3 / total)


def test_one_model_for_all_is_the_model_that_the_attack_sees():
    attack = planting(one_for_all)
    run(attack(), task())
    honest = attack.cohort.model.parameters["fc.bias"]
    torch.testing.assert_close(attack.observation.model.parameters["fc.bias"], honest + 7)


def test_a_client_alone_is_its_own_trial():
    def per_trial(model, cohort):
        return {"fc.bias": torch.eye(10, dtype=torch.float64)[: cohort.trials] * 50}

    attack = planting(per_trial)
    of = task(clients=1, batch=BatchSpec(size=3))
    run(attack(), of)
    update = attack.observation.update["fc.bias"]  # p - n / B with p all but certain of class t
    _, victims = truth(of)
    for t in range(TRIALS):
        counts = (torch.eye(10)[t].double() - update[t]) * 3
        assert counts.round().long().tolist() == np.bincount(victims.labels[t, 0], minlength=10).tolist()


def test_rounds_are_planted_one_by_one_and_kept():
    attack = planting(one_for_all, per_client)
    run(attack(), task(rounds=2))
    assert [len(value["fc.bias"]) for value in attack.observation.plants] == [1, K]
    honest = attack.cohort.model.parameters["fc.bias"]
    torch.testing.assert_close(attack.observation.client_model(2, 0).parameters["fc.bias"], honest + 7)
    torch.testing.assert_close(attack.observation.client_model(2).parameters["fc.bias"], honest + 2)


@pytest.mark.parametrize(
    ("plant", "threat", "message"),
    [
        (per_client, {"per_client": False}, "leading dimension in \\[1\\]"),
        (lambda m, c: {"fc.bias": torch.zeros(2, 10)}, {}, "leading dimension in \\[1, 4\\]"),
        (lambda m, c: {"fc.bias": torch.full((1, 10), math.nan)}, {}, "must be finite"),
        (lambda m, c: {"other": torch.zeros(1, 10)}, {}, "'other' with shape .* is no model parameter"),
        (lambda m, c: {"fc.bias": torch.zeros(1, 11)}, {}, "is no model parameter"),
        (lambda m, c: {"fc.bias": 3}, {}, "must return a dict of tensors"),
    ],
)
def test_a_server_may_only_plant_what_the_threat_model_lets_it(plant, threat, message):
    of = task(threat=SERVER.model_copy(update=threat))
    rows = outcome(planting(plant)(), of)
    assert set(rows.status) == {"invalid"}
    assert rows.error.str.contains(message).all(), rows.error[0]


def test_a_planted_number_without_a_leading_dimension_is_refused():
    with pytest.raises(InvalidOutput, match=r"'gain' with shape \(\) is no model parameter"):
        check_planted({"gain": torch.tensor(1.0)}, {"gain": torch.ones(2)}, {1, 2})


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_the_difference_of_sent_weights_is_that_of_sent_deltas_however_models_differ(weighting):
    found = []
    for sends in ("weights", "delta"):
        attack = planting(per_client)
        run(attack(), task(sends=sends, weighting=weighting))
        found.append(attack.observation.difference(attack.observation.update))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def test_what_is_isolated_is_one_client_with_its_own_model():
    attack = planting(per_client)
    run(attack(), task(weighting="examples"))
    observation = attack.observation
    alone = observation.isolated(observation.update, 1)
    assert (alone.clients, alone.inputs_per_client, alone.batch_size) == (1, 5, 5)
    torch.testing.assert_close(alone.model.parameters["fc.bias"], observation.client_model(1).parameters["fc.bias"])
    assert alone.client_weights.tolist() == [1.0]
    assert not torch.equal(alone.randn(2), observation.isolated(observation.update, 2).randn(2))


def test_digests_are_equal_where_parameters_are():
    model = build_model(NET, (1, 8, 8), 10, seeds=[0])
    bias = torch.zeros(3, 10)
    assert len(set(Planted(model, {"fc.bias": bias}, 3).digests)) == 1
    bias[1, 0] = 1e-30
    assert [
        d == Planted(model, {"fc.bias": bias}, 3).digests[0] for d in Planted(model, {"fc.bias": bias}, 3).digests
    ] == [
        True,
        False,
        True,
    ]
    assert Planted(model, {}, 2).digests[0] == Planted(model, {}, 2).digests[1]


def test_a_model_that_one_client_got_is_noticed_whichever_client_it_was():
    def one_zeroed(k):
        def plant(model, cohort):
            weight = model.parameters["fc.weight"][:1]
            planted = weight.repeat(cohort.clients, 1, 1)
            planted[k] = 0
            return {"fc.weight": planted, "fc.bias": model.parameters["fc.bias"][:1]}

        return planting(plant)

    for k in range(9):
        rows = run(one_zeroed(k)(), task(clients=9, batch=BatchSpec(size=3)))
        assert rows.detected.tolist() == [1.0] * TRIALS, k
        assert rows.model_disagreement.tolist() == [1 / 8] * TRIALS


def test_a_client_whose_net_cannot_run_loses_its_stealth_and_no_row():
    net = Architecture(name="mlp", params={"width": 4, "depth": 1, "batch_norm": True})
    of = task(clients=2, batch=BatchSpec(size=1), batch_norm="train").model_copy(update={"architecture": net})
    rows = outcome(planting(one_for_all)(), of)
    assert len(rows) == TRIALS


def test_nothing_planted_is_no_stealth():
    rows = run(planting(lambda model, cohort: {})(), task())
    assert rows.planted_share.isna().all()
    assert rows.detected.isna().all()


@pytest.mark.parametrize("isolation", ["process"])
def test_a_child_may_send_a_model_larger_than_what_it_recovers(isolation):
    of = task(clients=1, batch=BatchSpec(size=2), target="inputs")
    of = of.model_copy(update={"architecture": Architecture(name="mlp", params={"width": 20_000, "depth": 1})})
    rows = evaluate("curious_abandon_honesty", of, trials=1, isolation=isolation)
    assert rows.status.tolist() == ["ok"], rows.error[0]


@pytest.mark.parametrize("weighting", ["equal", "examples"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_head_gradient_of_unequal_clients_is_in_units_of_one_example(weighting, reduction):
    # With a head of zeros and features that do not matter, the bias gradient is 1 / C minus the label frequencies.
    def flat(model, cohort):
        return {name: torch.zeros_like(model.parameters[name][:1]) for name in ("fc.weight", "fc.bias")}

    attack = planting(flat)
    of = task(weighting=weighting, reduction=reduction)
    run(attack(), of)
    _, victims = truth(of)
    counts = np.stack([[np.bincount(c[c >= 0], minlength=10) for c in trial] for trial in victims.labels])
    sizes = np.array(of.client_sizes)
    weights = sizes / sizes.sum() if weighting == "examples" else np.full(K, 1 / K)
    each = counts if reduction == "sum" else counts / sizes[:, None]
    scale = (weights * sizes).sum() if reduction == "sum" else 1
    share = sizes if reduction == "sum" else np.ones(K)
    expected = (weights * share).sum() / scale / 10 - np.einsum("k,tkc->tc", weights, each) / scale
    np.testing.assert_allclose(attack.observation.mean_head_bias, expected, atol=1e-12)


# --- clients that refuse ----------------------------------------------------------------------------------------------


class Second(Defense):
    """The second client of trial 1 refuses."""

    def accept(self, ctx):
        type(self).contexts = [*getattr(type(self), "contexts", []), ctx]
        refuses = (torch.arange(len(ctx.inputs)) == 1) & (ctx.client == 1)
        return ~refuses


def test_a_client_that_refuses_sends_zeros_and_the_row_says_so():
    of = task()
    rows = run(Sees(), of, defense=Second())
    every, _ = truth(of)
    every[1] = {name: value.clone().index_fill_(0, torch.tensor([1]), 0) for name, value in every[1].items()}
    for name, value in Sees.observation.update.items():
        torch.testing.assert_close(value, sum(each[name] for each in every) / K)
    assert rows.refused.tolist() == [0.0, 1 / K, 0.0]


def test_a_client_sees_the_model_before_and_what_the_others_got():
    attack = planting(one_for_all, per_client)
    Second.contexts = []
    run(attack(), task(rounds=2), defense=Second())
    first, second = Second.contexts[2], Second.contexts[K + 2]
    honest = attack.cohort.model.parameters["fc.bias"]
    torch.testing.assert_close(first.previous.parameters["fc.bias"], honest)
    torch.testing.assert_close(first.model.parameters["fc.bias"], honest + 7)
    torch.testing.assert_close(second.previous.parameters["fc.bias"], honest + 7)
    assert len(set(first.digests)) == 1
    assert len(set(second.digests)) == K
    assert first.inputs.shape[:2] == (TRIALS, 3)
    assert first.labels.shape == (TRIALS, 3)


class OnceInRound0(Second):
    """The second client of trial 1 refuses the first model, and would take the next."""

    def accept(self, ctx):
        return super().accept(ctx) | (ctx.round > 0)


@pytest.mark.parametrize("sends", ["gradient", "weights"])
def test_who_refused_stays_out_and_sends_nothing_new(sends):
    attack = planting(per_client, one_for_all)
    of = task(rounds=2, sends=sends)
    rows = run(attack(), of, defense=OnceInRound0())
    assert rows.refused.tolist() == [0.0, 1 / K, 0.0]
    observation = attack.observation
    for index, update in enumerate(observation.updates):
        alone = observation.difference(update, round_index=index)["fc.weight"]
        models = [observation.client_model(k, index) for k in range(K)]
        _, victims = truth(of)
        data = load_dataset("digits")
        expected = torch.zeros_like(alone)
        for k, (model, size) in enumerate(zip(models, of.client_sizes, strict=True)):
            inputs = to_inputs(victims.inputs[:, k, :size], data.input_spec, of.normalise).double()
            own = per_trial_gradients(model, inputs, torch.tensor(victims.labels[:, k, :size])).tensors["fc.weight"]
            if k == 1:
                own = own.index_fill(0, torch.tensor([1]), 0)
            expected += own * (1 if sends == "gradient" else of.protocol.lr) / K
        torch.testing.assert_close(alone, expected)


def test_an_answer_that_is_no_mask_is_the_defenses_failure():
    class Wrong(Defense):
        def accept(self, ctx):
            return torch.ones(2)

    rows = outcome(Sees(), task(), defense=Wrong())
    assert set(rows.status) == {"invalid"}
    assert "accept must return" in rows.error[0]


# --- inserted modules -------------------------------------------------------------------------------------------------


class Imprints(Plants):
    inserts = "imprint_linear"
    needs = frozenset({"change_parameters", "change_architecture"})

    def __init__(self, *, bins: int = 6) -> None:
        self.bins = bins

    planted = (lambda model, cohort: {"imprint.out": torch.ones(1, 6)},)


def test_an_inserted_module_is_there_with_the_attacks_parameters_and_the_honest_net_is_unchanged():
    of = task()
    rows = run(Imprints(), of)
    update = Imprints.observation.update
    assert update["imprint.weight"].shape == (TRIALS, 6, 64)
    assert rows.inserted[0] == "imprint_linear"
    assert rows.checkpoint_sha256[0] == run(Sees(), of).checkpoint_sha256[0]
    every, _ = truth(of)
    for name in every[0]:  # the module was planted, but its rows are not active
        torch.testing.assert_close(update[name], sum(each[name] for each in every) / K)


def test_without_the_grant_nothing_is_inserted():
    threat = SERVER.model_copy(update={"change_architecture": False})
    rows = outcome(Imprints(), task(threat=threat))
    assert set(rows.status) == {"not_applicable"}
    assert "change_architecture" in rows.error[0]


def test_a_module_that_does_not_exist_is_one_line():
    wrong = type("Wrong", (Imprints,), {"inserts": "imprint_linaer"})
    with pytest.raises(UserError, match="Did you mean 'imprint_linear'"):
        outcome(wrong(), task())
    undeclared = type("Undeclared", (Imprints,), {"needs": frozenset({"change_parameters"})})
    with pytest.raises(UserError, match="'change_architecture' in needs"):
        outcome(undeclared(), task())


def test_an_attack_of_both_targets_is_asked_for_one():
    of = task(clients=2, batch=BatchSpec(size=2), rounds=2)
    rows = evaluate("gradient_suppression", of, trials=2, isolation="none")
    assert rows.status.tolist() == ["ok", "ok"], rows.error[0]
    assert rows.attributed.all()
    refused = evaluate("gradient_suppression", of, "consistency_check", trials=2, isolation="none")
    guess = evaluate("prior_labels", of, trials=2, isolation="none")
    assert refused.instance_recall.tolist() == guess.instance_recall.tolist()  # an update of zeros tells nothing

"""Attacks made of the inversion engine: each finds images where it should, and its own part does what it says."""

from __future__ import annotations

import math

import pytest
import torch
from leakbench_baselines.attacks.breaching_modern import BreachingModern
from leakbench_baselines.attacks.deep_image_prior import DeepImagePrior
from leakbench_baselines.attacks.fedavg_dimitrov import (
    FedAvgDimitrov,
    GradientSum,
    SameMeans,
    copies_needed,
    merge_copies,
)
from leakbench_baselines.attacks.gradinversion import GradInversion
from leakbench_baselines.attacks.gradvit import GradViT, PatchBorders
from leakbench_baselines.attacks.sme import SME
from sklearn.datasets import load_digits
from torch.func import functional_call

from leakbench import Knowledge, NotApplicable, Observation, UserError
from leakbench.facts import Facts
from leakbench.federation.client import Client, batch_order
from leakbench.federation.statistics import batch_statistics
from leakbench.inversion import BatchNormStatistics, Cosine, Inversion, OneStep, Prior, Rows, Surrogate
from leakbench.inversion.networks import ConvolutionalPrior
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, InputSpec, Protocol, ThreatModel

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
MLP = Architecture(name="mlp", params={"width": 48, "depth": 1})
BATCH_NORM = Architecture(name="resnet20", params={"width": 4})
VIT = Architecture(
    name="timm/vit_tiny_patch16_224",
    params={"img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 2},
)
EPOCHS = {"sends": "delta", "local_steps": 6, "batches": "epochs", "batches_per_epoch": 2, "lr": 0.05}

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(architecture=MLP, *, trials=3, batch=2, granted=None, shuffled=False, exact=False, **protocol):
    """Return an observation of digits, the private inputs (T, N, ...) and the order of the client's batches."""
    protocol = Protocol(precision="float64", **protocol)
    data = load_digits()
    images = (torch.tensor(data.images, dtype=torch.float64)[:, None] / 16 - 0.3) / 0.4
    generator = torch.Generator().manual_seed(3)
    count = batch * protocol.local_batches
    picks = torch.randint(0, 1500, (trials, count), generator=generator)
    inputs, labels = images[picks], torch.tensor(data.target)[picks]
    model = build_model(architecture, SPEC.shape, 10, seeds=[4]).to(dtype=torch.float64)
    order = batch_order(protocol, batch).expand(trials, -1, -1)
    if shuffled:
        epochs = order.numel() // trials // count
        order = torch.stack([torch.randperm(count, generator=generator) for _ in range(trials * epochs)])
        order = order.view(trials, protocol.local_steps, batch)
    random = TrialRandom(torch.arange(trials * 32).reshape(trials, 32).to(torch.uint8))
    facts = Facts(
        granted=ThreatModel(labels=True, auxiliary=100).granted() if granted is None else granted,
        protocol=protocol,
        input_spec=SPEC,
        normalised=True,
        num_classes=10,
        batch_size=batch,
        inputs_per_client=count,
    )
    update = Client(protocol, batch).update(model, inputs, labels, random=random, order=order)
    statistics = batch_statistics(model, inputs) if exact else {}
    knowledge = {"facts": facts, "random": random, "model": model, "auxiliary": (images[-100:], labels[-100:])}
    return Observation(Seen([update], labels=labels[:, None], statistics=statistics), **knowledge), inputs, order


def rows_of(observation, target=None):
    return Rows(observation, 1, observation.model, observation.update if target is None else target, observation.labels)


def error(found, truth):
    """Least mean squared error of each private input to any candidate, (T,)."""
    return torch.cdist(truth.flatten(2), found.to(truth).flatten(2)).square().amin(2).mean(1) / truth[0, 0].numel()


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (BreachingModern(steps=150, tv=1e-3), {}),
        (DeepImagePrior(steps=250, lr=1e-2, width=8), {}),
        (GradInversion(steps=200, groups=2), {}),
        (SME(steps=150, lr=0.3), EPOCHS),
        (SME(steps=150, lr=0.3), {**EPOCHS, "sends": "weights"}),
        (FedAvgDimitrov(steps=80), {**EPOCHS, "shuffled": True}),
        (FedAvgDimitrov(steps=80), {**EPOCHS, "sends": "weights"}),
    ],
    ids=lambda value: getattr(value, "name", "-".join(map(str, value)) if isinstance(value, dict) else None),
)
def test_finds_images_nearer_than_the_mean(attack, options):
    observation, truth, _ = seen(**options)
    attack.prepare(observation)
    found = attack.run(observation).inputs
    mean = observation.auxiliary[0].mean(0).expand_as(truth)
    assert found.shape == truth.shape
    assert error(found, truth).mean() < 0.8 * error(mean, truth).mean()


# --- SME ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_a_surrogate_lies_between_the_weights_before_and_after(sends):
    observation, inputs, _ = seen(**{**EPOCHS, "sends": sends})
    rows, labels = rows_of(observation), observation.labels
    before = OneStep().gradients(rows, inputs, labels, {})
    start = observation.model.parameters
    end = {n: v if sends == "weights" else start[n] - v for n, v in observation.update.items()}
    after = observation.gradients(inputs, labels, model=observation.model.with_state(parameters=end))
    for alpha, expected in ((0.0, before), (1.0, after)):
        found = Surrogate().gradients(rows, inputs, labels, {"alpha": torch.full((3,), alpha, dtype=torch.float64)})
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_alpha_moves_within_its_range():
    observation, _, _ = seen(**EPOCHS)
    alpha = SME(steps=30, alpha_lr=0.3).run(observation).notes["alpha"]
    assert (alpha != 0.5).all()
    assert ((alpha >= 0) & (alpha <= 1)).all()


def test_a_single_gradient_has_no_surrogate():
    with pytest.raises(NotApplicable):
        SME().prepare(seen()[0])
    with pytest.raises(UserError):
        SME(alpha=2)


# --- Dimitrov et al. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_copies_in_the_clients_own_order_give_its_update(sends):
    observation, inputs, order = seen(**{**EPOCHS, "sends": sends}, shuffled=True)
    source = GradientSum(epochs=3)
    rows = rows_of(observation, source.target(observation, "gradient"))
    flat = order.flatten(1)
    copies = inputs.gather(1, flat[..., None, None, None].expand(-1, -1, *SPEC.shape))
    # The client's labels go along; an attacker who lacks the order tiles them.
    own = torch.nn.functional.one_hot(observation.labels.gather(1, flat), 10).to(torch.float64)
    found = observation.simulate(copies, own, order=torch.arange(12).view(1, 6, 2).expand(3, -1, -1), defended=False)
    for name, goal in rows.target.items():
        moved = observation.model.parameters[name] - found[name] if sends == "weights" else found[name]
        torch.testing.assert_close(moved / 0.05, goal)


def test_tiled_copies_are_the_client_that_never_shuffles():
    observation, inputs, _ = seen(**EPOCHS)
    source = GradientSum(epochs=3)
    rows = rows_of(observation, source.target(observation, "gradient"))
    found = source.gradients(rows, inputs.repeat(1, 3, 1, 1, 1), observation.labels, {})
    for name, goal in rows.target.items():
        torch.testing.assert_close(found[name], goal)
        torch.testing.assert_close(goal, observation.update[name] / 0.05)


def test_the_tie_is_a_mean_over_pairs_of_epochs_and_knows_no_order():
    x = torch.randn(2, 12, 1, 3, 3, dtype=torch.float64)
    means = x.view(2, 3, 4, 9).mean(2)
    pairs = [(means[:, a] - means[:, b]).square().mean(1) for a in range(3) for b in range(3)]
    tie = SameMeans(epochs=3, weight=7.0)
    torch.testing.assert_close(tie(x, None), 7 * torch.stack(pairs).mean(0))
    shuffled = torch.cat([x[:, :4], x[:, torch.randperm(4)], x[:, torch.randperm(4)]], 1)
    assert tie(shuffled, None).abs().max() < 1e-25


def test_the_tie_is_felt():
    observation, _, _ = seen(**EPOCHS, shuffled=True)
    apart = []
    for tie in (0.0, 1000.0):
        attack = FedAvgDimitrov(steps=30, tie=tie)
        found = {}
        merge = "leakbench_baselines.attacks.fedavg_dimitrov.merge_copies"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge, lambda x, e, found=found: found.setdefault("copies", x)[:, : x.shape[1] // e])
            attack.run(observation)
        apart.append(SameMeans(epochs=3, weight=1.0)(found["copies"], None).mean())
    assert apart[1] < 0.1 * apart[0]


@pytest.mark.parametrize("name", ["tv", "tie"])
def test_dimitrovs_weights_are_checked_when_the_attack_is_made(name):
    with pytest.raises(UserError, match="expected a finite number of at least 0, got -1"):
        FedAvgDimitrov(**{name: -1.0})


def test_copies_are_matched_before_they_are_averaged():
    truth = torch.randn(3, 5, 1, 4, 4)
    noise = 0.01 * torch.randn(3, 4, 5, 1, 4, 4)
    copies = torch.stack([torch.stack([x[torch.randperm(5)] for x in truth]) for _ in range(4)], 1) + noise
    copies[:, 0] = truth
    assert (merge_copies(copies.flatten(1, 2), 4) - truth).abs().max() < 0.04


def test_copies_are_made_only_where_an_unknown_order_matters():
    granted = ThreatModel().granted()
    assert copies_needed(seen(**EPOCHS)[0]) == 3
    assert copies_needed(seen(**EPOCHS, granted=granted | {"batch_order"})[0]) == 1
    assert copies_needed(seen(**{**EPOCHS, "batches": "same"})[0]) == 1
    assert copies_needed(seen(sends="delta", local_steps=4)[0]) == 1
    assert copies_needed(seen()[0]) == 1


# --- deep image prior ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 18), (2, 3, 5)])
def test_networks_draw_valid_images_each_from_its_own_weights(shape):
    low, high = torch.tensor(-0.5), torch.tensor(2.0)
    space = ConvolutionalPrior(shape=shape, low=low, high=high, width=3)
    observation, _, _ = seen()
    leaves = {name: 20 * value.double() for name, value in space.start(observation, 2, 4).items()}
    drawn = space.inputs(leaves)
    assert drawn.shape == (6, 4, *shape)
    assert drawn.min() >= low
    assert drawn.max() <= high
    network, noise = space._network, space._noise.double()
    for row, n in ((0, 0), (5, 3)):
        alone = functional_call(network, {name: value[row, n] for name, value in leaves.items()}, (noise,))[0]
        torch.testing.assert_close(drawn[row, n], low + (high - low) * alone)
    assert (drawn[0, 0] - drawn[0, 1]).abs().max() > 0.1
    assert space._network is network  # made once, not in every evaluation
    assert space._noise is space._noise


def test_starts_do_not_depend_on_the_other_trials():
    space = ConvolutionalPrior(shape=SPEC.shape, low=torch.tensor(0.0), high=torch.tensor(1.0), width=3)
    observation, _, _ = seen()
    whole, part = space.start(seen()[0], 2, 2), space.start(observation.block(1, 2), 2, 2)
    assert all(torch.equal(value[2:4], part[name]) for name, value in whole.items())


# --- GradInversion ------------------------------------------------------------------------------------------------


def test_the_batch_norm_prior_vanishes_at_the_truth_with_its_exact_statistics():
    observation, inputs, _ = seen(BATCH_NORM, exact=True, batch=16)
    prior, rows = BatchNormStatistics(weight=1.0, first=10.0), rows_of(observation)
    at_truth, elsewhere = prior(inputs, rows), prior(torch.randn_like(inputs), rows)
    assert (at_truth < 0.1 * elsewhere).all()


def test_batch_norm_statistics_are_used_where_there_are_any():
    def priors(**options):
        return {type(p).__name__ for p in GradInversion().fitted(seen(**options)[0]).priors}

    assert "BatchNormStatistics" not in priors()
    assert "BatchNormStatistics" in priors(architecture=BATCH_NORM)
    withheld = ThreatModel(bn_statistics="none").granted()
    assert "BatchNormStatistics" not in priors(architecture=BATCH_NORM, granted=withheld)


def test_groups_that_are_drawn_together_end_nearer_to_each_other():
    observation, _, _ = seen()
    spread = []
    for group in (0.0, 10.0):
        attack = GradInversion(steps=60, groups=3, group=group)
        ends = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("leakbench.inversion.engine._Search._chosen", _keeping(ends))
            attack.run(observation)
        spread.append(ends[0].view(3, 3, -1).std(1).mean())
    assert spread[1] < 0.5 * spread[0]


def _keeping(ends):
    from leakbench.inversion.engine import _Search

    original = _Search._chosen

    def chosen(self, steps):
        ends.append(self.leaves["inputs"].detach().clone())
        return original(self, steps)

    return chosen


# --- GradViT ------------------------------------------------------------------------------------------------------


def test_patch_borders_see_steps_between_patches_only():
    prior = PatchBorders(weight=2.0, size=(4, 4))
    x = torch.zeros(1, 2, 3, 8, 8, dtype=torch.float64)
    assert prior(x, None).item() < 1e-4
    x[0, 0, :, 2:4, 1:3] = 5  # inside one patch, touching its lower border
    x[0, 1, 0, :, 4:] = 1  # one step of 8 pixels between two columns of patches
    lines = math.sqrt(3 * 2 * 25) + math.sqrt(8)
    assert prior(x, None).item() == pytest.approx(2 * lines / 2, abs=1e-4)
    assert prior(torch.ones(1, 1, 1, 4, 4), None).item() == 0


def test_a_transformers_gradients_are_matched():
    observation, _, _ = seen(VIT, trials=2, batch=1)
    # An untrained transformer hardly minds which patch is where, so that its gradients match long before its images.
    trace = GradViT(steps=100).run(observation).visible_loss_trace
    assert (trace[:, -1] < 0.1 * trace[:, 0]).all()


class _Counted(Prior):
    def __init__(self):
        self.calls = 0

    def __call__(self, inputs, rows):
        self.calls += 1
        return inputs.flatten(1).square().mean(1)


@pytest.mark.parametrize(("late", "calls"), [(0.0, 11), (0.5, 6), (0.99, 2)])
def test_late_priors_count_from_their_share_of_the_steps_on(late, calls):
    prior = _Counted()
    inversion = Inversion(objective=Cosine(), steps=10, priors=(prior,), late=late)
    inversion.run(seen()[0])
    assert prior.calls == calls


def test_the_best_iterate_is_sought_among_those_the_priors_judged():
    class Heavy(_Counted):
        def __call__(self, inputs, rows):
            return 1e3 + 100 * super().__call__(inputs, rows)

    observation, _, _ = seen()
    # By distance alone any iterate without the penalty would win.
    free = Inversion(objective=Cosine(), steps=40).run(observation).inputs
    drawn = Inversion(objective=Cosine(), steps=40, priors=(Heavy(),), late=0.5).run(observation).inputs
    assert drawn.square().mean() < 0.5 * free.square().mean()


def test_nets_without_position_embedding_are_declined():
    with pytest.raises(NotApplicable, match="pos_embed"):
        GradViT().prepare(Knowledge(**_knowledge(seen()[0])))


def _knowledge(observation):
    return {"facts": observation._facts, "random": observation._random, "model": observation._model}


# --- all ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, -1e30])
@pytest.mark.parametrize("attack", [BreachingModern(steps=3), DeepImagePrior(steps=3, width=4), GradInversion(steps=3)])
def test_degenerate_gradients_give_valid_images(attack, fill):
    _degenerate(attack, fill, seen()[0])


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, -1e30])
@pytest.mark.parametrize("attack", [SME(steps=3), FedAvgDimitrov(steps=3)])
def test_degenerate_updates_give_valid_images(attack, fill):
    _degenerate(attack, fill, seen(**EPOCHS)[0])


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, -1e30])
def test_degenerate_transformer_gradients_give_valid_images(fill):
    _degenerate(GradViT(steps=3), fill, seen(VIT, batch=1)[0])


def _degenerate(attack, fill, observation):
    nothing = {name: torch.full_like(value, fill) for name, value in observation.update.items()}
    observation._seen = Seen([nothing], labels=observation._seen.labels)
    recovery = attack.run(observation)
    low, high = observation.bounds
    assert recovery.inputs.isfinite().all()
    assert ((recovery.inputs >= low - 1e-6) & (recovery.inputs <= high + 1e-6)).all()
    assert recovery.visible_loss.isfinite().all()

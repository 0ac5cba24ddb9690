"""Truths about defenses that follow from arithmetic alone, and where each of them is tested.

| oracle | what | where |
|---|---|---|
| T1 | a dense first layer's quotient is exact whatever comes after it | test_analytic, test_precode |
| T2 | row sums of the head give a label away | test_label_laws, test_no_last_bias, here smoothed |
| T3 | clipping bounds the norm and no cosine notices it | test_clip_l2, here the attack's own distance |
| T4 | mean and variance of noise | test_baselines, test_laplace_noise |
| T5 | sensitivity and noise of DP-SGD, which is SGD without both | test_dp_sgd, contract/test_defenses (mechanism) |
| T6 | what top-k keeps and owes | test_baselines, test_topk |
| T7 | random-k is unbiased with the factor only | test_random_k |
| T8 | QSGD's grid, mean and variance | test_qsgd |
| T9 | signs are -1, 0, 1 | test_sign |
| T10 | Soteria's columns | test_soteria |
| T11 | PRECODE is random before and after its bottleneck | test_precode |
| T12 | mixing weights, signs of InstaHide | test_mixup, test_instahide |
| T13 | OASIS is a larger batch | test_lane_defenses |
| T14 | a secure sum shows the weighted mean and no more | test_cohorts |
| T15 | a perturbed learning rate is a positive factor | test_learning_rate_perturbation, here the attack |
| T16 | Outpost, GradDefense, CENSOR change what they should | test_outpost, test_graddefense, test_censor |
| T17 | noise and sparsity of weights | test_weight_defenses, here the extremes |
| T18 | withheld layers are known to be withheld | test_withhold_layers, here the likelihood |
| T19 | smoothed labels sum to one | test_label_smoothing |
| T20 | strength zero is no defense, more strength more distortion | contract/test_defenses, here the attack |

Further down: what the likelihoods of the defenses have to obey.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from inversion_blocks import observe
from label_blocks import digits_block
from leakbench_baselines.attacks.bayes_adaptive import BayesAdaptive
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.attacks.learned_labels import LearnedLabels, draw_examples, ridge
from leakbench_baselines.attacks.llg import LLG
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dp_sgd import DPSGD
from leakbench_baselines.defenses.fp16 import FP16
from leakbench_baselines.defenses.gaussian_noise import GaussianNoise
from leakbench_baselines.defenses.graddefense import GradDefense
from leakbench_baselines.defenses.int8 import Int8
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from leakbench_baselines.defenses.learning_rate_perturbation import LearningRatePerturbation
from leakbench_baselines.defenses.mixup import Mixup
from leakbench_baselines.defenses.outpost import Outpost
from leakbench_baselines.defenses.random_k import RandomK
from leakbench_baselines.defenses.sign import Sign
from leakbench_baselines.defenses.soteria import Soteria
from leakbench_baselines.defenses.topk import TopK
from leakbench_baselines.defenses.weight_noise import WeightNoise
from leakbench_baselines.defenses.weight_sparsify import WeightSparsify
from leakbench_baselines.defenses.withhold_layers import WithholdLayers
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score

from leakbench import Knowledge
from leakbench.chain import DefenseChain
from leakbench.defense import DefenseContext
from leakbench.federation.client import Client, ClientState
from leakbench.inversion import Defended, OneStep
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, Protocol

pytestmark = pytest.mark.usefixtures("one_thread")
TRIALS = 3


def streams(trials, first=0):
    return TrialRandom(torch.arange(first, first + trials * 32).remainder(251).reshape(trials, 32).to(torch.uint8))


def sent_by(block, defense):
    """Return what the clients of a block of digits send under a defense."""
    client = Client(block.protocol, block.batch, DefenseChain([defense]))
    return client.update(block.model, block.inputs, block.labels, random=streams(len(block.labels)))


def moment(model=None, *, sends="gradient", lr=0.1, received=None):
    """Return the moment of a client's update."""
    nothing = torch.zeros(TRIALS, 1)
    return DefenseContext(
        model=model,
        inputs=nothing,
        labels=nothing,
        loss=None,
        round=0,
        client=0,
        local_step=0,
        lr=lr,
        random=streams(TRIALS),
        sends=sends,
        received=received,
    )


def updates(seed=0, scale=1.0):
    """Return an update of two tensors, heavy-tailed as gradients are."""
    stream = torch.Generator().manual_seed(seed)
    shapes = {"weight": (TRIALS, 8, 25), "bias": (TRIALS, 8)}
    return {n: scale * torch.randn(s, generator=stream, dtype=torch.float64) ** 3 for n, s in shapes.items()}


def same(recovery, other):
    return torch.equal(recovery.inputs, other.inputs)


# --- the oracles that are stated nowhere else -------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3])
def test_t2_the_least_row_sum_is_the_label_smoothed_or_not(alpha):
    block = digits_block(1, trials=40)
    update = sent_by(block, LabelSmoothing(alpha=alpha))
    assert (update[f"{block.model.head}.weight"].sum(2).argmin(1) == block.labels[:, 0]).all()


@pytest.mark.parametrize("defense", [ClipL2(bound=0.01), LearningRatePerturbation(width=0.9)], ids=["T3", "T15"])
def test_t3_t15_a_cosine_does_not_notice_a_positive_factor(defense):
    plain = InvertingGradients(steps=8).run(observe(trials=TRIALS)[0])
    defended = InvertingGradients(steps=8).run(observe(trials=TRIALS, defense=defense)[0])
    torch.testing.assert_close(defended.inputs, plain.inputs, rtol=0, atol=1e-9)
    torch.testing.assert_close(defended.visible_loss, plain.visible_loss, rtol=0, atol=1e-12)


def test_t17_without_strength_nothing_happens_and_at_the_greatest_only_the_largest_weight_stays():
    model = observe(trials=TRIALS)[0].model
    update = {n: v.expand(TRIALS, *v.shape[1:]).contiguous() for n, v in model.parameters.items()}
    ctx = moment(model, sends="weights")
    for defense in (WeightNoise(scale=0.0), WeightSparsify(p=0.0)):
        sent = DefenseChain([defense]).tensors("update", update, ctx)
        assert all(torch.equal(sent[n], v) for n, v in update.items())
    sent = WeightSparsify(p=1 - 1e-12).update(update, moment(model, sends="weights"))
    for name, value in sent.items():
        flat = value.flatten(1)
        assert ((flat != 0).sum(1) == 1).all()
        assert torch.equal(flat.abs().amax(1), update[name].abs().flatten(1).amax(1))


@pytest.mark.parametrize(
    "defense", [GaussianNoise(std=0.0), TopK(p=0.0), LabelSmoothing(alpha=0.0), WithholdLayers(first=0), Mixup()]
)
def test_t20_an_attack_that_knows_a_defense_of_strength_zero_does_what_it_does_without(defense):
    # Mixup has no pair to mix in a batch of one.
    plain = observe(trials=2, known=True)[0]
    known = observe(trials=2, known=True, defense=defense)[0]
    torch.testing.assert_close(
        BayesAdaptive(steps=8).run(known).inputs, InvertingGradients(steps=8).run(plain).inputs, rtol=0, atol=1e-6
    )


# --- what likelihoods obey --------------------------------------------------------------------------------------------


def test_what_was_clipped_fits_every_candidate_of_its_direction_beyond_the_bound():
    clean, defense = updates(), ClipL2(bound=0.5)
    sent = defense.update(clean, moment())
    longer, shorter = ({n: f * v for n, v in clean.items()} for f in (7.0, 1e-3))
    for candidate in (clean, longer):
        torch.testing.assert_close(
            defense.log_likelihood(sent, candidate, moment()), torch.zeros(TRIALS).double(), rtol=0, atol=1e-9
        )
    assert (defense.log_likelihood(sent, shorter, moment()) < -1).all()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_top_k_asks_nothing_of_small_coordinates_and_that_others_stay_below_the_least_kept(scope):
    clean, defense = updates(), TopK(p=0.8, scope=scope)
    sent = defense.update(clean, moment())
    hidden = {n: torch.where(sent[n] == 0, -0.5 * v, v) for n, v in clean.items()}
    loud = {n: torch.where(sent[n] == 0, 50.0, v) for n, v in clean.items()}
    best = torch.zeros(TRIALS, dtype=torch.float64)
    for candidate in (clean, hidden):
        torch.testing.assert_close(defense.log_likelihood(sent, candidate, moment()), best, rtol=0, atol=1e-9)
    assert (defense.log_likelihood(sent, loud, moment()) < -10).all()
    turned = {n: -v for n, v in clean.items()}
    assert (defense.log_likelihood(sent, turned, moment()) < -100).all()


def test_random_k_asks_nothing_of_what_was_not_sent_whatever_its_size():
    clean, defense = updates(), RandomK(p=0.5, rescale=True)
    sent = defense.update(clean, moment())
    other = {n: torch.where(sent[n] == 0, 99.0, v) for n, v in clean.items()}
    for candidate in (clean, other):
        score = defense.log_likelihood(sent, candidate, moment())
        torch.testing.assert_close(score, torch.zeros_like(score), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scaled", [False, True])
def test_signs_ask_for_signs_whatever_the_size(scaled):
    clean, defense = updates(), Sign(scaled=scaled)
    sent = defense.update(clean, moment())
    score = defense.log_likelihood(sent, clean, moment())
    smaller = defense.log_likelihood(sent, {n: 1e-6 * v for n, v in clean.items()}, moment())
    torch.testing.assert_close(score, smaller)
    turned = defense.log_likelihood(sent, {n: -v for n, v in clean.items()}, moment())
    assert (turned < score - 100).all()
    # The mean of log-sigmoids, written out for one coordinate of size one.
    one = Sign().log_likelihood({"w": torch.ones(1, 1)}, {"w": torch.ones(1, 1)}, moment())
    assert one.item() == pytest.approx(-math.log1p(math.exp(-10)), rel=1e-4)


def test_weight_noise_is_torchs_density_on_the_weights_that_were_sent():
    model = observe(trials=TRIALS)[0].model
    clean = {n: torch.randn_like(v.expand(TRIALS, *v.shape[1:])) for n, v in model.parameters.items()}
    for distribution, law in (("gaussian", torch.distributions.Normal), ("laplace", torch.distributions.Laplace)):
        defense, ctx = WeightNoise(scale=1e-2, distribution=distribution, threshold=1e9), moment(model)
        sent = DefenseChain([defense]).tensors("update", clean, ctx)
        # Below the threshold the noise has its plain scale, in units of weights; a gradient's are 1 / lr of these.
        expected = sum(
            law(clean[n], torch.tensor(1e-2 / 0.1).double()).log_prob(v).flatten(1).sum(1) for n, v in sent.items()
        )
        torch.testing.assert_close(defense.log_likelihood(sent, clean, ctx), expected)


@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_weights_that_became_zero_say_nothing(sends):
    observation = observe(trials=TRIALS)[0]
    model = observation.model
    step = {n: 0.01 * torch.randn_like(v.expand(TRIALS, *v.shape[1:])) for n, v in model.parameters.items()}
    after = {n: model.parameters[n] - 0.1 * v for n, v in step.items()}
    clean = {"gradient": step, "delta": {n: 0.1 * v for n, v in step.items()}, "weights": after}[sends]
    trained = model.with_state(parameters=after)
    ctx = moment(model if sends == "gradient" else trained, sends=sends, received=model)
    defense = WeightSparsify(p=0.5)
    sent = defense.update(clean, ctx)
    score = defense.log_likelihood(sent, clean, ctx)
    torch.testing.assert_close(score, torch.zeros_like(score), rtol=0, atol=1e-6)
    gone = {n: v == 0 for n, v in WeightSparsify(p=0.5).update(after, moment(trained, sends="weights")).items()}
    moved = {n: torch.where(gone[n], v + 3.0, v) for n, v in clean.items()}
    torch.testing.assert_close(defense.log_likelihood(sent, moved, ctx), score, rtol=0, atol=1e-6)
    assert (defense.log_likelihood(sent, {n: v.roll(1, 0) for n, v in clean.items()}, ctx) < -100).all()


def test_t18_withheld_tensors_say_nothing():
    model = observe(trials=TRIALS)[0].model
    clean = {n: torch.randn_like(v.expand(TRIALS, *v.shape[1:])) for n, v in model.parameters.items()}
    defense, ctx = WithholdLayers(first=1, last=1), moment(model)
    withheld = defense.withholds(model)
    sent = defense.update(clean, ctx)
    other = {n: v + 5 if n in withheld else v for n, v in clean.items()}
    assert 0 < len(withheld) < len(clean)
    score = defense.log_likelihood(sent, other, ctx)
    torch.testing.assert_close(score, torch.zeros_like(score), rtol=0, atol=1e-9)


def test_a_chain_is_scored_by_its_last_part_after_what_came_before():
    clean, ctx = updates(), moment(observe(trials=TRIALS)[0].model)
    chain = DefenseChain([Sign(), GaussianNoise(std=0.5)])
    sent = chain.tensors("update", clean, ctx)
    leaf = {n: v.clone().requires_grad_() for n, v in clean.items()}
    found = chain.log_likelihood(sent, leaf, ctx)
    expected = GaussianNoise(std=0.5).log_likelihood(sent, {n: v.sign() for n, v in clean.items()}, ctx)
    torch.testing.assert_close(found.detach(), expected)
    # Signs are constant, so that the slope is taken straight through them.
    (slope,) = torch.autograd.grad(found.sum(), leaf["weight"])
    assert (slope != 0).all()


# --- the attacks that use them ----------------------------------------------------------------------------------------


def test_without_grant_or_simulation_it_is_inverting_gradients():
    defense = TopK(p=0.9)
    unknown = observe(trials=2, defense=defense)[0]
    assert same(BayesAdaptive(steps=8).run(unknown), InvertingGradients(steps=8).run(unknown))
    steps = {"sends": "delta", "local_steps": 2, "batches": "same"}
    blind = observe(trials=2, defense=defense, known=True, withheld=("lr",), **steps)[0]
    assert isinstance(BayesAdaptive().fitted(blind).source, OneStep)
    assert same(BayesAdaptive(steps=4).run(blind), InvertingGradients(steps=4).run(blind))


def test_draws_are_averaged_and_paid_for():
    observation, _, _ = observe(trials=2, batch=2, defense=Mixup(), known=True, budget=12)
    attack = BayesAdaptive(steps=100, samples=3)
    assert attack.fitted(observation).source == Defended(samples=3, scaled=True)
    recovery = attack.run(observation)
    # Three steps and a last look, of three draws each.
    assert recovery.model_evaluations == observation.evaluations == 12
    assert recovery.inputs.shape[1] == 2
    deterministic = observe(trials=2, defense=TopK(), known=True)[0]
    assert attack.fitted(deterministic).source == Defended(samples=1, scaled=True)


@pytest.mark.parametrize("sends", ["delta", "weights"])
@pytest.mark.parametrize(
    "defense",
    [
        WeightNoise(scale=1e-6),
        WeightSparsify(p=0.3),
        LearningRatePerturbation(),
        GaussianNoise(std=1e-6),
        DPSGD(noise_multiplier=1e-6),
    ],
    ids=lambda defense: type(defense).__name__,
)
def test_local_steps_are_simulated_and_the_private_input_scores_best(defense, sends):
    observation, true, _ = observe(
        trials=2, batch=1, known=True, defense=defense, sends=sends, local_steps=2, batches="same"
    )
    assert isinstance(BayesAdaptive().fitted(observation).source, Defended)
    before = observation.evaluations
    own = observation.log_likelihood([observation.update], true, observation.labels)
    other = observation.log_likelihood([observation.update], 1 - true, observation.labels)
    assert observation.evaluations - before == 4
    assert (own > other).all()
    recovery = BayesAdaptive(steps=2).run(observation)
    assert recovery.model_evaluations == 6
    assert recovery.inputs.isfinite().all()


@pytest.mark.parametrize(
    "behind", [ClipL2(bound=1e6), ClipL2(bound=1e-3), GaussianNoise(std=1e-9), GaussianNoise(std=1e-300), FP16()]
)
@pytest.mark.parametrize(
    "defense",
    [Soteria(p=60.0), GradDefense(), Outpost(beta=0.0), DPSGD(noise_multiplier=0.001), TopK(p=0.9), Sign()],
    ids=lambda defense: defense.name,
)
def test_what_changes_no_direction_cannot_switch_a_likelihood_off(defense, behind):
    observation, true, _ = observe(trials=2, defense=(defense, behind), known=True)
    candidates = (true, 1 - true, true.flip(-1))
    scores = [observation.log_likelihood([observation.update], x, observation.labels, scaled=True) for x in candidates]
    assert (torch.stack(scores).argmax(0) == 0).all()
    leaf = (1 - true).requires_grad_()
    score = observation.log_likelihood([observation.update], leaf, observation.labels, scaled=True)
    (slope,) = torch.autograd.grad(score.sum(), leaf)
    assert slope.isfinite().all()
    assert slope.any()


def test_every_round_is_scored_with_what_earlier_ones_left():
    model = build_model(Architecture(name="lenet_zhu", init="uniform(0.5)"), (1, 8, 8), 10, seeds=[0]).to(
        dtype=torch.float64
    )
    images, labels = torch.rand(2, 1, 1, 8, 8, dtype=torch.float64), torch.tensor([[3], [7]])
    client = Client(Protocol(precision="float64"), 1, DefenseChain([TopK(p=0.9, error_feedback=True)]))
    state, known, scores = ClientState(), ClientState(), []
    for index in range(3):
        sent = client.update(model, images, labels, random=streams(2), state=state, round_index=index)
        told = {"random": streams(2), "round_index": index}
        scores.append(client.log_likelihood(sent, model, images, labels, state=known, **told))
        forgetful = client.log_likelihood(sent, model, images, labels, **told)
    torch.testing.assert_close(torch.stack(scores), torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (forgetful < -1e-3).all()


def test_rows_do_not_depend_on_how_trials_are_cut():
    observation = observe(trials=3, batch=2, defense=Mixup(), known=True)[0]
    inversion = BayesAdaptive(steps=5, restarts=2).fitted(observation)
    whole = inversion.run(observation)
    cut = replace(inversion, chunk=2).run(observe(trials=3, batch=2, defense=Mixup(), known=True)[0])
    torch.testing.assert_close(cut.inputs, whole.inputs)


@pytest.mark.parametrize(("defense", "gain"), [(Sign(), 2.0), (TopK(p=0.9), 2.0)], ids=["sign", "topk"])
def test_knowing_the_defense_beats_the_cosine(defense, gain):
    observation, true, _ = observe(trials=3, defense=defense, known=True, dtype=torch.float32)
    error = [
        (attack.run(observation).inputs - true).square().mean()
        for attack in (BayesAdaptive(steps=80), InvertingGradients(steps=80))
    ]
    assert error[0] * gain < error[1]


def test_ridge_is_scikit_learns_at_the_penalty_it_chooses():
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(2, 60, 30, generator=stream, dtype=torch.float64)
    targets = features @ torch.randn(2, 30, 4, generator=stream, dtype=torch.float64)
    targets = targets + 3 * torch.randn(2, 60, 4, generator=stream, dtype=torch.float64)
    features, targets = features - features.mean(1, keepdim=True), targets - targets.mean(1, keepdim=True)
    found, error = ridge(features, targets)
    for m in range(2):
        fits = {a: Ridge(alpha=a, fit_intercept=False).fit(features[m], targets[m]) for a in (0.01, 1, 10, 100, 1000)}
        near = {a: abs(torch.tensor(fit.coef_.T) - found[m]).max().item() for a, fit in fits.items()}
        assert min(near.values()) < 1e-8
        best = min(near, key=near.get)
        scores = cross_val_score(
            Ridge(alpha=best, fit_intercept=False), features[m], targets[m], cv=60, scoring="neg_mean_squared_error"
        )
        # The leverage of the mean, which centering took, is on top.
        assert error[m].item() == pytest.approx(-scores.mean(), rel=0.15)
        assert 1 <= best < 1000, "noise needs a penalty, and signal not the greatest"


def test_simulated_labels_have_the_prior_as_their_mean_and_many_laws():
    block = digits_block(8, auxiliary=200)
    knowledge = Knowledge(**{**block.knowledge, "random": streams(1)})
    _, labels = knowledge.auxiliary
    picks = draw_examples(knowledge, labels, 600, 8)[0]
    counts = torch.nn.functional.one_hot(labels[picks], 10).sum(1).double()
    prior = knowledge.class_prior if knowledge.grants("label_prior") else labels.bincount(minlength=10) / len(labels)
    assert (counts.mean(0) / 8 - prior).abs().max() < 0.05
    assert (counts.amax(1) == 8).any()
    assert (counts.amax(1) <= 2).any()


@pytest.mark.parametrize("defense", [Sign(), LabelSmoothing(alpha=0.3)], ids=["sign", "smoothing"])
def test_learned_labels_see_through_what_hides_from_counting(defense):
    block = digits_block(8, trials=16, models=1, auxiliary=400)
    block.knowledge["defense"] = DefenseChain([defense])
    block.knowledge["facts"] = _granting(block.knowledge["facts"], "defense")
    update = sent_by(block, defense)
    found = block.run(LearnedLabels(simulations=1200), update)
    plain = block.run(LLG(), update)
    hits = [torch.minimum(counts, block.counts).sum(1).double().mean().item() / 8 for counts in (found, plain)]
    assert hits[0] > hits[1]
    assert hits[0] > 0.7


def _granting(facts, name):
    return replace(facts, granted=facts.granted | {name})


@pytest.mark.parametrize("defense", [FP16(), FP16(form="bfloat16"), Int8()], ids=["float16", "bfloat16", "int8"])
def test_rounding_is_undone_within_its_step(defense):
    clean = updates()
    sent = defense.update(clean, moment())
    score = defense.log_likelihood(sent, clean, moment())
    off = {n: 1.2 * v for n, v in clean.items()}
    assert (score > defense.log_likelihood(sent, off, moment())).all()
    (slope,) = torch.autograd.grad(
        defense.log_likelihood(sent, {n: v.requires_grad_() for n, v in off.items()}, moment()).sum(), off["weight"]
    )
    assert slope.isfinite().all()

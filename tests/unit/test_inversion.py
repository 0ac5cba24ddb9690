"""The laws of the inversion engine: rows are independent, choices are visible ones, parts equal plain references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.dlg import DLG
from leakbench_baselines.attacks.dlm_plus import DLMPlus
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from torch.nn import functional as F  # noqa: N812

from leakbench import NotApplicable, NotGranted, UserError
from leakbench.inversion import (
    LBFGS,
    Adam,
    Cosine,
    Inversion,
    Pixels,
    Rows,
    SquaredL2,
    Surrogate,
    TotalVariation,
    Unrolled,
)
from leakbench.inversion.engine import default_chunk
from leakbench.inversion.labels import labels_of_counts
from leakbench.tasks import Architecture

pytestmark = pytest.mark.usefixtures("one_thread")
MLP = Architecture(name="mlp", params={"width": 12, "depth": 1})


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_models", [True, False])
@pytest.mark.parametrize("optimiser", [Adam(sign="hard"), LBFGS(inner=3)])
def test_a_trial_does_not_depend_on_the_chunk(own_models, optimiser):
    observation, _, _ = observe(trials=5, labels=False, own_models=own_models)

    def run(chunk):
        parts = {"objective": Cosine(), "optimiser": optimiser, "steps": 6, "restarts": 2, "labels": "joint"}
        return Inversion(**parts, noise=0.01, priors=(TotalVariation(weight=1e-3),), chunk=chunk).run(observation)

    whole, cut = run(5), run(2)
    torch.testing.assert_close(whole.inputs, cut.inputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.visible_loss_trace, cut.visible_loss_trace, rtol=1e-9, atol=1e-9)
    assert torch.equal(whole.label_counts, cut.label_counts)


def test_a_chunk_that_runs_out_of_memory_is_halved_and_recorded(monkeypatch):
    observation, _, _ = observe(trials=5)
    inversion = Inversion(objective=Cosine(), steps=2, chunk=5)
    sizes, before = [], Pixels.start

    def start(self, seen, restarts, count):
        sizes.append(seen.trials)
        if seen.trials > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return before(self, seen, restarts, count)

    expected = inversion.run(observation)
    monkeypatch.setattr(Pixels, "start", start)
    recovery = inversion.run(observation)
    assert sizes == [5, 3, 2, 2, 1]
    assert recovery.notes["chunk"] == 2
    torch.testing.assert_close(recovery.inputs, expected.inputs)


def test_an_error_that_is_not_about_memory_is_not_swallowed(monkeypatch):
    observation, _, _ = observe(trials=2)
    monkeypatch.setattr(Pixels, "start", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        Inversion(objective=Cosine(), steps=2).run(observation)


def test_the_chunk_is_chosen_by_shapes_alone():
    few, many = (observe(trials=n)[0] for n in (1, 6))
    assert default_chunk(few, 1) == default_chunk(many, 1)
    assert default_chunk(many, 4) == default_chunk(many, 1) // 4


def test_the_restart_with_the_least_visible_distance_is_claimed():
    observation, _, _ = observe(trials=4)
    alone = [Inversion(objective=Cosine(), steps=15, restarts=1).run(observation)]
    several = Inversion(objective=Cosine(), steps=15, restarts=6).run(observation)
    assert (several.visible_loss <= alone[0].visible_loss + 1e-12).all()
    assert (several.visible_loss < alone[0].visible_loss).any()


def test_the_claim_has_the_visible_loss_that_is_reported():
    observation, _, labels = observe(trials=3)
    recovery = Inversion(objective=Cosine(), steps=9, optimiser=Adam(lr=0.3)).run(observation)
    found = observation.gradients(recovery.inputs, labels, create_graph=False)
    g, goal = (torch.cat([t[n].flatten(1) for n in found], 1) for t in (found, observation.update))
    torch.testing.assert_close(recovery.visible_loss, 1 - F.cosine_similarity(g, goal))


def test_the_trace_never_rises_and_ends_at_the_visible_loss():
    observation, _, _ = observe(trials=3)
    recovery = Inversion(objective=Cosine(), steps=230).run(observation)
    assert recovery.visible_loss_trace.shape[1] == 200
    assert (recovery.visible_loss_trace.diff(dim=1) <= 0).all()
    assert torch.equal(recovery.visible_loss_trace[:, -1], recovery.visible_loss)


def test_rows_that_are_good_enough_rest_without_moving_the_others():
    observation, _, _ = observe(trials=4)
    parts = {"objective": SquaredL2(), "optimiser": LBFGS(), "space": Pixels(box=False), "steps": 12}
    never, early = (Inversion(**parts, stop=stop).run(observation) for stop in (None, 1e-3))
    assert (early.visible_loss < 1e-3).any()
    unfinished = early.visible_loss >= 1e-3
    torch.testing.assert_close(never.inputs[unfinished], early.inputs[unfinished], rtol=1e-6, atol=1e-6)
    assert (never.visible_loss <= early.visible_loss).all()


def test_progress_tells_steps_rate_and_objective():
    reports = []
    observation, _, _ = observe(trials=4, reports=reports)
    Inversion(objective=Cosine(), steps=7, chunk=2).run(observation)
    assert reports[-1]["done"] == reports[-1]["total"] == 7
    assert [r["done"] for r in reports] == sorted(r["done"] for r in reports)
    assert all(r["rate"] > 0 and 0 <= r["loss"] <= 2 for r in reports)


@pytest.mark.parametrize(("budget", "steps"), [(1, 0), (41, 2), (60, 2), (61, 3), (10_000, 9)])
def test_the_budget_counts_every_evaluation(budget, steps):
    observation, _, _ = observe(trials=2, budget=budget)
    recovery = Inversion(objective=SquaredL2(), optimiser=LBFGS(), steps=9).run(observation)
    assert recovery.model_evaluations == 20 * steps + 1


# --- optimisers -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), inner=st.integers(2, 20), steps=st.integers(1, 4))
def test_lbfgs_rows_are_torchs_lbfgs(seed, inner, steps):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    b, start = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))

    def value(x, row):
        return (a[row] @ x - b[row]).square().sum() + (x.square().sum() + 1).log()

    leaf = start.clone().requires_grad_()
    step = LBFGS(inner=inner).start({"x": leaf}, steps)

    def evaluate():
        values = torch.stack([value(leaf[row], row) for row in range(3)])
        return values.detach(), {"x": torch.autograd.grad(values.sum(), leaf)[0]}

    for _ in range(steps):
        step(evaluate)
    for row in range(3):
        x = start[row].clone().requires_grad_()
        plain = torch.optim.LBFGS([x], max_iter=inner, max_eval=10 * inner)

        def closure(x=x, row=row, plain=plain):
            plain.zero_grad()
            loss = value(x, row)
            loss.backward()
            return loss

        for _ in range(steps):
            plain.step(closure)
        torch.testing.assert_close(leaf[row], x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("history", [3, 100])
def test_an_lbfgs_row_does_not_depend_on_one_that_rests_or_fails(history):
    target = torch.linspace(-1, 2, 6, dtype=torch.float64)

    def run(starts, scales, steps=25):
        leaf = torch.stack(starts).clone().requires_grad_()
        scale = torch.tensor(scales, dtype=torch.float64)[:, None]
        step = LBFGS(inner=4, history=history).start({"x": leaf}, steps)

        def evaluate():
            away = leaf - target
            values = (scale * (away.square() + away.pow(4) * torch.arange(1, 7))).sum(1)
            return values.detach(), {"x": torch.autograd.grad(values.sum(), leaf)[0]}

        for _ in range(steps):
            step(evaluate)
        return leaf.detach()

    start, scales = torch.full((6,), 3.0, dtype=torch.float64), [1.0, 1e-4, 1e-9, 1e-5]
    together = run([start] * 4, scales)  # the third rests from the start, the others begin to rest at different steps
    for row, scale in enumerate(scales):
        torch.testing.assert_close(together[row], run([start], [scale])[0], rtol=0, atol=1e-12)


def test_schedules_fall_as_their_papers_say():
    steps = [Adam(schedule="steps").factor(i, 800) for i in range(800)]
    assert [round(f, 6) for f in (steps[298], steps[299], steps[500], steps[799])] == [1, 0.1, 0.01, 0.001]
    cosine = [Adam(schedule="cosine", warmup=50).factor(i, 450) for i in range(450)]
    assert cosine[0] == pytest.approx(1 / 50)
    assert cosine[49] == cosine[50] == 1
    assert cosine[250] == pytest.approx(0.5)
    assert cosine[-1] < 1e-3


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_surrogate_at_zero_is_the_gradient_at_the_weights_sent_out():
    observation, _, _ = observe(trials=2, sends="delta", local_steps=3, batches="same")
    parts = {"objective": Cosine(), "steps": 4, "optimiser": Adam(lr=0.1, rates={"alpha": 0.0})}
    plain = Inversion(**parts).run(observation)
    surrogate = Inversion(**parts, source=Surrogate(alpha=0.0)).run(observation)
    torch.testing.assert_close(plain.inputs, surrogate.inputs, rtol=1e-6, atol=1e-7)
    assert (surrogate.notes["alpha"] == 0).all()


def test_unrolled_steps_match_the_true_inputs_exactly_where_one_step_does_not():
    observation, true, labels = observe(trials=2, net=MLP, sends="delta", local_steps=4, batches="same", lr=0.5)
    target = Unrolled().target(observation, "direction")
    rows = Rows(observation, 1, observation.model, target, labels)
    for source, exact in ((Unrolled(), True), (Inversion(objective=Cosine(), steps=1).source, False)):
        compared = source.compare(rows, true, labels, {}, elementwise=True)
        assert bool((Cosine()(compared, {}) < 1e-12).all()) == exact


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_true_inputs_of_small_steps_on_several_batches_match_the_target_in_scale(reduction):
    # Steps so small that the weights hardly move: the update is that of all inputs in one batch.
    observation, true, labels = observe(
        trials=2,
        batch=2,
        sends="delta",
        local_steps=6,
        batches="epochs",
        batches_per_epoch=3,
        lr=1e-7,
        reduction=reduction,
    )
    source = Inversion(objective=SquaredL2(), steps=1).source
    rows = Rows(observation, 1, observation.model, source.target(observation, "gradient"), labels)
    compared = source.compare(rows, true, labels, {}, elementwise=True)
    assert (SquaredL2()(compared, {}) < 1e-6 * compared.goal.sum(1)).all()


def test_unrolling_beats_one_step_after_many_large_local_steps():
    observation, true, _ = observe(trials=3, net=MLP, sends="delta", local_steps=8, batches="same", lr=1.0)
    unrolled, plain = (
        psnr(InvertingGradients(steps=80, unroll=unroll).run(observation).inputs, true) for unroll in (True, False)
    )
    assert unrolled.mean() > plain.mean() + 3


def test_what_a_source_needs_is_asked_before_an_update_is_seen():
    withheld, _, _ = observe(sends="delta", local_steps=2, batches="same", withheld=("lr",))
    gradient, _, _ = observe()
    with pytest.raises(NotGranted):
        Inversion(objective=Cosine(), steps=1, source=Unrolled()).prepare(withheld)
    with pytest.raises(NotGranted):
        Inversion(objective=SquaredL2(), steps=1).prepare(withheld)
    Inversion(objective=Cosine(), steps=1, source=Unrolled(lr=0.1)).prepare(withheld)
    with pytest.raises(NotApplicable):
        Inversion(objective=Cosine(), steps=1, source=Surrogate()).prepare(gradient)


# --- labels -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    total=st.integers(1, 9),
)
def test_labels_of_counts_are_total_many_and_keep_what_fits(counts, total):
    counts = torch.tensor(counts)
    labels = labels_of_counts(counts, total)
    assert labels.shape == (len(counts), total)
    found = F.one_hot(labels, 3).sum(1)
    for row, kept in zip(counts, found, strict=True):
        if row.sum() == total:
            assert torch.equal(row, kept)
        elif row.sum() > total:
            assert (kept <= row).all()
        elif row.sum() > 0:
            assert (kept >= row).all()
            assert (kept[row == 0] == 0).all()


@pytest.mark.parametrize("name", ["llg", "idlg", "bias_count", "gradinversion_labels"])
def test_any_label_attack_can_come_first(name):
    hidden, _, labels = observe(trials=3, labels=False)
    known, _, _ = observe(trials=3)
    parts = {"objective": Cosine(), "steps": 3}
    recovery = Inversion(**parts, labels=name).run(hidden)
    assert torch.equal(recovery.label_counts[:, 0], F.one_hot(labels, 10).sum(1))
    torch.testing.assert_close(recovery.inputs, Inversion(**parts).run(known).inputs)


def test_a_label_attack_prepares_and_declines_like_any_other():
    observation, _, _ = observe(trials=2, labels=False)
    with pytest.raises(NotGranted, match="auxiliary"):
        Inversion(objective=Cosine(), steps=1, labels="llg_plus").prepare(observation)
    with pytest.raises(UserError, match="Did you mean"):
        Inversion(objective=Cosine(), steps=1, labels="lgl").prepare(observation)
    with pytest.raises(UserError, match="recovers labels"):
        Inversion(objective=Cosine(), steps=1, labels="mean_image").prepare(observation)


# --- known truths -----------------------------------------------------------------------------------------------------


def test_dlg_recovers_digits_with_their_labels():
    observation, true, labels = observe(trials=16, own_models=True, labels=False, dtype=torch.float32)
    recovery = DLG(steps=12, restarts=4).run(observation)
    assert (psnr(recovery.inputs, true) > 30).sum() >= 12
    assert torch.equal(recovery.label_counts[:, 0], F.one_hot(labels, 10).sum(1))


@pytest.mark.parametrize("attack", [DLG(steps=2), InvertingGradients(steps=20), DLMPlus(steps=2)])
def test_an_update_that_carries_nothing_gives_no_more_than_noise(attack):
    observation, true, _ = observe(trials=3, scale=0.0)
    recovery = attack.run(observation)
    assert recovery.inputs.isfinite().all()
    assert recovery.visible_loss.isfinite().all()
    assert (psnr(recovery.inputs, true) < 14).all()

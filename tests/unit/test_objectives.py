"""Objectives of the inversion engine against their formulas, and DLM's trivial minimum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.dlm import DLM
from leakbench_baselines.attacks.dlm_plus import DLMPlus
from torch.nn import functional as F  # noqa: N812

from leakbench.inversion import Comparison, Cosine, JointScale, MeanNorm, SquaredL2

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs_of(*tensors):
    """Return a comparison of tensors (g, G)."""
    squared = torch.stack([goal.flatten(1).square().sum(1) for _, goal in tensors], 1)
    return Comparison(squared, tuple((g.flatten(1), goal.flatten(1)) for g, goal in tensors))


def random_pairs(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 5), (4,), (2, 3, 2))
    return [
        tuple(torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for _ in range(2)) for shape in shapes
    ]


# --- objectives -------------------------------------------------------------------------------------------------------


def test_objectives_are_their_formulas():
    tensors = random_pairs()
    compared = pairs_of(*tensors)
    k = torch.tensor([2.0, 0.5, 100.0], dtype=torch.float64)
    for row in range(3):
        g, goal = ([pair[i][row].flatten() for pair in tensors] for i in (0, 1))
        flat, flat_goal = torch.cat(g), torch.cat(goal)
        mean, mean_goal = (sum(v.norm() for v in values) / len(values) for values in (g, goal))
        each = list(zip(g, goal, strict=True))
        expected = {
            SquaredL2(): (flat - flat_goal).square().sum(),
            SquaredL2(root=True, scale=0.5): 0.5 * sum((a - b).norm() for a, b in each),
            SquaredL2(weights=range): sum(i * (a - b).square().sum() for i, (a, b) in enumerate(each)),
            Cosine(): 1 - F.cosine_similarity(flat, flat_goal, dim=0),
            Cosine(per_tensor=True): sum(1 - F.cosine_similarity(a, b, dim=0) for a, b in each) / 3,
            JointScale(): (flat - k[row] * flat_goal).square().sum(),
            MeanNorm(): (flat / mean - flat_goal / mean_goal).square().sum(),
        }
        for objective, value in expected.items():
            torch.testing.assert_close(objective(compared, {"k": k})[row], value)
    torch.testing.assert_close(JointScale(log=True)(compared, {"log_k": k.log()}), JointScale()(compared, {"k": k}))


@settings(deadline=None)
@given(factor=st.floats(1e-12, 1e12))
def test_dlm_plus_does_not_see_the_scale_of_the_update(factor):
    tensors = random_pairs()
    scaled = pairs_of(*[(g, factor * goal) for g, goal in tensors])
    torch.testing.assert_close(MeanNorm()(scaled, {}), MeanNorm()(pairs_of(*tensors), {}))


@pytest.mark.parametrize("factor", [1e-9, 3.7, 1e6])
def test_dlm_plus_recovers_the_same_from_an_update_of_any_scale(factor):
    same, other = (observe(trials=2, sends="delta", withheld=("lr",), scale=scale)[0] for scale in (1.0, factor))
    attack = DLMPlus(steps=3, labels="llg")
    torch.testing.assert_close(attack.run(same).inputs, attack.run(other).inputs, rtol=1e-4, atol=1e-5)


# --- DLM's trivial minimum --------------------------------------------------------------------------------------------


def test_dlms_distance_vanishes_for_any_input_at_scale_zero():
    observation, _, _ = observe(trials=2, sends="delta", labels=False)
    anything = observation.rand(1, 1, 8, 8).double()
    soft = observation.forward(anything)[0].softmax(-1)
    g = observation.gradients(anything, soft, create_graph=False)
    compared = pairs_of(*[(g[n], observation.update[n]) for n in g])
    zero = torch.zeros(2, dtype=torch.float64)
    assert (JointScale()(compared, {"k": zero}) < 1e-20).all()
    assert (JointScale().judge(compared, {"k": zero}) > 1e-3).all(), "the judge that chooses must not be fooled"


def test_dlm_finds_one_over_the_learning_rate():
    observation, true, _ = observe(trials=3, sends="delta", lr=0.05, withheld=("lr",))
    recovery = DLM(scale=15.0, log_scale=True, steps=40, restarts=3, labels="idlg").run(observation)
    good = psnr(recovery.inputs, true) > 30
    assert good.sum() >= 2
    torch.testing.assert_close(
        recovery.notes["log_k"][good].exp(), torch.full((int(good.sum()),), 20.0).double(), rtol=0.02, atol=0
    )

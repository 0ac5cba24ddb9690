"""Random-k sparsification: what is kept, how often, and what it does to the update."""

from __future__ import annotations

import math

import pytest
import torch
from leakbench_baselines.defenses.random_k import RandomK
from leakbench_baselines.defenses.topk import TopK
from scipy import stats
from torch.nn import functional as F  # noqa: N812
from update_blocks import context, flat, updates

from leakbench import UserError


@pytest.mark.parametrize("p", [0.1, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rescale", [False, True])
def test_exactly_the_declared_share_is_kept_unchanged_or_rescaled(scope, p, rescale):
    clean = updates(4)
    sent = RandomK(p=p, scope=scope, rescale=rescale).update(clean, context(4))
    groups = [(clean[n].flatten(1), sent[n].flatten(1)) for n in clean]
    for before, after in groups if scope == "layer" else [(flat(clean), flat(sent))]:
        size = before.shape[1]
        count = math.ceil(round((1 - p) * size, 6))
        assert ((after != 0).sum(1) == count).all()
        factor = size / count if rescale else 1
        torch.testing.assert_close(after, torch.where(after != 0, factor * before, 0))


@pytest.mark.parametrize("rescale", [False, True])
def test_rescaled_it_is_unbiased_and_every_coordinate_is_as_likely(rescale):
    trials, ones = 4000, {"a": torch.ones(4000, 5, 4)}
    sent = RandomK(p=0.7, rescale=rescale).update(ones, context(trials))["a"].flatten(1)
    share, factor = 6 / 20, 20 / 6 if rescale else 1
    error = factor * (share * (1 - share) / trials) ** 0.5
    assert (sent.mean(0) - factor * share).abs().max() < 5 * error


def test_what_is_kept_at_a_greater_p_is_kept_at_a_smaller_one():
    clean = updates(4)
    kept = [flat(RandomK(p=p).update(clean, context(4))) != 0 for p in (0.1, 0.5, 0.9)]
    assert (kept[1] <= kept[0]).all()
    assert (kept[2] <= kept[1]).all()


def test_it_keeps_less_of_the_direction_than_the_greatest_coordinates():
    clean = updates(8)
    whole = flat(clean)
    random, greatest = (
        F.cosine_similarity(flat(d.update(clean, context(8))), whole).mean().item()
        for d in (RandomK(p=0.9), TopK(p=0.9))
    )
    # The cosine is the root of the squared norm's share. Random: that of the coordinates. Greatest, of normal ones: the
    # second moment beyond the quantile z at which a tenth is left, which is 2 z phi(z) + 0.1.
    z = stats.norm.isf(0.05)
    assert random == pytest.approx(0.1**0.5, abs=0.02)
    assert greatest == pytest.approx((2 * z * stats.norm.pdf(z) + 0.1) ** 0.5, abs=0.02)


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"rescale": True}])
def test_nothing_dropped_changes_nothing(options):
    clean = updates(2)
    sent = RandomK(p=0.0, **options).update(clean, context(2))
    assert all(torch.equal(sent[n], v) for n, v in clean.items())


@pytest.mark.parametrize("wrong", [{"p": 1.0}, {"p": -0.1}, {"scope": "net"}])
def test_what_is_no_fraction_or_scope_is_refused(wrong):
    with pytest.raises(UserError, match=r"random_k: .* expected .* write"):
        RandomK(**wrong)

"""Factors of priors are checked where the attack is made, which is before anything runs."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from leakbench_baselines.attacks.breaching_modern import BreachingModern
from leakbench_baselines.attacks.cocktail_party import CocktailParty
from leakbench_baselines.attacks.gradinversion import GradInversion
from leakbench_baselines.attacks.gradvit import GradViT
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients

from leakbench.cli import cli
from leakbench.errors import UserError
from leakbench.inversion import BatchNormStatistics

REFUSED = [
    (InvertingGradients, "tv", "TotalVariation"),
    (GradInversion, "batch_norm", "BatchNormStatistics"),
    (GradInversion, "l2", "L2Norm"),
    (GradInversion, "group", "GroupConsistency"),
    (BreachingModern, "features", "FeatureMatch"),
    (GradViT, "borders", "borders"),
    (CocktailParty, "negentropy", "negentropy"),
]


@pytest.mark.parametrize(("attack", "name", "named"), REFUSED)
def test_a_negative_weight_is_refused_in_one_line(attack, name, named):
    with pytest.raises(UserError, match=r"expected .*at least 0, got .*-1") as caught:
        attack(**{name: -1.0})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    attack(**{name: 0.0})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1e-9])
def test_every_factor_of_a_prior_is_a_finite_number(weight):
    for factors in ({"weight": weight}, {"weight": 1.0, "first": weight}):
        with pytest.raises(UserError, match="expected a finite number of at least 0"):
            BatchNormStatistics(**factors)


def test_planning_refuses_a_negative_weight_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKBENCH_CACHE", str(tmp_path / "cache"))
    wanted = r"attack inverting_gradients\(tv=-2.0\): weight of TotalVariation: expected .*at least 0, got -2.0$"
    arguments = ["run", "quick", "--attack", "inverting_gradients(tv=-2)", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=wanted):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()

"""DLM's two defenses of the transmitted weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.dlm_plus import DLMPlus
from leakbench_baselines.defenses.weight_noise import WeightNoise
from leakbench_baselines.defenses.weight_sparsify import WeightSparsify
from scipy import stats

from leakbench import UserError
from leakbench.tasks import Architecture

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = Architecture(name="mlp", params={"width": 200, "depth": 1})


def weights_seen(sends, **options):
    """Return the weights after local training, (T, *shape) by name, that the update stands for."""
    observation, _, _ = observe(sends=sends, lr=0.05, **options)
    start, unit = observation.model.parameters, 0.05 if sends == "gradient" else 1.0
    if sends == "weights":
        return dict(observation.update)
    return {name: start[name] - unit * value for name, value in observation.update.items()}


@pytest.mark.parametrize("defense", [WeightNoise(scale=0.01), WeightSparsify(p=0.3)])
def test_it_is_the_weights_that_are_defended_however_they_are_sent(defense):
    seen = [weights_seen(sends, defense=defense) for sends in ("weights", "delta", "gradient")]
    for other in seen[1:]:
        for name, value in seen[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("distribution", "law"), [("gaussian", stats.norm), ("laplace", stats.laplace)])
def test_noise_has_its_distribution_times_the_excess_of_the_norm(distribution, law):
    clean = weights_seen("weights", net=WIDE)
    noisy = weights_seen("weights", net=WIDE, defense=WeightNoise(scale=0.01, distribution=distribution))
    for name in ("body.linear0.weight", "fc.bias"):
        for before, noised in zip(clean[name].numpy(), noisy[name].numpy(), strict=True):
            norms = np.linalg.norm(before, axis=1) if before.ndim == 2 else np.linalg.norm(before)
            excess = max(1.0, np.max(norms) / 0.2)
            noise = ((noised - before) / excess / 0.01).ravel()
            if noise.size > 1000:
                assert stats.kstest(noise, law.cdf).pvalue > 1e-3
            assert np.abs(noise).mean() < 4


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
def test_sparse_weights_are_those_above_numpys_quantile(p):
    clean, sparse = weights_seen("weights"), weights_seen("weights", defense=WeightSparsify(p=p))
    for name, value in clean.items():
        for before, after in zip(value.numpy(), sparse[name].numpy(), strict=True):
            least = np.quantile(np.abs(before), p)
            np.testing.assert_array_equal(after, np.where(np.abs(before) < least, 0, before))


@pytest.mark.parametrize("cls", [WeightNoise, WeightSparsify])
def test_defended_both_ways_an_adversary_sees_another_model_than_the_client_trained_on(cls):
    plain, _, _ = observe(sends="weights", defense=cls())
    both, _, _ = observe(sends="weights", defense=cls(both_ways=True))
    name = "fc.weight"
    assert torch.equal(plain.update[name], both.update[name]), "the client trains on the true weights"
    assert plain.model.draws == 1
    assert both.model.draws == plain.trials
    assert not torch.equal(both.model.parameters[name], plain.model.parameters[name].expand(3, -1, -1))


def test_noise_on_the_weights_stops_dlm_plus():
    attack = DLMPlus(steps=10, labels="idlg")
    options = {"trials": 4, "sends": "weights", "withheld": ("lr",)}
    plain, true, _ = observe(**options)
    noisy, _, _ = observe(**options, defense=WeightNoise(scale=0.1))
    assert psnr(attack.run(plain).inputs, true).median() > 30
    assert (psnr(attack.run(noisy).inputs, true) < 15).all()


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [(WeightNoise, {"scale": -1.0}), (WeightNoise, {"distribution": "cauchy"}), (WeightSparsify, {"p": 1.0})],
)
def test_impossible_parameters_are_refused(cls, wrong):
    with pytest.raises(UserError, match="expected"):
        cls(**wrong)

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from leakbench.errors import InvalidOutput
from leakbench.metrics import METRICS, headline
from leakbench.metrics.images import PSNR_CAP, match, mse, psnr, score_images, ssim


def pair(shape, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(shape, generator=generator)
    return (true + noise * torch.randn(shape, generator=generator)).clamp(0, 1), true


def per_image(metric, recovered, true):
    return [[metric(a.double().numpy(), b.double().numpy()) for a, b in zip(*ab, strict=True)] for ab in
            zip(recovered, true, strict=True)]  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 2, 3, 32, 32), (2, 2, 1, 28, 28), (2, 1, 3, 11, 15)])
def test_values_agree_with_scikit_image(shape):
    recovered, true = pair(shape)
    expected = {
        mse: lambda a, b: mean_squared_error(b, a),
        psnr: lambda a, b: peak_signal_noise_ratio(b, a, data_range=1),
        ssim: lambda a, b: structural_similarity(
            b, a, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0
        ),
    }
    for ours, theirs in expected.items():
        np.testing.assert_allclose(ours(recovered, true).numpy(), per_image(theirs, recovered, true), rtol=1e-6)


@pytest.mark.parametrize("size", [6, 7, 8, 10])
def test_ssim_of_small_images_agrees_with_filters_that_reflect_at_the_border(size):
    recovered, true = pair((2, 2, 1, size, size))

    def reference(a, b):
        def smooth(image):
            return gaussian_filter(image, 1.5, mode="mirror", radius=5)

        a, b = a[0], b[0]
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
        cov = smooth(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        full = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        border = {6: 2, 7: 3, 8: 3, 10: 4}[size]
        return full[border:-border, border:-border].mean()

    np.testing.assert_allclose(ssim(recovered, true).numpy(), per_image(reference, recovered, true), rtol=1e-6)


def test_ssim_of_tiny_images_is_undefined():
    assert ssim(*pair((2, 3, 1, 5, 5))).isnan().all()


def test_matching_is_the_best_of_all_orders():
    recovered, true = pair((4, 4, 1, 6, 6), noise=0.6)
    best = [
        min(
            sum(float((recovered[t, i] - true[t, j]).square().mean()) for j, i in enumerate(order))
            for order in itertools.permutations(range(4))
        )
        for t in range(4)
    ]
    np.testing.assert_allclose(mse(match(recovered, true), true).sum(dim=1).numpy(), best, rtol=1e-5)


def test_the_order_of_recovered_images_does_not_count():
    recovered, true = pair((2, 5, 3, 12, 12))
    shuffled = recovered[:, torch.tensor([3, 0, 4, 2, 1])]
    floors = {"grey": torch.full((1, 1, 3, 12, 12), 0.5)}
    first, second = score_images(recovered, true, floors), score_images(shuffled, true, floors)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_missing_images_are_grey():
    _, true = pair((2, 3, 1, 8, 8))
    assert torch.equal(match(true[:, 1:], true)[:, 0], torch.full((2, 1, 8, 8), 0.5))
    assert torch.equal(match(true[:, :0], true), torch.full_like(true, 0.5))


def test_more_candidates_than_images_are_invalid():
    _, true = pair((1, 2, 1, 8, 8))
    with pytest.raises(InvalidOutput, match="at most 2"):
        match(true.repeat(1, 2, 1, 1, 1), true)


def test_exact_images_reach_the_cap_and_count_as_recovered():
    _, true = pair((2, 2, 1, 8, 8))
    scores = score_images(true, true, {"grey": torch.full((1, 1, 1, 8, 8), 0.5)})
    assert scores["psnr"].tolist() == [PSNR_CAP] * 2
    assert scores["ssim"].tolist() == pytest.approx([1, 1])
    assert scores["recovered"].tolist() == [1, 1]


def test_intensities_are_clamped_before_scoring():
    true = torch.ones(1, 1, 1, 8, 8)
    assert score_images(5 * true, true, {})["psnr"].item() == PSNR_CAP


def test_an_image_close_to_its_floor_is_not_recovered():
    true = torch.full((1, 2, 1, 8, 8), 0.5)
    true[0, 1, 0, ::2] = 1.0
    recovered = true + 0.03  # 30.5 dB for the plain one; clamping hides half of the error of the other
    floor = torch.full((1, 1, 1, 8, 8), 0.54)  # 28 dB for the plain one, 11.9 dB for the striped one
    scores = score_images(recovered, true, {"grey": floor})
    assert scores["recovered"].item() == 0.5
    assert score_images(recovered, true, {})["recovered"].item() == 1


def test_the_floor_of_a_metric_is_the_best_of_the_floors():
    _, true = pair((3, 2, 1, 12, 12))
    far, near = torch.zeros(1, 1, 1, 12, 12), true.mean(dim=(0, 1), keepdim=True)
    scores = score_images(true, true, {"far": far, "near": near})
    alone = score_images(near.expand_as(true), true, {})
    assert torch.equal(scores["psnr_floor"], alone["psnr"])
    assert torch.equal(scores["mse_floor"], alone["mse"])
    assert torch.equal(scores["ssim_floor"], alone["ssim"])


def test_scores_of_a_trial_do_not_depend_on_its_neighbours():
    recovered, true = pair((6, 3, 3, 16, 16))
    floors = {"random": pair((6, 3, 3, 16, 16), seed=5)[1]}
    whole = score_images(recovered, true, floors)
    for start, stop in ((0, 1), (1, 6), (2, 4)):
        part = score_images(recovered[start:stop], true[start:stop], {"random": floors["random"][start:stop]})
        assert all(torch.equal(part[name], whole[name][start:stop]) for name in whole)


def test_every_registered_image_metric_has_a_value_and_a_floor():
    recovered, true = pair((2, 2, 1, 8, 8))
    scores = score_images(recovered, true, {"grey": torch.full((1, 1, 1, 8, 8), 0.5)})
    specs = [spec for spec in METRICS.values() if spec.target == "inputs"]
    assert set(scores) == {spec.name for spec in specs} | {spec.reference for spec in specs}
    assert all(value.shape == (2,) and value.dtype == torch.float64 for value in scores.values())
    assert headline("inputs").name == "psnr"

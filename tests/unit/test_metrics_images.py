from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image.lpips import _NoTrainLpips

from leakbench.errors import InvalidOutput
from leakbench.metrics import METRICS, headline, perceptual
from leakbench.metrics.identification import Identification
from leakbench.metrics.images import PSNR_CAP, match, mse, psnr, score_images, ssim
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture, InputSpec


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


def test_an_exact_attack_has_to_be_exact():
    true = torch.full((1, 1, 1, 8, 8), 0.5)
    for error, plain, exact in ((0.05, 1, 0), (0.011, 1, 0), (0.009, 1, 1), (0.11, 0, 0)):  # 26, 39.2, 40.9, 19.2 dB
        assert score_images(true + error, true, {})["recovered"].item() == plain
        assert score_images(true + error, true, {}, exact=True)["recovered"].item() == exact


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


def test_every_registered_image_metric_has_a_value_and_a_floor(monkeypatch):
    recovered, true = pair((2, 2, 1, 32, 32))
    monkeypatch.setattr(perceptual, "_lpips_net", random_lpips)
    spec = InputSpec(shape=(1, 32, 32))
    net = build_model(Architecture(name="lenet_zhu"), spec.shape, 10, seeds=[0])
    gallery = Identification(np.zeros((3, 1, 32, 32), np.uint8), np.arange(3), np.full((2, 2), 9))
    measures = [perceptual.lpips, perceptual.FeatureDistance(net, spec, normalise=False), gallery]
    scores = score_images(recovered, true, {"grey": torch.full((1, 1, 1, 32, 32), 0.5)}, measures=measures)
    specs = [spec for spec in METRICS.values() if spec.target == "inputs"]
    assert set(scores) == {spec.name for spec in specs} | {spec.reference for spec in specs}
    assert all(value.shape == (2,) and value.dtype == torch.float64 for value in scores.values())
    assert not any(value.isnan().any() for value in scores.values())
    assert headline("inputs").name == "psnr"


# --- identification ---------------------------------------------------------------------------------------------------


def pictures(count, seed, size=5):
    return np.random.default_rng(seed).integers(0, 256, size=(count, 2, size, size), dtype=np.uint8)


def plain_rank(recovered, original, others):
    def distance(image):
        return float(((recovered - image / 255.0) ** 2).sum())

    return 1 + sum(distance(image) < distance(original) - 1e-9 for image in others)


def test_the_identification_rank_is_that_of_a_plain_search_through_gallery_and_victims():
    data = pictures(60, seed=1)
    rows = np.arange(40)
    victims = np.array([[3, 50, 7], [41, 42, 43]])  # two of the first trial are in the gallery
    true = torch.from_numpy(data[victims]).float() / 255
    recovered = (true + 2.0 * torch.randn(true.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    measure = Identification(data[rows], rows, victims)
    assert measure.sizes == [41, 43]
    expected = [
        [
            plain_rank(recovered[t, i].double().numpy(), data[victims[t, i]], data[sorted({*rows, *victims[t]})])
            for i in range(3)
        ]
        for t in range(2)
    ]
    scores = measure(recovered, true)
    assert scores["identification_rank"].tolist() == expected
    assert len({rank for ranks in expected for rank in ranks}) > 2
    assert scores["identified"].tolist() == [[float(rank == 1) for rank in ranks] for ranks in expected]


def test_exact_images_are_identified_whether_they_are_in_the_gallery_or_not_and_copies_do_not_count():
    data = pictures(20, seed=3)
    data[5] = data[2]  # the same picture twice
    data[19] = data[2]
    data[19, 0, 0, 0] ^= 64
    victims = np.array([[2, 19]])
    true = torch.from_numpy(data[victims]).float() / 255
    measure = Identification(data[:10], np.arange(10), victims)
    assert measure(true, true)["identification_rank"].tolist() == [[1, 1]]
    swapped = measure(true.flip(1), true)  # the other victim is nearer, and one of its two copies in the gallery
    assert swapped["identification_rank"].tolist()[0] == [2, 3]


def test_a_large_gallery_is_searched_in_parts(monkeypatch):
    data, victims = pictures(50, seed=4), np.array([[45], [46], [3]])
    recovered, true = pair((3, 1, 2, 5, 5), seed=5, noise=0.4)
    true = torch.from_numpy(data[victims]).float() / 255
    whole = Identification(data[:40], np.arange(40), victims)(recovered, true)
    monkeypatch.setattr("leakbench.metrics.identification._CHUNK", 350)  # 7 images at a time
    parts = Identification(data[:40], np.arange(40), victims)(recovered, true)
    assert torch.equal(whole["identification_rank"], parts["identification_rank"])


def test_one_image_for_all_trials_ranks_as_it_would_alone():
    data, victims = pictures(50, seed=6), np.array([[45], [46], [3]])
    true = torch.from_numpy(data[victims]).float() / 255
    mean = torch.full_like(true, 0.5)
    ranks = Identification(data[:40], np.arange(40), victims)(mean, true)["identification_rank"]
    alone = [
        Identification(data[:40], np.arange(40), v[None])(mean[:1], true[t : t + 1]) for t, v in enumerate(victims)
    ]
    assert ranks.tolist() == [a["identification_rank"][0].tolist() for a in alone]


# --- features ---------------------------------------------------------------------------------------------------------


def random_lpips():
    """Return LPIPS with its real heads over a random AlexNet, whose weights no test can have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _NoTrainLpips(net="alex", pnet_rand=True).eval()


def test_lpips_scales_to_minus_one_to_one_and_takes_grey_images(monkeypatch):
    net = random_lpips()
    monkeypatch.setattr(perceptual, "_lpips_net", lambda: net)
    for channels in (1, 3):
        a, b = pair((2, 3, channels, 32, 32))
        with torch.no_grad():
            expected = [
                net(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), normalize=True).flatten().tolist()
                for x, y in zip(a, b, strict=True)
            ]
        np.testing.assert_allclose(perceptual.lpips(a, b)["lpips"].numpy(), expected, rtol=1e-4)
        assert perceptual.lpips(a, a)["lpips"].abs().max() == 0
    assert perceptual.lpips(*pair((1, 1, 1, 31, 31)))["lpips"].shape == (1, 1)
    assert perceptual.lpips(*pair((1, 1, 1, 30, 31))) == {}
    assert perceptual.lpips(*pair((1, 1, 4, 32, 32))) == {}


@pytest.mark.parametrize("content", [None, b"cut off"])
def test_lpips_is_left_out_where_its_weights_are_missing_and_nothing_is_downloaded(tmp_path, monkeypatch, content):
    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / perceptual.LPIPS_BACKBONE).write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    perceptual._lpips_net.cache_clear()
    try:
        assert perceptual.lpips(*pair((1, 1, 3, 32, 32))) == {}
        assert "lpips" not in score_images(*pair((1, 1, 3, 32, 32)), {}, measures=[perceptual.lpips])
    finally:
        perceptual._lpips_net.cache_clear()


@pytest.mark.parametrize("normalise", [True, False])
def test_the_feature_distance_is_one_minus_the_cosine_of_the_last_layers_inputs(normalise):
    spec = InputSpec(shape=(1, 12, 12), mean=(0.3,), std=(0.2,))
    net = build_model(Architecture(name="mlp", params={"width": 20}), spec.shape, 5, seeds=[1])
    a, b = pair((3, 2, 1, 12, 12), noise=0.5)
    measure = perceptual.FeatureDistance(net, spec, normalise)
    moved = [(x - 0.3) / 0.2 if normalise else x for x in (a, b)]
    u, v = (net.features(x).double().numpy() for x in moved)
    cosine = (u * v).sum(2) / np.linalg.norm(u, axis=2) / np.linalg.norm(v, axis=2)
    values = measure(a, b)["feature_distance"]
    np.testing.assert_allclose(values.numpy(), 1 - cosine, rtol=1e-5)
    assert measure(b, b)["feature_distance"].max() < 1e-12
    assert torch.equal(measure(a[1:2], b[1:2])["feature_distance"], values[1:2])

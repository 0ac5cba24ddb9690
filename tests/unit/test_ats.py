"""ATS's operations against torchvision's and Pillow's, its policies, and the attack that takes them back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inversion_blocks import digits, observe, psnr
from leakbench_baselines.attacks.ats_inversion import ATSInversion
from leakbench_baselines.defenses.ats import ATS, offsets, parse_policies, shifted, transformed
from PIL import Image
from torchvision.transforms import functional as V  # noqa: N812

from leakbench import Recovery, UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.inversion import InversionAttack
from leakbench.models.functional import build_model
from leakbench.randomness import TrialRandom
from leakbench.tasks import Architecture, Protocol


def pictures(channels, side=9):
    return torch.rand(2, 3, channels, side, side, generator=torch.manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", ["contrast", "brightness", "sharpness"])
def test_photometric_operations_are_torchvisions(operation, channels):
    images, amount = pictures(channels), torch.tensor([[0.4, -0.3, 0.1], [-0.5, 0.2, 0.5]])
    found = transformed(images, operation, amount)
    adjust = getattr(V, f"adjust_{operation}")
    for t in range(2):
        for b in range(3):
            expected = adjust(images[t, b], 1 + float(amount[t, b]))
            torch.testing.assert_close(found[t, b], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("operation", ["translate_x", "translate_y"])
def test_translations_are_pillows(operation):
    values = (pictures(1, 10) * 255).round()
    amount = torch.tensor([[0.453, -0.453, 0.1], [-0.11, 0.25, 0.0]])
    found = transformed(values / 255, operation, amount) * 255
    for t in range(2):
        for b in range(3):
            picture = Image.fromarray(values[t, b, 0].numpy().astype(np.uint8))
            move = float(amount[t, b]) * 10
            matrix = (1, 0, move, 0, 1, 0) if operation == "translate_x" else (1, 0, 0, 0, 1, move)
            expected = np.asarray(picture.transform(picture.size, Image.Transform.AFFINE, matrix))
            assert np.array_equal(found[t, b, 0].round().numpy().astype(np.uint8), expected)


def test_policies_hold_the_published_transforms():
    first, second = parse_policies("3-1-7+43-18-18", always=False)
    assert [(s.operation, round(s.magnitude, 3), s.probability) for s in first] == [
        ("translate_x", 0.453, 0.3),
        ("contrast", 0.333, 0.2),
        ("translate_y", 0.101, 0.7),
    ]
    assert [(s.operation, round(s.magnitude, 3), s.probability) for s in second] == [
        ("translate_y", 0.151, 0.7),
        ("contrast", 0.389, 0.6),
        ("contrast", 0.389, 0.6),
    ]
    assert all(s.probability == 1 for s in parse_policies("21-13-3", always=True)[0])


def moved(defense, inputs, bounds=None, trials=1):
    """Return what the client trains on."""
    seen = []

    class Spy(ATS):
        name = "spy"

        def batch(self, inputs, labels, ctx):
            seen.append(inputs)
            return inputs, labels

    model = build_model(
        Architecture(name="mlp", params={"width": 2, "depth": 1}), tuple(inputs.shape[2:]), 10, seeds=[0]
    ).to(dtype=inputs.dtype)
    options = {} if bounds is None else {"bounds": bounds}
    client = Client(Protocol(), inputs.shape[1], DefenseChain([defense, Spy()]), **options)
    seeds = torch.arange(32 * trials).reshape(trials, 32).to(torch.uint8)
    labels = torch.zeros(inputs.shape[:2], dtype=torch.int64)
    client.update(model, inputs, labels, random=TrialRandom(seeds), names=["fc.bias"])
    return seen[0]


def test_each_image_gets_one_of_the_policies_and_directions():
    """An image of one bright pixel tells where it went: 4 places for one policy's shifts, 2 for the other's."""
    images = torch.zeros(1, 600, 1, 9, 9)
    images[..., 4, 4] = 1
    sent = moved(ATS(policies="3-7+43"), images)
    places = [tuple(p) for p in (sent[0, :, 0] > 0.5).nonzero()[:, 1:].tolist()]
    (dx,), (dy,), (other,) = (
        offsets(torch.tensor([[m]]), 9)[0] for m in (150 / 331, 150 / 331 * 2 / 9, 150 / 331 * 3 / 9)
    )
    expected = {(4 + a * int(dy), 4 + b * int(dx)) for a in (-1, 1) for b in (-1, 1)}
    expected |= {(4 + a * int(other), 4) for a in (-1, 1)}
    assert set(places) == expected
    share = sum(p[1] == 4 for p in places) / len(places)
    assert share == pytest.approx(0.5, abs=0.08)


def test_a_transform_may_happen_with_its_probability_only():
    images = torch.zeros(1, 800, 1, 9, 9)
    images[..., 4, 4] = 1
    sent = moved(ATS(policies="3", always=False), images)
    assert (sent[0, :, 0, 4, 4] > 0.5).double().mean() == pytest.approx(0.7, abs=0.06)


def test_normalised_images_are_transformed_as_pixels():
    images = pictures(3).repeat(1, 4, 1, 1, 1)[:1]
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    plain = moved(ATS(), images)
    shown = moved(ATS(), (images - mean) / std, bounds=(-mean / std, (1 - mean) / std))
    torch.testing.assert_close(shown * std + mean, plain, atol=1e-5, rtol=1e-4)
    assert not torch.equal(plain, images)


def test_what_is_no_image_or_no_policy_is_refused():
    with pytest.raises(UserError, match=r"policies: expected numbers out of .* got '3-99'; write"):
        ATS(policies="3-99")
    with pytest.raises(UserError, match=r"expected images"):
        ATS().batch(torch.zeros(1, 2, 5), torch.zeros(1, 2).long(), None)
    with pytest.raises(UserError, match=r"expected components .* write"):
        ATSInversion(components=0)


# --- the attack -------------------------------------------------------------------------------------------------------


def taken_back(monkeypatch, shown, **options):
    """Run the attack as if inversion had found exactly the images ``shown``."""
    observation, inputs, _ = observe(trials=len(shown), batch=shown.shape[1], known=True, **options)
    monkeypatch.setattr(InversionAttack, "run", lambda self, observation: Recovery(inputs=shown))
    attack = ATSInversion()
    images, labels = digits()
    observation._auxiliary = (images[1500:], labels[1500:])
    observation._facts = type(observation._facts)(
        **{**observation._facts.__dict__, "granted": observation._facts.granted | {"auxiliary"}}
    )
    return attack.run(observation.with_prepared(attack.prepare(observation))).inputs, inputs


@pytest.mark.parametrize("policies", ["3-1-7", "43-18-18", "21-13-3+7-4-15"])
def test_a_transform_that_was_seen_through_is_taken_back(monkeypatch, policies):
    defense = ATS(policies=policies)
    _, inputs, _ = observe(trials=24, batch=1)
    shown = moved(defense, inputs, trials=24)
    found, inputs = taken_back(monkeypatch, shown, defense=defense)
    before, after = psnr(shown, inputs), psnr(found, inputs)
    assert after.mean() > before.mean() + 3
    assert (after > before - 0.5).double().mean() > 0.8


def test_nothing_is_taken_back_without_ats(monkeypatch):
    shown = torch.rand(3, 2, 1, 8, 8, generator=torch.manual_seed(1)).double()
    assert torch.equal(taken_back(monkeypatch, shown)[0], shown)


def test_a_shift_and_its_opposite_leave_what_stayed_in_sight():
    images = pictures(1)
    there, _ = shifted(images, torch.full((2, 3), 2))
    back, inside = shifted(there, torch.full((2, 3), -2))
    assert torch.equal(back[..., 2:], images[..., 2:])
    assert not inside[..., :2].any()

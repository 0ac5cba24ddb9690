from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from leakbench_baselines.attacks.fishing import Fishing, hooked
from malicious_blocks import digits, play, psnr

from leakbench import NotApplicable, UserError
from leakbench.tasks import Architecture

LENET = Architecture(name="lenet_zhu", init="uniform(0.5)")


def picks(*counts, trials=3):
    """Return indices (trials, N) of digits, as many of class 0, 1, ... as ``counts`` says."""
    _, labels = digits()
    stream = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(trials):
        own = [(labels[:1400] == c).nonzero().flatten() for c in range(len(counts))]
        row = [of[torch.randperm(len(of), generator=stream)[:n]] for of, n in zip(own, counts, strict=True)]
        rows.append(torch.cat(row))
    return torch.stack(rows)


def feature_sums(model, inputs, sign):
    """Return the gradient of the summed features of every example, (T, N, P) over all but the last layer."""
    names = [name for name in model.parameters if not name.startswith(model.head + ".")]
    rows = []
    for example in inputs.flatten(0, 1):
        state = {k: v[0].detach().clone().requires_grad_(k in names) for k, v in model.parameters.items()}
        features = model.call({**state, **{k: v[0] for k, v in model.buffers.items()}}, example[None], train=False)[1]
        found = torch.autograd.grad(sign * features.sum(), [state[name] for name in names])
        rows.append(torch.cat([value.flatten() for value in found]))
    return torch.stack(rows).view(*inputs.shape[:2], -1)


def below_head(tensors, model):
    """Return (T, P) of the layers below the last one."""
    names = [name for name in model.parameters if not name.startswith(model.head + ".")]
    return torch.cat([tensors[name].flatten(1) for name in names], 1)


@pytest.mark.parametrize("net", [None, LENET], ids=["mlp", "lenet"])
def test_class_fishing_averages_the_target_class_alone(net):
    cast = play(Fishing(target_class=1), net=net, sizes=(6,), picks=picks(2, 2, 2))
    each = feature_sums(cast.model, cast.inputs[0], -0.5)
    expected = (each * (cast.labels[0] == 1)[..., None]).sum(1) / 6
    torch.testing.assert_close(below_head(cast.observation.update, cast.model), expected, rtol=1e-9, atol=1e-14)


def test_the_note_counts_the_examples_of_the_class():
    cast = play(Fishing(target_class=0, steps=1), sizes=(3, 5), picks=picks(3, 5))
    recovery = Fishing(target_class=0, steps=1).run(cast.observation)
    # Clients of 3 and 5 examples weigh the same, so each of the first one's counts for (1 / 2 / 3) * 8.
    assert recovery.inputs.shape == (3, 1, 1, 8, 8)
    torch.testing.assert_close(recovery.notes["hooked"], torch.full((3,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("rounds", [2, 4])
def test_feature_fishing_isolates_what_lies_between_two_thresholds(rounds):
    cast = play(Fishing(mode="feature"), sizes=(4, 4), rounds=rounds, trials=24)
    inputs = torch.cat(cast.inputs, 1)
    means = cast.model.features(inputs).mean(-1)
    levels = cast.observation.prepared["bias"][:, 0].double() / -cast.observation.prepared["weight"].sum()
    edges = torch.cat([levels[1:2], levels[:1], levels[2:rounds]])
    inside = [(means < high) & (means >= low) for high, low in pairwise(edges)]
    counts = torch.stack([each.sum(1) for each in inside])
    clear = ((means[..., None] - edges).abs() > 0.06 * means.std()).all(-1).all(-1)
    best = (counts - 1).abs().argmin(0)
    mask = torch.stack(inside)[best, torch.arange(24)]
    expected = (feature_sums(cast.model, inputs, -1.0) * mask[..., None]).sum(1)
    found, examples = hooked(cast.observation)
    found = below_head(found, cast.model)
    assert int(clear.sum()) >= 3
    assert int((counts.gather(0, best[None]) == 1).sum()) >= (2 if rounds == 2 else 12)
    for t in clear.nonzero().flatten().tolist():
        assert float(examples[t]) == pytest.approx(int(mask[t].sum()), abs=1e-3)
        if mask[t].any():
            assert float(torch.cosine_similarity(found[t], expected[t], 0)) > 0.9999


def test_one_round_of_feature_fishing_takes_the_side_that_the_bias_tells():
    attack = Fishing(mode="feature", target_class=9)
    cast = play(attack, sizes=(6,), picks=picks(2, 2, 2, trials=8))  # class 9 is absent
    means = cast.model.features(cast.inputs[0]).mean(-1)
    threshold = -cast.observation.prepared["bias"][0, 0] / cast.observation.prepared["weight"].sum()
    above = (means > threshold).sum(1)
    _, examples = hooked(cast.observation)
    clear = ((means - threshold).abs() > 0.06 * means.std()).all(1)
    assert int(clear.sum()) >= 3
    torch.testing.assert_close(examples[clear], above[clear].double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_a_lone_example_of_an_aggregate_is_recovered(sends):
    attack = Fishing(target_class=0, steps=80)
    cast = play(attack, sizes=(4, 4), sends=sends, picks=picks(1, 4, 3))
    found = attack.run(cast.observation).inputs
    assert found.shape == (3, 1, 1, 8, 8)
    assert bool((psnr(found, cast.inputs[0][:, :1]) > 30).all())


def test_feature_fishing_over_rounds_recovers_an_example():
    attack = Fishing(mode="feature", steps=80)
    cast = play(attack, sizes=(4, 4), rounds=6, trials=4)
    assert bool((psnr(attack.run(cast.observation).inputs, torch.cat(cast.inputs, 1)) > 25).all())


def test_only_the_last_layer_is_planted_and_alike_for_all():
    cast = play(Fishing(), sizes=(2, 2), own_models=True)
    assert set(cast.plants[0].tensors) == {f"{cast.model.head}.weight", f"{cast.model.head}.bias"}
    assert len(set(cast.plants[0].digests)) == 1


def test_the_class_is_the_one_likeliest_to_occur_once():
    data = digits()
    labels = data[1].clone()
    labels[-300:] = torch.tensor([0] * 150 + [1] * 120 + [2] * 30)
    cast = play(Fishing(), sizes=(10,), dataset=(data[0], labels), withheld=("label_prior",))
    assert int(cast.observation.prepared["class"]) == 2  # half, two fifths and a tenth of 10
    cast = play(Fishing(mode="feature"), sizes=(10,), dataset=(data[0], labels), withheld=("label_prior",))
    assert int(cast.observation.prepared["class"]) == 3


@pytest.mark.parametrize("mode", ["class", "feature"])
@pytest.mark.parametrize("scale", [0.0, 1e30, 1e-30, float("nan")])
def test_degenerate_updates_give_valid_inputs(scale, mode):
    attack = Fishing(mode=mode, steps=2)
    cast = play(attack, sizes=(2, 2), dtype=torch.float32)
    for value in cast.observation.update.values():
        value.copy_(torch.full_like(value, scale))
    recovery = attack.run(cast.observation)
    assert bool(recovery.inputs.isfinite().all())
    assert 0 <= float(recovery.inputs.min()) <= float(recovery.inputs.max()) <= 1


def test_unsuitable_tasks_are_declined():
    norm = Architecture(name="mlp", params={"batch_norm": True})
    with pytest.raises(NotApplicable, match="BatchNorm"):
        play(Fishing(), net=norm, batch_norm="train")
    with pytest.raises(NotApplicable, match="model_draws"):
        play(Fishing(mode="feature"), own_models=True)
    with pytest.raises(NotApplicable, match="outweighs"):
        play(Fishing(bias=10.0, class_multiplier=10.0))
    with pytest.raises(NotApplicable, match="10 classes"):
        play(Fishing(target_class=10))


@pytest.mark.parametrize(
    "params", [{"mode": "both"}, {"bias": 0.0}, {"feat_multiplier": float("inf")}, {"target_class": -1}, {"steps": 0}]
)
def test_bad_parameters_are_refused(params):
    with pytest.raises(UserError):
        Fishing(**params)

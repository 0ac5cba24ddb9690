from __future__ import annotations

import pytest
import torch
from leakbench_baselines.attacks.gradient_suppression import GradientSuppression
from malicious_blocks import play, psnr
from torch.nn import functional as F  # noqa: N812

from leakbench import NotApplicable, Recovery, UserError
from leakbench.federation.gradients import per_trial_gradients
from leakbench.tasks import Architecture

NETS = {
    "mlp": Architecture(name="mlp", params={"width": 20, "depth": 2}),
    "sigmoid": Architecture(name="lenet_zhu"),
    "relu": Architecture(name="lenet_zhu", params={"activation": "relu"}),
    "batch_norm": Architecture(name="mlp", params={"width": 20, "depth": 2, "batch_norm": True}),
    "resnet": Architecture(name="resnet18"),
}


class Isolated(GradientSuppression):
    """Hands out what the passive attack would see."""

    def run(self, observation):
        self.alone = self._alone(observation, len(observation.updates) - 1)
        return Recovery()


def gradient(model, inputs, labels):
    return per_trial_gradients(model, inputs, labels, create_graph=False).tensors


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("weighting", ["equal", "examples"])
@pytest.mark.parametrize("net", ["mlp", "sigmoid", "relu", "batch_norm"])
def test_an_aggregate_becomes_the_targets_own_gradient(net, weighting, target):
    attack = Isolated()
    cast = play(attack, sizes=(3, 1, 2), net=NETS[net], weighting=weighting, rounds=target + 1)
    attack.run(cast.observation)
    own = gradient(cast.model, cast.inputs[target], cast.labels[target])
    seen = attack.alone.update
    assert set(own) - set(seen) == {f"{cast.model.head}.bias"}
    for name, value in seen.items():
        torch.testing.assert_close(value, own[name], rtol=1e-10, atol=1e-14)
    assert attack.alone.inputs_per_client == cast.inputs[target].shape[1]


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_a_dead_layer_stays_dead_over_local_steps(sends):
    attack = Isolated()
    cast = play(attack, sizes=(2, 2, 2), sends=sends, local_steps=5, batches="same", lr=0.1)
    attack.run(cast.observation)
    honest = play(attack, sizes=(2,), sends="delta", local_steps=5, batches="same", lr=0.1, picks=_first(cast))
    moved = attack.alone.difference(attack.alone.update)
    assert len(moved) >= len(honest.observation.update) - 2
    for name, value in moved.items():
        expected = honest.observation.difference(honest.observation.update)[name]
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-11)


def _first(cast):
    """Return the indices that `play` draws for its first client."""
    picks = torch.randint(0, 1500, (3, 6), generator=torch.Generator().manual_seed(5))
    assert len(picks) == len(cast.inputs[0])
    return picks[:, :2]


def test_only_one_bias_is_planted_and_the_target_gets_the_honest_model():
    cast = play(GradientSuppression(), sizes=(2, 2, 2), rounds=5)
    for index, planted in enumerate(cast.plants):
        assert len(planted.tensors) == 1
        for k in range(3):
            same = all(
                torch.equal(value, cast.model.parameters[name])
                for name, value in planted.model_of(k).parameters.items()
            )
            assert same == (k == index % 3)


def test_as_many_rounds_as_clients_give_every_clients_labels():
    attack = GradientSuppression(labels="idlg")
    cast = play(attack, target="labels", sizes=(1, 1, 1, 1), rounds=4)
    counts = attack.run(cast.observation).label_counts
    assert torch.equal(counts.argmax(-1), torch.cat(cast.labels, 1))


def test_clients_without_a_turn_get_the_prior():
    attack = GradientSuppression(labels="idlg")
    cast = play(attack, target="labels", sizes=(1, 10, 15), rounds=1)
    counts = attack.run(cast.observation).label_counts
    assert torch.equal(counts[:, 0], F.one_hot(cast.labels[0], 10).sum(1))
    assert torch.equal(counts[:, 1], torch.ones(3, 10, dtype=torch.int64))
    assert torch.equal(counts[:, 2].sum(-1), torch.tensor([15] * 3))
    assert int(counts[:, 2].max() - counts[:, 2].min()) == 1


def test_the_targets_input_is_recovered_from_an_aggregate():
    attack = GradientSuppression(steps=150)
    cast = play(attack, sizes=(1, 3, 3))
    found = attack.run(cast.observation).inputs
    assert found.shape == (3, 1, 1, 8, 8)
    assert bool((psnr(found, cast.inputs[0]) > 30).all())


def test_a_single_client_needs_no_plant():
    cast = play(GradientSuppression(), sizes=(2,), own_models=True)
    assert cast.plants[0].tensors == {}


@pytest.mark.parametrize("scale", [0.0, 1e30, float("nan")])
def test_degenerate_updates_give_valid_claims(scale):
    for target in ("labels", "inputs"):
        attack = GradientSuppression(steps=2)
        cast = play(attack, target=target, sizes=(2, 2))
        for value in cast.observation.update.values():
            value.mul_(0).add_(scale)
        found = attack.run(cast.observation)
        if target == "inputs":
            assert bool(found.inputs.isfinite().all())
        else:
            assert torch.equal(found.label_counts.sum(-1), torch.full((3, 2), 2))


@pytest.mark.parametrize(
    "net",
    [
        Architecture(name="mlp", params={"activation": "tanh"}),
        Architecture(name="mlp", params={"activation": "elu"}),
        Architecture(
            name="timm/vit_tiny_patch16_224",
            params={"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2},
        ),
    ],
    ids=lambda net: net.label,
)
def test_nets_without_a_layer_that_dies_are_declined(net):
    with pytest.raises(NotApplicable, match="bias"):
        play(GradientSuppression(), net=net)


def test_weights_of_a_trials_own_and_label_attacks_that_read_more_are_declined():
    with pytest.raises(NotApplicable, match="model_draws"):
        play(GradientSuppression(), own_models=True)
    with pytest.raises(NotApplicable, match="head's weight"):
        play(GradientSuppression(labels="bias_count"), target="labels")


@pytest.mark.parametrize("params", [{"shift": 0.0}, {"shift": float("inf")}, {"labels": "joint"}, {"labels": "nobody"}])
def test_bad_parameters_are_refused(params):
    with pytest.raises(UserError):
        GradientSuppression(**params)


@pytest.mark.slow
def test_a_residual_net_dies_through_its_last_batch_norm():
    attack = Isolated()
    cast = play(attack, sizes=(2, 2), net=NETS["resnet"], dataset=_pictures(), dtype=torch.float64, trials=1)
    attack.run(cast.observation)
    own = gradient(cast.model, cast.inputs[0], cast.labels[0])
    assert list(cast.plants[0].tensors) == ["body.10.bn2.bias"]
    for name, value in attack.alone.update.items():
        torch.testing.assert_close(value, own[name], rtol=1e-9, atol=1e-12)


def _pictures():
    stream = torch.Generator().manual_seed(0)
    return torch.rand(1800, 3, 32, 32, generator=stream), torch.randint(0, 10, (1800,), generator=stream)

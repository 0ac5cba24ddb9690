"""Trap weights: neurons that fire for one input give it away."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from leakbench_baselines.attacks.curious_abandon_honesty import CuriousAbandonHonesty, trap_weights
from malicious_blocks import play

from leakbench import NotApplicable, UserError
from leakbench.observation import Cohort
from leakbench.tasks import Architecture, InputSpec

WIDE = Architecture(name="mlp", params={"width": 400})

pytestmark = pytest.mark.usefixtures("one_thread")


def fired_alone(cast):
    """Return, by trial, the private inputs for which a neuron fires that fires for no other."""
    inputs = torch.cat(cast.inputs, 1).flatten(2)
    names = cast.model.parameter_names[:2]
    weight, bias = (cast.observation.planted[name][0] for name in names)
    fires = inputs @ weight.T + bias > 0
    single = fires.sum(1, keepdim=True) == 1
    return inputs, (fires & single).sum(2)


def found(cast, claims):
    inputs, neurons = fired_alone(cast)
    error = (claims.flatten(2)[:, None] - inputs[:, :, None]).abs().amax(3).amin(2)
    return error, neurons


@pytest.mark.parametrize("own_models", [False, True])
@pytest.mark.parametrize("task", [{}, {"sends": "delta", "lr": 0.05}, {"sends": "weights", "lr": 0.05}])
def test_inputs_with_two_neurons_of_their_own_are_exact(task, own_models):
    attack = CuriousAbandonHonesty(scale=0.8)
    cast = play(attack, sizes=(8,), net=WIDE, own_models=own_models, **task)
    error, neurons = found(cast, attack.run(cast.observation).inputs)
    assert (neurons >= 2).sum() > 12
    assert error[neurons >= 2].max() < 1e-5


def test_trapped_nets_leak_more_than_honest_ones():
    attack = CuriousAbandonHonesty(scale=0.8)
    cast = play(attack, sizes=(24,), net=WIDE)
    error, _ = found(cast, attack.run(cast.observation).inputs)

    class Honest(CuriousAbandonHonesty):
        def plant(self, model, cohort, history):
            return {}

    passive = play(Honest(), sizes=(24,), net=WIDE)
    claims = Honest().run(passive.observation).inputs
    passive_error = (claims.flatten(2)[:, None] - cast.inputs[0].flatten(2)[:, :, None]).abs().amax(3).amin(2)
    assert (error < 1e-5).double().mean() > (passive_error < 1e-5).double().mean() + 0.2


def test_nothing_but_the_first_layer_is_replaced():
    cast = play(CuriousAbandonHonesty(), sizes=(2, 2), net=WIDE)
    planted = cast.observation.planted
    assert list(planted) == ["body.linear0.weight", "body.linear0.bias"]
    assert all(value.shape == cast.model.parameters[name].shape for name, value in planted.items())


def test_rows_are_the_same_sizes_in_two_halves():
    rows = trap_weights(7, 11, 0.9, 0.5)
    for row in rows:
        negative, positive = row[row < 0], row[row > 0]
        assert len(negative) == len(positive) == 5
        torch.testing.assert_close(positive.sort().values, 0.9 * negative.neg().sort().values)
    assert len({tuple((row > 0).tolist()) for row in rows}) == 7
    assert abs(trap_weights(200, 400, 0.9, 0.5).clamp(max=0).square().mean() * 2 - 0.25) < 0.01


def test_the_traps_see_pixels_however_inputs_are_normalised():
    attack = CuriousAbandonHonesty()
    cast = play(attack, sizes=(3,), net=WIDE)
    seen = cast.observation
    spec = InputSpec(shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
    facts = dataclasses.replace(seen._facts, normalised=True, input_spec=spec)
    planted = attack.plant(cast.model, Cohort({}, facts=facts, random=seen._random, model=cast.model), [])
    weight, bias = planted.values()
    pixels = cast.inputs[0][0].flatten(1)
    outputs = (pixels - 0.3) / 0.4 @ weight[0].T + bias[0]
    torch.testing.assert_close(outputs, pixels @ trap_weights(400, 64, 0.95, 0.5).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "net", [Architecture(name="lenet_zhu"), Architecture(name="mlp", params={"activation": "tanh"})], ids=str
)
def test_other_first_layers_are_declined(net):
    with pytest.raises(NotApplicable):
        play(CuriousAbandonHonesty(), sizes=(2,), net=net)


@pytest.mark.parametrize("params", [{"scale": 0.0}, {"scale": 1.5}, {"sigma": 0.0}])
def test_parameters_are_checked(params):
    with pytest.raises(UserError, match="write curious_abandon_honesty"):
        CuriousAbandonHonesty(**params)

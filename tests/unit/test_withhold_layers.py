"""Layers of which nothing is sent."""

from __future__ import annotations

import pytest
import torch
from inversion_blocks import observe, psnr
from leakbench_baselines.attacks.inverting_gradients import InvertingGradients
from leakbench_baselines.defenses.withhold_layers import WithholdLayers
from measure_subjects import subject

from leakbench import UserError
from leakbench.tasks import Architecture, Protocol

pytestmark = pytest.mark.usefixtures("one_thread")
NET = Architecture(name="lenet_zhu", init="uniform(0.5)")
LAYERS = ("body.conv0", "body.conv1", "body.conv2", "fc")


@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
@pytest.mark.parametrize(
    ("arguments", "withheld"),
    [
        ({"first": 1}, {0}),
        ({"first": 2, "last": 1}, {0, 1, 3}),
        ({"first": 0, "layers": "body.conv1, fc"}, {1, 3}),
        ({"first": 0}, set()),
        ({"first": 9}, {0, 1, 2, 3}),
    ],
)
def test_nothing_is_sent_of_withheld_layers_and_the_rest_is_as_it_was(sends, arguments, withheld):
    defense = WithholdLayers(**arguments)
    clean, _, _ = observe(net=NET, sends=sends)
    observation, _, _ = observe(net=NET, sends=sends, defense=defense, known=True)
    names = {f"{LAYERS[i]}.{part}" for i in withheld for part in ("weight", "bias")}
    assert observation.withheld == names
    for name, value in observation.update.items():
        expected = torch.zeros_like(value) if name in names else clean.update[name]
        assert torch.equal(value, expected)
    changed = observation.difference(observation.update)
    assert all(not changed[name].any() for name in names)


def test_who_does_not_know_the_defense_does_not_know_what_is_withheld():
    observation, _, _ = observe(net=NET, defense=WithholdLayers(), known=False)
    assert observation.withheld == frozenset()


def test_an_attack_that_knows_what_is_withheld_matches_the_rest_only():
    """The zeros of the last layer pull a search that takes them for a gradient away from the private image."""
    defense = WithholdLayers(first=0, last=1)
    attack = InvertingGradients(steps=150)
    quality = {}
    for known in (True, False):
        observation, inputs, _ = observe(net=NET, defense=defense, known=known)
        quality[known] = psnr(attack.run(observation).inputs, inputs)
    assert bool((quality[True] > quality[False] + 3).all())


def test_an_unknown_layer_is_an_error_that_names_the_known_ones():
    with pytest.raises(UserError, match=r"body\.conv0, body\.conv1, body\.conv2, fc; got 'conv9'"):
        observe(net=NET, defense=WithholdLayers(layers="conv9"))
    with pytest.raises(UserError, match="first: expected at least 0"):
        WithholdLayers(first=-1)


@pytest.mark.parametrize("sends", ["gradient", "delta", "weights"])
def test_measures_see_no_change_where_nothing_is_sent(sends):
    own = subject("mlp", Protocol(sends=sends), [WithholdLayers(first=0, last=1)])
    bare = subject("mlp", Protocol(sends=sends))
    for name, value in own.update().items():
        expected = torch.zeros_like(value) if name.startswith("fc.") else bare.update()[name]
        torch.testing.assert_close(value, expected)

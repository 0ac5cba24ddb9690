"""PRECODE against a plain net with a bottleneck, one trial at a time; what it leaves open (oracles T1 and T11)."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from inversion_blocks import digits, observe
from label_blocks import digits_block
from leakbench_baselines.attacks.analytic import Analytic
from leakbench_baselines.attacks.precode_inversion import PrecodeInversion, read_noise
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from leakbench_baselines.defenses.no_last_bias import NoLastBias
from leakbench_baselines.defenses.precode import Precode, divergence
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812

from leakbench import UserError
from leakbench.chain import DefenseChain
from leakbench.data import load_dataset
from leakbench.entries import resolve
from leakbench.federation.client import Client
from leakbench.grids import Cell
from leakbench.keys import DEVELOPMENT
from leakbench.models.build import build_module, seeded
from leakbench.models.functional import build_model
from leakbench.models.recipe import train
from leakbench.randomness import TrialRandom
from leakbench.runner.execute import Runner
from leakbench.runner.plan import plan
from leakbench.tasks import Architecture, BatchSpec, Protocol, Task, ThreatModel

MLP = Architecture(name="mlp", params={"width": 20, "depth": 1})


class Spy(Precode):
    """Keeps the noise: the first draws of its streams."""

    def step(self, grads, ctx):
        streams = TrialRandom(torch.tensor([list(seed) for seed in ctx.random._seeds], dtype=torch.uint8))
        self.noise = streams.randn(ctx.inputs.shape[1], self.size).double()
        return super().step(grads, ctx)


def block_under(defense, batch, *, architecture=MLP, models=None, protocol=None, trials=4):
    block = digits_block(batch, protocol=protocol, trials=trials, models=models)
    model = build_model(
        architecture, (1, 8, 8), 10, seeds=range(block.model.draws), transform=DefenseChain([defense]).model
    )
    return block, model.to(dtype=torch.float64)


def send(block, model, *parts, names=None, stream=0):
    client = Client(block.protocol, block.batch, DefenseChain(parts))
    seeds = torch.randint(0, 256, (len(block.labels), 32), generator=torch.manual_seed(stream)).to(torch.uint8)
    return client.update(model, block.inputs, block.labels, random=TrialRandom(seeds), names=names)


def plain(model, inputs, labels, noise, beta, t, reduction):
    """One trial's gradient of a net written out by hand: body, code, last layer; torch's own divergence."""
    state = {n: v[t % len(v)].detach().clone().requires_grad_() for n, v in model.parameters.items()}
    h = F.relu(F.linear(inputs[t].flatten(1), state["body.linear0.weight"], state["body.linear0.bias"]))
    mu, spread = F.linear(h, state["fc.encode.weight"], state["fc.encode.bias"]).chunk(2, 1)
    sigma = F.softplus(spread)
    code = F.linear(mu + sigma * noise[t], state["fc.decode.weight"], state["fc.decode.bias"])
    logits = F.linear(code, state["fc.head.weight"], state["fc.head.bias"])
    bits = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum(1) / torch.tensor(2.0).log()
    loss = F.cross_entropy(logits, labels[t], reduction=reduction)
    loss = loss + beta * (bits.mean() if reduction == "mean" else bits.sum())
    return dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))


@pytest.mark.parametrize("trials", [4, 18])
@pytest.mark.parametrize("models", [None, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_is_that_of_a_noisy_code_and_its_divergence(models, reduction, trials):
    spy = Spy(size=6, beta=0.3)
    block, model = block_under(spy, 3, models=models, trials=trials, protocol=Protocol(reduction=reduction))
    sent = send(block, model, spy)
    assert spy.noise.std() == pytest.approx(1, abs=0.2)
    for t in (0, trials - 1):
        expected = plain(model, block.inputs, block.labels, spy.noise, 0.3, t, reduction)
        for name, slope in expected.items():
            torch.testing.assert_close(sent[name][t], slope)


def test_soft_labels_stay_soft():
    spy = Spy(size=6, beta=0.0)
    block, model = block_under(spy, 3)
    smooth, hard = send(block, model, LabelSmoothing(alpha=0.3), spy), send(block, model, spy)
    uniform = torch.stack([send(_relabeled(block, c), model, spy)["fc.head.bias"] for c in range(10)]).mean(0)
    torch.testing.assert_close(smooth["fc.head.bias"], 0.7 * hard["fc.head.bias"] + 0.3 * uniform)


def _relabeled(block, label):
    labels = torch.full_like(block.labels, label)
    return type(block)(block.protocol, block.batch, block.model, block.inputs, labels, block.seeds, block.knowledge)


def test_two_calls_on_a_batch_differ_in_every_layer_and_local_steps_draw_anew():
    block, model = block_under(Precode(size=6), 3)
    once, again = send(block, model, Precode(size=6)), send(block, model, Precode(size=6), stream=1)
    assert all((once[name] - again[name]).abs().amax() > 1e-4 for name in once)
    protocol, noises = Protocol(sends="delta", local_steps=2, lr=0.1, batches="same"), []

    class Keeper(Spy):
        def step(self, grads, ctx):
            found = super().step(grads, ctx)
            noises.append(self.noise)
            return found

    block, model = block_under(Precode(size=6), 3, protocol=protocol)
    send(block, model, Keeper(size=6))
    assert not torch.equal(*noises)


def test_without_spread_it_is_a_pair_of_linear_layers():
    """Oracle T11: as sigma vanishes, noise has no say, and the net is body, one linear map, last layer."""
    block, model = block_under(Precode(size=6), 3)
    bias = model.parameters["fc.encode.bias"].clone()
    bias[:, 6:] = -60
    still = model.with_state({"fc.encode.bias": bias})
    once, again = (send(block, still, Precode(size=6, beta=0.0), stream=s) for s in (0, 1))
    for name in once:
        torch.testing.assert_close(once[name], again[name])
    p = {n: v[0] for n, v in still.parameters.items()}
    h = still.module.get_submodule("body")
    features = torch.func.functional_call(h, {n[5:]: v for n, v in p.items() if n.startswith("body.")}, block.inputs[0])
    linear = p["fc.decode.weight"] @ p["fc.encode.weight"][:6]
    offset = p["fc.decode.weight"] @ p["fc.encode.bias"][:6] + p["fc.decode.bias"]
    logits = F.linear(F.linear(features, linear, offset), p["fc.head.weight"], p["fc.head.bias"])
    torch.testing.assert_close(still.trials(0, 1).logits(block.inputs[:1])[0], logits)


def test_the_first_layer_gives_an_input_away_all_the_same():
    """Oracles T1 and T11: the quotient is exact whatever happens downstream."""
    observation, inputs, _ = observe(net=MLP, defense=Precode(size=6), trials=8)
    found = Analytic().run(observation).inputs
    assert (found - inputs).abs().max() < 1e-9


def test_the_noise_of_one_example_can_be_read_off_its_gradient():
    spy = Spy(size=6)
    block, model = block_under(spy, 1, trials=8)
    sent = send(block, model, spy)
    torch.testing.assert_close(read_noise(model, sent), spy.noise, rtol=1e-6, atol=1e-6)
    scaled = {name: 1e-5 * value for name, value in sent.items()}
    torch.testing.assert_close(read_noise(model, scaled), spy.noise, rtol=1e-6, atol=1e-6)
    nothing = read_noise(model, {name: torch.zeros_like(value) for name, value in sent.items()})
    assert nothing.isfinite().all()


def error(attack, **options):
    observation, inputs, _ = observe(net=Architecture(name="lenet_zhu", init="uniform(0.5)"), **options)
    recovery = attack.run(observation.with_prepared(attack.prepare(observation)))
    return (recovery.inputs - inputs).square().mean((1, 2, 3, 4)).sqrt(), recovery.visible_loss


def test_known_noise_lets_the_gradient_match_where_ignored_noise_does_not():
    options = {"defense": Precode(size=8), "known": True, "trials": 2}
    read, fit = error(PrecodeInversion(steps=150, tv=1e-6), **options)
    blind, misfit = error(PrecodeInversion(steps=150, tv=1e-6, noise="searched"), **options)
    assert read.mean() < 0.1
    assert fit.max() < 0.05
    assert read.mean() <= blind.mean() + 0.02
    assert misfit.isfinite().all()


def test_before_the_bottleneck_alone_is_compared_where_asked():
    observation, _, _ = observe(net=MLP, defense=Precode(size=6), batch=2, known=True)
    inversion = PrecodeInversion(layers="before").fitted(observation)
    assert set(inversion.source.target(observation, "direction")) == {"body.linear0.weight", "body.linear0.bias"}
    assert len(PrecodeInversion().fitted(observation).source.target(observation, "direction")) == 8


def test_the_recipe_trains_with_noise_and_divergence():
    """In train mode the module's own loss is what any routine differentiates."""
    with seeded(3):
        module = build_module(MLP, (1, 8, 8), 10, Precode(size=6, beta=0.5).model).requires_grad_(True)
    inputs, labels = digits()[0][:5].float(), digits()[1][:5]
    module.train()
    with seeded(4):
        F.cross_entropy(module(inputs), labels).backward()
    with seeded(4):
        noise = torch.randn(5, 6)
    model = build_model(MLP, (1, 8, 8), 10, seeds=[3], transform=Precode(size=6).model)
    expected = plain(model, inputs[None], labels[None], noise[None], 0.5, 0, "mean")
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_it_learns():
    data = load_dataset("digits")
    architecture = Architecture(name="mlp", params={"width": 32, "depth": 1})
    *_, early = train(architecture, data, 0, normalise=False, last="mid", transform=Precode(size=16).model)
    assert early.accuracy > 0.8
    assert any("encode" in name for name in early.tensors)


def test_features_after_a_bottleneck_may_be_negative():
    _, model = block_under(Precode(size=6), 1)
    assert model.nonnegative_features is False
    assert model.head == "fc.head"
    assert model.head_is_last


def test_it_composes_with_other_changes_of_the_model():
    for parts in ([NoLastBias(), Precode(size=4)], [Precode(size=4), NoLastBias()]):
        model = build_model(MLP, (1, 8, 8), 10, seeds=[0], transform=DefenseChain(parts).model)
        assert not model.has_head_bias
        assert "fc.encode.bias" in model.parameters


def test_divergence_is_zero_for_a_standard_normal_code():
    unit = torch.tensor(1.0).exp().sub(1).log()  # softplus of it is 1
    assert divergence(torch.stack([torch.tensor(0.0), unit])).item() == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"size: expected .* got 0; write"):
        Precode(size=0)
    with pytest.raises(UserError, match=r"beta: expected .* got -1; write"):
        Precode(beta=-1)
    with pytest.raises(UserError, match=r"expected a net that ends in a linear layer"):
        Precode().model(nn.Conv2d(1, 1, 1))
    with pytest.raises(UserError, match=r"noise: expected read or searched, got 'x'"):
        PrecodeInversion(noise="x")


def test_it_runs_with_a_model_of_its_own_and_falls_to_the_first_layer(tmp_path):
    """Oracle T1 through the harness: privacy zero."""
    task = Task(
        dataset="digits",
        architecture=MLP,
        batch=BatchSpec(size=1),
        threat_model=ThreatModel(labels=True),
        normalise=False,
        target="inputs",
    )
    (attack,) = resolve("attack", "analytic")
    cells = [Cell("", task, attack, resolve("defense", name), 4) for name in ("none", "precode")]
    with Runner(tmp_path, season=DEVELOPMENT, isolation="process") as runner:
        bare, precode = (pd.read_parquet(runner.run(plan([cell], DEVELOPMENT)[0]).path) for cell in cells)
    assert set(bare.status) == set(precode.status) == {"ok"}
    assert precode.psnr.min() > 90
    assert set(bare.checkpoint_sha256).isdisjoint(precode.checkpoint_sha256)

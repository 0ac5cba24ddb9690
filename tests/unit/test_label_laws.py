"""What the papers say about label attacks, as laws on untrained nets: one net per trial, real digits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from label_blocks import CLASSES, SPEC, digits_block
from leakbench_baselines.attacks.bias_count import BiasCount
from leakbench_baselines.attacks.fedavg_labels import FedAvgLabels
from leakbench_baselines.attacks.llg import LLG
from leakbench_baselines.attacks.llg_plus import LLGPlus
from leakbench_baselines.attacks.llg_star import LLGStar
from leakbench_baselines.attacks.random_labels import RandomLabels
from leakbench_baselines.attacks.zlg import ZLG
from leakbench_baselines.attacks.zlg_plus import ZLGPlus

from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.tasks import Architecture

TRIALS = 100


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def block_of(batch, sampler, architecture="lenet_zhu", activation="sigmoid", seed=0):
    return digits_block(
        batch, architecture=architecture, trials=TRIALS, sampler=sampler, seed=seed, activation=activation
    )


def with_paper_init(block):
    """The same block on nets with weights and biases from U(-0.5, 0.5), as in the papers on DLG and LLG."""
    net = Architecture(name="lenet_zhu", init="uniform(0.5)")
    model = build_model(net, SPEC.shape, CLASSES, seeds=range(TRIALS)).to(dtype=torch.float64)
    return replace(block, model=model, knowledge={**block.knowledge, "model": model})


def head_gradient(block):
    """What the clients send of the last layer, which is all that these attacks read."""
    names = [f"{block.model.head}.{part}" for part in ("weight", "bias")]
    client = Client(block.protocol, block.batch)
    return client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"], names=names)


def recalls(block, *attacks):
    """Mean instance recall of every attack."""
    update, size = head_gradient(block), block.labels.shape[1]
    counts = [torch.minimum(block.run(attack, update), block.counts).sum(1) for attack in attacks]
    return [float(named.double().mean()) / size for named in counts]


def negative_rows(block):
    """Classes (T, C) of negative row sum in the last layer's weight gradient."""
    return head_gradient(block)[f"{block.model.head}.weight"].sum(-1) < 0


@pytest.mark.parametrize(("architecture", "activation"), [("lenet_zhu", "sigmoid"), ("mlp", "relu")])
@pytest.mark.parametrize(("batch", "sampler", "seed"), [(8, "unbalanced", 0), (8, "iid", 1), (32, "unbalanced", 2)])
def test_a_negative_row_means_that_its_class_is_there(architecture, activation, batch, sampler, seed):
    block = block_of(batch, sampler, architecture, activation, seed)
    negative = negative_rows(block)
    assert negative.any(1).all()
    assert not (negative & (block.counts == 0)).any()


@pytest.mark.parametrize(("architecture", "activation"), [("lenet_zhu", "sigmoid"), ("mlp", "relu")])
def test_a_single_example_has_one_negative_row_and_that_is_its_label(architecture, activation):
    block = block_of(1, "iid", architecture, activation)
    assert negative_rows(block).equal(block.counts == 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sign_means_nothing_where_features_may_be_negative(seed):
    single, batch = (block_of(b, "iid", activation="tanh", seed=seed) for b in (1, 8))
    wrong = negative_rows(single).ne(single.counts == 1).any(1)
    assert wrong.double().mean() > 0.3  # half of the nets have features of negative sum
    wrong = (negative_rows(batch) & (batch.counts == 0)).any(1)
    assert wrong.double().mean() > 0.3
    assert recalls(batch, LLG())[0] < 0.6 < 0.8 < recalls(block_of(8, "iid", seed=seed), LLG())[0]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "elu"])
@pytest.mark.parametrize(("batch", "sampler"), [(8, "iid"), (32, "unbalanced")])
def test_bias_counting_is_immune_to_the_activation(activation, batch, sampler):
    assert recalls(block_of(batch, sampler, activation=activation), BiasCount())[0] > 0.99


@pytest.mark.parametrize("seed", [0, 1])
def test_llg_falls_below_random_labels_on_large_balanced_batches_only(seed):
    llg, chance = recalls(block_of(128, "iid", seed=seed), LLG(), RandomLabels())
    assert llg < chance - 0.2
    llg, chance = recalls(block_of(128, "unbalanced", seed=seed), LLG(), RandomLabels())
    assert llg > chance + 0.2


@pytest.mark.parametrize("net", ["lenet_zhu", "lenet_zhu uniform(0.5)", "mlp"])
def test_llg_plus_beats_llg_star_beats_llg_on_average(net):
    found = []
    for batch in (1, 8, 32):
        for sampler in ("unbalanced", "iid"):
            block = block_of(batch, sampler, *(["mlp", "relu"] if net == "mlp" else []))
            block = with_paper_init(block) if "uniform" in net else block
            found.append(recalls(block, LLGPlus(), LLGStar(rounds=3), LLG()))
    plus, star, plain = torch.tensor(found).mean(0).tolist()
    assert plus >= star > plain + 0.05
    assert plus > 0.98


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-40, -1e-40, 1e38, -1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("attack", [LLG, LLGStar, LLGPlus, ZLG, ZLGPlus, FedAvgLabels])
def test_a_degenerate_update_still_gives_as_many_labels_as_there_are(attack, value):
    block = digits_block(5, trials=2)
    update = {k: torch.full(v.shape, value, dtype=torch.float32) for k, v in block.update().items()}
    counts = block.run(attack(**({"samples": 10} if attack in (ZLG, FedAvgLabels) else {})), update)
    assert counts.min() >= 0
    # Without a cap, LLG and LLG* name every class of negative signal.
    uncapped = attack in (LLG, LLGStar) and value < 0
    assert counts.sum(1).eq(CLASSES if uncapped else 5).all()

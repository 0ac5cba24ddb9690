"""APRIL's closed form: exact where its equations hold and determine the patches."""

from __future__ import annotations

import pytest
import torch
from label_blocks import digits_block
from leakbench_baselines.attacks.april import April
from leakbench_baselines.defenses.clip_l2 import ClipL2
from leakbench_baselines.defenses.dropout import Dropout
from leakbench_baselines.defenses.label_smoothing import LabelSmoothing
from torch import nn

from leakbench import Knowledge, NotApplicable, Observation, UserError
from leakbench.chain import DefenseChain
from leakbench.federation.client import Client
from leakbench.models.functional import build_model
from leakbench.observation import Seen
from leakbench.tasks import Architecture, Protocol

EXACT = Protocol(precision="float64")

pytestmark = pytest.mark.usefixtures("one_thread")


class PaperBlock(nn.Module):
    """The paper's first block: attention without a norm before it or a skip around it."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.norm2, self.mlp = block.attn, block.norm2, block.mlp

    def forward(self, x, **_):
        return self.mlp(self.norm2(self.attn(x)))


def with_paper_block(module):
    module.blocks[0] = PaperBlock(module.blocks[0])
    return module


def vit(name="vit_tiny_patch16_224", **params):
    given = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return {"architecture": f"timm/{name}", **given, **params}


def show(block, update, model=None):
    """Return what an attacker sees of ``update``, the block's nets being ``model``."""
    known = block.knowledge if model is None else {**block.knowledge, "model": model}
    return Observation(Seen([update]), **known)


def attack(april, observation):
    april.prepare(observation)
    return april.run(observation).inputs


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("params", [{}, {"patch_size": 4, "depth": 1}, {"global_pool": "avg", "class_token": False}])
def test_a_usual_transformer_gives_its_image_exactly(params, models):
    block = digits_block(1, protocol=EXACT, models=models, **vit(**params))
    claimed = attack(April(cutoff=1e-12), show(block, block.update()))
    assert (claimed - block.inputs).abs().max() < 1e-5


@pytest.mark.parametrize("defense", [LabelSmoothing(alpha=0.3), Dropout(p=0.5), ClipL2(bound=0.01)])
def test_what_changes_the_loss_or_the_scale_does_not_matter(defense):
    block = digits_block(1, protocol=EXACT, **vit())
    client = Client(EXACT, 1, DefenseChain([defense]))
    update = client.update(block.model, block.inputs, block.labels, random=block.knowledge["random"])
    assert (attack(April(cutoff=1e-12), show(block, update)) - block.inputs).abs().max() < 1e-5


@pytest.mark.parametrize("sends", ["delta", "weights"])
def test_several_steps_on_one_image_are_exact_in_float64(sends):
    protocol = Protocol(sends=sends, local_steps=3, batches="same", lr=0.1, momentum=0.9, precision="float64")
    block = digits_block(1, protocol=protocol, **vit())
    assert (attack(April(cutoff=1e-10), show(block, block.update())) - block.inputs).abs().max() < 1e-4


def test_the_papers_equations_hold_in_the_papers_encoder_only():
    block = digits_block(1, protocol=EXACT, **vit(patch_size=4))
    params = {key: value for key, value in vit(patch_size=4).items() if key != "architecture"}
    net = Architecture(name="timm/vit_tiny_patch16_224", params=params, init="uniform(0.5)")
    model = build_model(net, (1, 8, 8), 10, seeds=range(4), transform=with_paper_block).to(dtype=torch.float64)
    update = Client(EXACT, 1).update(model, block.inputs, block.labels, random=block.knowledge["random"])
    paper = April(equations="attention", cutoff=1e-13)
    error = (attack(paper, show(block, update, model)) - block.inputs).abs().flatten(1).amax(1)
    assert (error < 1e-5).all(), error
    usual = attack(paper, show(block, block.update()))
    assert ((usual - block.inputs).square().flatten(1).mean(1) > 0.05).all()


def test_more_patches_than_dimensions_give_the_smallest_solution():
    block = digits_block(1, protocol=EXACT, **vit(embed_dim=12))
    update = block.update()
    claimed = April(cutoff=1e-10).run(show(block, update)).inputs[:, 0]
    worst, best = (claimed - block.inputs[:, 0]).abs().flatten(1).amax(1), block.inputs[:, 0].square().mean()
    assert (worst > 1e-3).all()
    assert ((claimed - block.inputs[:, 0]).square().flatten(1).mean(1) < 0.5 * best).all()


@pytest.mark.parametrize("spoil", [0.0, 1e-300, 1e300, float("inf"), float("nan")])
@pytest.mark.parametrize("equations", ["projection", "attention"])
def test_degenerate_updates_give_finite_images(spoil, equations):
    block = digits_block(1, protocol=EXACT, **vit())
    update = {name: spoil * value for name, value in block.update().items()}
    claimed = April(equations=equations).run(show(block, update)).inputs
    assert claimed.isfinite().all()
    assert 0 <= claimed.min() <= claimed.max() <= 1


@pytest.mark.parametrize(
    "net",
    [
        {"architecture": "mlp"},
        vit(class_token=False, global_pool="avg", pos_embed="none"),
        {"architecture": "timm/swin_tiny_patch4_window7_224", "img_size": 8, "patch_size": 1, "window_size": 2},
    ],
)
def test_other_nets_are_declined(net):
    block = digits_block(1, models=1, **net)
    with pytest.raises(NotApplicable):
        April().prepare(Knowledge(**block.knowledge))


def test_the_papers_equations_need_a_position_for_the_class_token():
    block = digits_block(1, models=1, **vit(no_embed_class=True))
    April().prepare(Knowledge(**block.knowledge))
    with pytest.raises(NotApplicable):
        April(equations="attention").prepare(Knowledge(**block.knowledge))


@pytest.mark.parametrize("wrong", [{"equations": "all"}, {"cutoff": 1.0}])
def test_unknown_equations_and_cutoffs_are_refused(wrong):
    with pytest.raises(UserError):
        April(**wrong)

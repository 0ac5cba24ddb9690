"""The closed form of vision transformers: the position embedding's gradient tells every token's gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Knowledge, NotApplicable, Observation, Recovery, UserError, register

POSITION, PROJECTION, ATTENTION = "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"


@register("april", version=1)
class April(Attack):
    """APRIL, closed form: patches of one image from linear equations in a vision transformer's gradients.

    A learnable position embedding is added to the tokens, so its gradient for one example is that of every token,
    A (tokens, d). The paper solves A^T z = Wq^T gWq + Wk^T gWk + Wv^T gWv for the tokens z that enter the first block
    and inverts the patch projection. That holds only where A is what attention alone passes back: in the paper's
    encoder, whose first block has neither a norm before attention nor a skip around it. Usual nets have both, and on
    them it gives nothing (5 dB on CIFAR-10).

    What holds whatever the blocks do is the same step at the layer before: the projection W (d, pixels) gets the
    gradient A^T P from the patches P, so A^T P = gW. This is the default. It determines P where A has full rank, which
    a pre-norm net allows for at most d - 1 patches, since its tokens' gradients sum to zero over features. Of several
    solutions the one closest to the mean pixel is taken.

    Sees: gradients of position embedding, patch projection and the first block's queries, keys and values, or their
    change over local steps (the default is exact for plain SGD; the learning rate may be unknown); one example.

    A re-implementation: the attention equations are those of `breaching`'s code, the default ones are chosen here.

    Args:
        equations: ``projection``, or ``attention`` as in the paper.
        cutoff: Singular values of A below this share of the largest count as zero. More of them against noise.

    Reference: Lu, Zhang, Zhao, He, Cheng, "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers",
    CVPR 2022, arXiv 2112.14087
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    needs = frozenset({"weights", "single_example"})
    reads = (POSITION, PROJECTION, ATTENTION)

    def __init__(self, *, equations: str = "projection", cutoff: float = 1e-6) -> None:
        if equations not in ("projection", "attention"):
            raise UserError(f"april: equations: expected projection or attention, got {equations!r}")
        if not 0 <= cutoff < 1:
            raise UserError(f"april: cutoff: expected 0 <= cutoff < 1, got {cutoff}; write april(cutoff=1e-6)")
        self.equations = equations
        self.cutoff = cutoff

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline nets that are no vision transformers with a learnable position embedding."""
        weights = knowledge.model.parameters
        missing = [name for name in self.reads if name not in weights]
        if missing:
            raise NotApplicable(f"no vision transformer as in timm: it has no parameter {missing[0]!r}")
        projection = _projection(knowledge)
        if projection.kernel_size != projection.stride or projection.padding != (0, 0):
            raise NotApplicable("the patches overlap or are padded")
        if not isinstance(getattr(_module(knowledge, "patch_embed"), "norm", nn.Identity()), nn.Identity):
            raise NotApplicable("patches are normalised before the position embedding is added")
        rows = weights[POSITION].shape[2] if weights[POSITION].dim() == 4 else 0
        if rows < _patches(knowledge):
            raise NotApplicable("no position embedding (1, tokens, d) with one for each patch")
        if self.equations == "attention" and rows == _patches(knowledge) and "cls_token" in weights:
            raise NotApplicable("the class token has no position embedding")
        return {}

    def run(self, observation: Observation) -> Recovery:
        """Solve for the patches of all trials together and lay them out as (T, 1, *input_shape)."""
        start = {name: value.double() for name, value in observation.model.parameters.items() if name in self.reads}
        sent = self._sent(observation)
        tokens, count = sent[POSITION][:, 0], _patches(observation)
        projection = _projection(observation)
        if self.equations == "projection":
            patches = self._solve(tokens[:, -count:], sent[PROJECTION].flatten(2))
        else:
            z = self._solve(tokens, start[ATTENTION].mT @ sent[ATTENTION])
            embedded = (z - start[POSITION][:, 0])[:, -count:]
            if projection.bias is not None:
                embedded = embedded - observation.model.parameters["patch_embed.proj.bias"][:, None]
            patches = embedded @ torch.linalg.pinv(start[PROJECTION].flatten(2)).mT
        size = observation.input_spec.shape[1:]
        images = F.fold(patches.mT, size, projection.kernel_size, stride=projection.stride)
        low, high = (bound.to(images) for bound in observation.bounds)
        return Recovery(inputs=images.clamp(low, high)[:, None], model_evaluations=0)

    def _sent(self, observation: Observation) -> dict[str, Tensor]:
        """Return the update in the direction of the gradient, scaled to token gradients of at most 1, in float64."""
        sent = {name: value.double() for name, value in observation.difference(observation.update).items()}
        # An update of zeros becomes NaN here, and zeros again.
        size = sent[POSITION].flatten(1).abs().amax(1)
        return {n: (v / size.view(-1, *(1,) * (v.dim() - 1))).nan_to_num(0, 0, 0) for n, v in sent.items()}

    def _solve(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Return the smallest of the X (T, n, p) of least |A^T X - target|, for A (T, n, d), target (T, d, p)."""
        inverse: Tensor = torch.linalg.pinv(tokens.mT, rtol=self.cutoff)
        return inverse @ target.clamp(-1e30, 1e30)


def _module(knowledge: Knowledge, name: str) -> nn.Module:
    return knowledge.model.module.get_submodule(name)


def _projection(knowledge: Knowledge) -> nn.Conv2d:
    projection = _module(knowledge, "patch_embed.proj")
    if not isinstance(projection, nn.Conv2d):
        raise NotApplicable("patches are not projected by a convolution")
    return projection


def _patches(knowledge: Knowledge) -> int:
    """Return the number of patches."""
    (height, width), (down, right) = knowledge.input_spec.shape[1:], _projection(knowledge).stride
    return (height // down) * (width // right)

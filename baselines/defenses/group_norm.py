"""GroupNorm instead of BatchNorm."""

from __future__ import annotations

from torch import nn

from leakbench import Defense, UserError, register

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@register("group_norm", version=1)
class GroupNorm(Defense):
    """GroupNorm: replaces every BatchNorm layer before the net is trained.

    A client then has no batch statistics to send or to be inverted with, in return for gradients in which examples do
    not mix. A layer gets the greatest number of groups up to ``groups`` that divides its channels and leaves two to
    each; after a dense layer it is one group, as a group of few values keeps little but their signs. Initial scales and
    shifts are those of the BatchNorm layer. Nets without BatchNorm stay as they are.

    Acts on: the model.

    Args:
        groups: Most groups of a layer.

    Reference: Wu, He, "Group Normalization", ECCV 2018, arXiv 1803.08494
    """

    acts_on = frozenset({"model"})
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, groups: int = 32) -> None:
        if groups < 1:
            raise UserError(f"group_norm: groups: expected at least 1, got {groups}; write group_norm(groups=32)")
        self.groups = groups

    def model(self, model: nn.Module) -> nn.Module:
        """Replace the layers inside ``model``."""
        for name, child in model.named_children():
            setattr(model, name, self._replaced(child) if isinstance(child, BATCH_NORMS) else self.model(child))
        return model

    def _replaced(self, layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> nn.Module:
        channels = layer.num_features
        most = 1 if isinstance(layer, nn.BatchNorm1d) else max(min(self.groups, channels // 2), 1)
        groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        norm = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
        norm.weight, norm.bias = layer.weight, layer.bias
        # timm's BatchNorm layers hold the activation that follows.
        after = [getattr(layer, part, None) for part in ("drop", "act")]
        held = [part for part in after if isinstance(part, nn.Module)]
        return nn.Sequential(norm, *held) if held else norm

"""Distances in the features of a trained net: LPIPS, and one that needs nothing but leakbench's own checkpoints."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from leakbench.federation.inputs import normalised
from leakbench.models.functional import Model
from leakbench.tasks import InputSpec

LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
"""torchvision's file of AlexNet's ImageNet weights; its name ends in the first digits of its sha256."""

LPIPS_SMALLEST = 31
"""Fewest pixels a side for which AlexNet's third stage is not empty."""


def lpips(matched: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Return LPIPS (AlexNet, inputs scaled to [-1, 1], grey images as three equal channels) of every image.

    Args:
        matched: (T, N, channels, height, width) intensities in the order of ``true``.
        true: The same shape.

    Returns:
        ``lpips`` (T, N) float64; nothing where the images are too small or the weights are not at hand.

    Source: Zhang et al. 2018, arXiv 1801.03924.
    """
    channels, *size = true.shape[2:]
    if channels not in (1, 3) or min(size) < LPIPS_SMALLEST or (net := _lpips_net()) is None:
        return {}
    values = []
    # One trial at a time, as everywhere: convolutions of a larger batch may round differently.
    with torch.no_grad():
        for pair in zip(matched, true, strict=True):
            a, b = (2 * images.float().cpu().expand(-1, 3, -1, -1) - 1 for images in pair)
            values.append(net(a, b).flatten().double())
    return {"lpips": torch.stack(values)}


@cache
def _lpips_net() -> nn.Module | None:
    """Return the net if torchvision's download of AlexNet is in torch's cache; nothing is ever downloaded."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
    from torchvision.models import AlexNet_Weights  # not before it is needed: seconds

    expected = Path(LPIPS_BACKBONE).stem.rpartition("-")[2]
    if not digest.startswith(expected) or not str(AlexNet_Weights.IMAGENET1K_V1.url).endswith(f"/{LPIPS_BACKBONE}"):
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.eval()


@dataclass(frozen=True)
class FeatureDistance:
    """Distance between what the last layer of a trained net gets from two images.

    Args:
        model: The net, with the weights of one draw (M = 1).
        spec: What its inputs are.
        normalise: Whether it was trained on normalised inputs.
    """

    model: Model
    spec: InputSpec
    normalise: bool

    def __call__(self, matched: Tensor, true: Tensor) -> dict[str, Tensor]:
        """Return ``feature_distance`` (T, N) float64: 1 - cosine, of intensities (T, N, *shape)."""
        values = []
        with torch.no_grad():
            for a, b in zip(matched, true, strict=True):  # one trial at a time, as above
                inputs = normalised(torch.cat([a, b]).float(), self.spec, self.normalise)
                recovered, wanted = self.model.features(inputs[None])[0].double().chunk(2)
                values.append((1 - cosine_similarity(recovered, wanted, dim=1)).clamp(min=0))
        return {"feature_distance": torch.stack(values)}

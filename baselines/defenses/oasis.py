"""OASIS: a batch enlarged by its own transforms."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, UserError, register

TRANSFORMS = ("major_rotation", "minor_rotation", "shearing", "flip")
MINOR_DEGREES = (15.0, 30.0, 45.0)
SHEARS = (0.3, 0.6)


@register("oasis", version=1)
class Oasis(Defense):
    """OASIS: trains on every image together with transforms of it, labels repeated.

    Against a malicious server that reads single inputs out of the gradients of planted neurons (imprint layers, trap
    weights): where an image and its transforms activate the same neurons, a quotient of gradients returns their
    mixture. That is so for measures that the transforms leave unchanged, such as the mean brightness, and less so for
    others (``robbing_the_fed(measure='random')``). Everywhere else it is just a larger batch, (1 + #transforms) * B,
    and so many times the work.

    Acts on: the local batch; originals first, then one block of B per transform.

    Args:
        transforms: One or several, joined by ``+``: ``major_rotation`` (by 90, 180 and 270 degrees; square images
            only), ``minor_rotation`` (15, 30, 45 degrees), ``shearing`` (horizontally, by .3 and .6 of the height),
            ``flip`` (horizontal).

    A re-implementation: of the paper only the summary was at hand, which names the families; angles of minor rotations
    and shears are ours. What comes in from outside the image repeats its border, which needs no knowledge of how inputs
    are normalised and keeps their brightness about as it is.

    Reference: Jeter, Nguyen, Alharbi, Thai, "OASIS: Offsetting Active Reconstruction Attacks in Federated Learning",
    ICDCS 2024, arXiv 2311.13739
    """

    acts_on = frozenset({"batch"})
    likelihood = "simulated"
    adaptive = (
        "bayes_adaptive",
        "learning_to_invert",
        "learned_labels",
        "oasis_inversion",
        "robbing_the_fed",
        "curious_abandon_honesty",
    )

    def __init__(self, *, transforms: str = "major_rotation") -> None:
        names = transforms.split("+")
        wrong = [name for name in names if name not in TRANSFORMS]
        if wrong or len(set(names)) < len(names):
            raise UserError(
                f"oasis: transforms: expected some of {', '.join(TRANSFORMS)}, each once and joined by +, got "
                f"{transforms!r}; write oasis(transforms='major_rotation+shearing')"
            )
        self.transforms = transforms

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Append the transforms.

        Raises:
            UserError: Inputs are no images, or not square where they would be turned by 90 degrees.
        """
        if inputs.dim() != 5:
            raise UserError(f"oasis: expected images (channels, height, width), got {tuple(inputs.shape[2:])}")
        parts = [inputs]
        for name in self.transforms.split("+"):
            parts += _transformed(inputs, name)
        return torch.cat(parts, 1), torch.cat([labels] * len(parts), 1)


def _transformed(images: Tensor, name: str) -> list[Tensor]:
    """Return what a transform makes of images (T, B, C, H, W), one tensor for each of its strengths."""
    if name == "flip":
        return [images.flip(-1)]
    if name == "major_rotation":
        if images.shape[-1] != images.shape[-2]:
            raise UserError(f"oasis: major_rotation: expected square images, got {tuple(images.shape[2:])}; write flip")
        return [images.rot90(turns, (-2, -1)) for turns in (1, 2, 3)]
    if name == "shearing":
        return [_affine(images, 1.0, shear, 0.0) for shear in SHEARS]
    radians = [math.radians(angle) for angle in MINOR_DEGREES]
    return [_affine(images, math.cos(angle), -math.sin(angle), math.sin(angle)) for angle in radians]


def _affine(images: Tensor, straight: float, down: float, across: float) -> Tensor:
    """Return images whose pixel (x, y) from the center is the old one at (straight x + down y, across x + straight y).

    Bilinear; what lies outside is the nearest pixel of the border.
    """
    flat = images.flatten(0, 1)
    aspect = flat.shape[-2] / flat.shape[-1]  # the grid's coordinates run from -1 to 1 both ways
    matrix = flat.new_tensor([[straight, down * aspect, 0.0], [across / aspect, straight, 0.0]])
    grid = F.affine_grid(matrix.expand(len(flat), 2, 3), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, padding_mode="border", align_corners=False).reshape(images.shape)

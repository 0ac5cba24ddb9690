"""ATS: images trained on after transforms that were searched for hiding them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Defense, DefenseContext, UserError, register

LARGEST = {"translate_x": 150 / 331, "translate_y": 150 / 331, "contrast": 0.5, "brightness": 0.5, "sharpness": 0.5}
"""Magnitude at index 9 of 0 to 9: a share of the side, or how far the factor is from 1."""
POOL = {
    1: (0.2, "contrast", 6),
    3: (0.3, "translate_x", 9),
    4: (0.8, "sharpness", 1),
    7: (0.7, "translate_y", 2),
    13: (0.6, "brightness", 5),
    15: (0.7, "brightness", 9),
    18: (0.6, "contrast", 7),
    21: (0.5, "translate_x", 5),
    43: (0.7, "translate_y", 3),
}
"""The transforms that published policies use, by their number: probability, operation and index of the magnitude."""
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Step:
    """One transform of a policy.

    Args:
        operation: Its name.
        magnitude: How far, either way.
        probability: That it happens.
    """

    operation: str
    magnitude: float
    probability: float


@register("ats", version=1)
class ATS(Defense):
    """ATS: trains on every image after one of a few searched policies, picked at random for each image.

    A policy is a sequence of transforms by their numbers in the paper's pool, each of a fixed magnitude and a random
    direction: ``3-1-7`` and ``43-18-18`` were found for CIFAR-100, and the two together are its hybrid;
    ``21-13-3+7-4-15`` is used for CIFAR-10. They move images (by up to .45 of the side, black coming in) and change
    their brightness, contrast and sharpness; what leaks is compared with the image before.

    Acts on: the inputs of the local batch, which must be images.

    Args:
        policies: Numbers joined by ``-``, policies joined by ``+``.
        always: Whether every transform of a policy happens. The pool has a probability for each, which the released
            code's SubPolicy takes as p1 and never stores; false asks it.

    Differs from the released code: values are not rounded to 256 levels, so that an attack can differentiate through
    it, and no random crops and flips come first.

    Reference: Gao, Guo, Zhang, Qiu, Wen, Liu, "Privacy-preserving Collaborative Learning with Automatic Transformation
    Search", CVPR 2021, arXiv 2011.12505
    """

    acts_on = frozenset({"batch"})
    draws = "the policy of every image, and the direction of its transforms"
    likelihood = "simulated"
    adaptive = ("ats_inversion", "bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, policies: str = "3-1-7+43-18-18", always: bool = True) -> None:
        self.policies = policies
        self.always = always
        self.steps = parse_policies(policies, always=always)

    def batch(self, inputs: Tensor, labels: Tensor, ctx: DefenseContext) -> tuple[Tensor, Tensor]:
        """Transform the images.

        Raises:
            UserError: Inputs are no images.
        """
        if inputs.dim() != 5:
            raise UserError(f"ats: expected images (C, H, W), got inputs {tuple(inputs.shape[2:])}")
        low, high = (bound.to(inputs) for bound in ctx.bounds)
        pixels = (inputs - low) / (high - low)
        longest = max(map(len, self.steps))
        draws = ctx.random.rand(inputs.shape[1], 1 + 2 * longest)
        picked = (draws[..., 0] * len(self.steps)).long()
        for index, steps in enumerate(self.steps):
            for place, step in enumerate(steps):
                happens, way = draws[..., 1 + 2 * place], draws[..., 2 + 2 * place]
                amount = step.magnitude * ((way < 0.5).to(pixels.dtype) * 2 - 1)
                mask = (picked == index) & (happens < step.probability)
                pixels = transformed(pixels, step.operation, amount).where(_wide(mask), pixels)
        return low + (high - low) * pixels, labels


def parse_policies(policies: str, *, always: bool) -> tuple[tuple[Step, ...], ...]:
    """Return the steps of every policy.

    Raises:
        UserError: The text is not numbers joined by ``-``, or one has no known transform.
    """
    parsed = []
    for policy in policies.split("+"):
        numbers = [int(part) if part.isdecimal() else -1 for part in policy.split("-")]
        if not set(numbers) <= POOL.keys():
            raise UserError(
                f"ats: policies: expected numbers out of {', '.join(map(str, POOL))}, joined by - and policies by +, "
                f"got {policies!r}; write ats(policies='3-1-7+43-18-18')"
            )
        chosen = [POOL[number] for number in numbers]
        parsed.append(tuple(Step(name, LARGEST[name] * index / 9, 1.0 if always else p) for p, name, index in chosen))
    return tuple(parsed)


def transformed(pixels: Tensor, operation: str, amount: Tensor) -> Tensor:
    """Return images (T, B, C, H, W) in [0, 1] after an operation, as far and in the direction of ``amount`` (T, B)."""
    if operation == "translate_x":
        return shifted(pixels, offsets(amount, pixels.shape[-1]))[0]
    if operation == "translate_y":
        return shifted(pixels.mT, offsets(amount, pixels.shape[-2]))[0].mT
    factor = _wide(1 + amount)
    if operation == "brightness":
        return (factor * pixels).clamp(0, 1)
    middle = brightness_of(pixels) if operation == "contrast" else smooth(pixels)
    return (middle + factor * (pixels - middle)).clamp(0, 1)


def offsets(amount: Tensor, side: int) -> Tensor:
    """Return whole pixels (T, B) for shares of the side, rounded as nearest sampling does."""
    return (amount * side + 0.5).floor().long()


def shifted(pixels: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return images whose column x is the old one at x + offset (T, B), black where there is none, and where it is."""
    side = pixels.shape[-1]
    column = torch.arange(side, device=pixels.device) + offset[..., None]
    inside = ((column >= 0) & (column < side))[..., None, None, :].expand_as(pixels)
    source = column.clamp(0, side - 1)[..., None, None, :].expand_as(pixels)
    return pixels.gather(-1, source) * inside, inside


def brightness_of(pixels: Tensor) -> Tensor:
    """Return the mean grey value of images (T, B, C, H, W) as (T, B, 1, 1, 1)."""
    weights = GREY if pixels.shape[2] == 3 else (1 / pixels.shape[2],) * pixels.shape[2]
    grey = (pixels * pixels.new_tensor(weights)[:, None, None]).sum(2, keepdim=True)
    return grey.mean((2, 3, 4), keepdim=True)


def smooth(pixels: Tensor) -> Tensor:
    """Return images blurred by a kernel of 3 with weight 5 of 13 in the middle; the border stays."""
    flat = pixels.flatten(0, 1)
    kernel = flat.new_ones(3, 3)
    kernel[1, 1] = 5
    each = (kernel / kernel.sum()).expand(flat.shape[1], 1, 3, 3)
    if min(flat.shape[-2:]) < 3:
        return pixels
    inner = F.conv2d(flat, each, groups=flat.shape[1])
    blurred = flat.clone()
    blurred[..., 1:-1, 1:-1] = inner
    return blurred.view_as(pixels)


def _wide(values: Tensor) -> Tensor:
    return values[..., None, None, None]

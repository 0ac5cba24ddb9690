"""Quantisation of the update to half precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def box_fit(sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], half: Mapping[str, Tensor]) -> Tensor:
    """Return -1/2 times the sum of squares of how far ``clean`` is outside of ``sent`` -+ ``half``, in ``half``s, (T,).

    All values inside are as likely, as after rounding; outside the slope is finite, so that candidates find inside.
    """
    each = []
    for name, value in sent.items():
        width = torch.where(half[name] > 0, half[name], torch.finfo(value.dtype).tiny)
        away = (clean[name] - value).abs() / width
        each.append(-(away - 1).clamp(min=0).square().flatten(1).sum(1) / 2)
    return torch.stack(each).sum(0)


@register("fp16", version=1)
class FP16(Defense):
    """Fp16: sends 16-bit floating-point numbers. A control: nobody expects it to protect.

    What is too large for the format is sent as its greatest number.

    Acts on: the update, each coordinate by itself.

    Args:
        form: ``float16``, 11 significant bits and a smallest magnitude of 6e-8, or ``bfloat16``, 8 significant bits and
            the range of float32.

    Reference: Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019, arXiv 1906.08935
    """

    acts_on = frozenset({"update"})
    likelihood = "surrogate"
    adaptive = ("bayes_adaptive", "learning_to_invert", "learned_labels")

    def __init__(self, *, form: str = "float16") -> None:
        if form not in FORMATS:
            raise UserError(f"fp16: form: expected 'float16' or 'bfloat16', got {form!r}; write fp16(form='float16')")
        self.form = form

    @property
    def tensorwise(self) -> bool:
        """Always: no coordinate depends on another."""
        return True

    def update(self, update: dict[str, Tensor], ctx: DefenseContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Round."""
        form = FORMATS[self.form]
        most = torch.finfo(form).max
        return {name: value.clamp(-most, most).to(form).to(value.dtype) for name, value in update.items()}

    def log_likelihood(self, sent: Mapping[str, Tensor], clean: Mapping[str, Tensor], ctx: DefenseContext) -> Tensor:  # noqa: ARG002
        """Return a surrogate (T,): `box_fit` to the values that are rounded to what was sent."""
        form = torch.finfo(FORMATS[self.form])
        least = form.smallest_normal * form.eps
        half = {name: (value.abs() * form.eps).clamp(min=least) / 2 for name, value in sent.items()}
        return box_fit(sent, {name: clean[name].clamp(form.min, form.max) for name in sent}, half)

"""Quantisation of the update to half precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from leakbench_baselines.defenses.clip_l2 import nearness
from torch import Tensor

from leakbench import Defense, DefenseContext, UserError, register

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
        """Return a surrogate (T,): `nearness` of ``clean`` to the values that are rounded to what was sent."""
        form = torch.finfo(FORMATS[self.form])
        excess = {}
        for name, value in sent.items():
            half = (value.abs() * form.eps).clamp(min=form.smallest_normal * form.eps) / 2
            excess[name] = ((clean[name].clamp(form.min, form.max) - value).abs() - half).clamp(min=0)
        score: Tensor = nearness(sent, excess)
        return score

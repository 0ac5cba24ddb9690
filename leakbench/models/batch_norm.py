"""BatchNorm whose running statistics are ordinary state, so that it works under torch.func transforms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm


class ExplicitBatchNorm(nn.Module):
    """A BatchNorm layer that replaces its running statistics instead of writing into them.

    Under ``torch.func.functional_call`` the replaced values come back in the dictionary of state that was passed in,
    and nothing else changes; PyTorch's own layer writes in place, which ``vmap`` refuses.

    Args:
        layer: The layer to take over; parameter and buffer names stay the same. Dropout and activation of timm's
            fused layers (``drop``, ``act``) stay attached.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.eps = layer.eps
        self.momentum = layer.momentum
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(layer, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))
        extra = [getattr(layer, name) for name in ("drop", "act") if isinstance(getattr(layer, name, None), nn.Module)]
        self.after = nn.Sequential(*extra)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (B, C, *) with batch statistics in training mode, else with the running ones."""
        batch_statistics = self.training or self.running_mean is None or self.running_var is None
        if batch_statistics:
            # Without running statistics nothing is written in place. PyTorch also refuses one value per channel here.
            outputs = F.batch_norm(inputs, None, None, self.weight, self.bias, True, 0.0, self.eps)
            self._track(inputs.detach())
        else:
            outputs = F.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return self.after(outputs)  # type: ignore[no-any-return]

    def _track(self, inputs: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None  # noqa: S101 - the three come together
        self.num_batches_tracked = self.num_batches_tracked + 1
        factor = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        dims = [d for d in range(inputs.dim()) if d != 1]
        variance, mean = torch.var_mean(inputs, dim=dims)
        self.running_mean = self.running_mean + factor * (mean - self.running_mean)
        self.running_var = self.running_var + factor * (variance - self.running_var)


def explicit_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm layer inside ``module`` by an `ExplicitBatchNorm` and return ``module``."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, ExplicitBatchNorm(child))
        else:
            explicit_batch_norm(child)
    return module

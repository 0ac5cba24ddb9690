"""LOKI: kernels of its own lead every client into its own columns of an imprint module, through any aggregation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from leakbench_baselines.attacks.robbing_the_fed import SURE, best_rows, bin_edges
from torch import Tensor

from leakbench import Attack, Cohort, Knowledge, Model, Observation, Recovery, UserError, register


@register("loki", version=1)
class Loki(Attack):
    """LOKI: client-specific convolutions keep the clients of a secure aggregate apart, bins keep their images apart.

    A convolution with C channels per client and a dense layer are inserted in front of the net. The dense layer is the
    same for all: its rows measure brightness and are clamped to bins of equal mass, as in `robbing_the_fed`. The
    kernels of a client are zero but for its own channels, which copy the image times `scale`, so that it moves only its
    own columns of the dense layer, and the sum over clients is read client by client. The more `scale` exceeds 1, the
    more an image's first local step moves its row: no later image enters the bin, and several local steps do no harm.

    The bias gradient, which turns a weight gradient into an image, is summed over the clients. It is used where the
    image it gives has a brightness of that bin, which tells that the bin is of one client alone; elsewhere the bin's
    middle is taken for the image's brightness, which is right up to the bin's width.

    Sees: gradients of the inserted layers' dense part, or its change over local steps (at any learning rate); number of
    inputs per client; auxiliary inputs, for the distribution of brightness. Claims come client by client. Every client
    holds and sends K * C * H * W * bins numbers (100 clients, CIFAR-10, 256 bins: 315 MB in float32).

    A re-implementation after the authors' description and a public notebook for it. From there: identity kernels, the
    same dense rows for all clients, clamped bins, 4 bins per image of a batch of 64, `scale` 500. Chosen here: one
    number is added to the input, where there a second dense layer replaces it; the kernels are 1x1, since all other
    entries are zero; images are scaled by the bias gradient or the bin's middle, where there each is stretched to 0..1.

    Args:
        bins: Rows, which all clients share.
        scale: Convolutional scaling factor: of the kernels, while the dense weights are divided by it.

    Reference: Zhao, Sharma, Elkordy, Ezzeldin, Avestimehr, Bagchi, "LOKI: Large-scale Data Reconstruction Attack
    against Federated Learning through Model Manipulation", IEEE S&P 2024, arXiv 2303.12233
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    inserts = "imprint_conv"
    needs = frozenset({"auxiliary", "batch_size", "weights", "change_parameters", "change_architecture", "per_client"})
    reads = ("imprint.weight", "imprint.bias")

    def __init__(self, *, bins: int = 256, scale: float = 500.0) -> None:
        if bins < 1 or not 0 < scale < math.inf:
            raise UserError(f"loki: expected bins >= 1 and scale > 0, got {bins}, {scale}; write loki(bins=256)")
        self.bins = bins
        self.scale = scale

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Choose the bins' ``edges`` (bins + 1,) of pixels in 0..1, averaged by ``probe`` (d,)."""
        low, high = knowledge.bounds
        auxiliary = ((knowledge.auxiliary[0] - low) / (high - low)).flatten(1).double()
        probe = torch.full_like(auxiliary[0], 1 / auxiliary.shape[1])
        edges = bin_edges(auxiliary @ probe, self.bins, torch.tensor([0.0, 1.0]).to(probe))
        return {"probe": probe, "edges": edges, "mean": auxiliary.mean(0)}

    def plant(
        self,
        model: Model,  # noqa: ARG002
        cohort: Cohort,
        history: Sequence[Mapping[str, Tensor]],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Give client k the kernels that copy an image into its own channels; all get the same dense layer."""
        probe, edges = cohort.prepared["probe"], cohort.prepared["edges"]
        clients, channels = cohort.clients, cohort.input_spec.shape[0]
        low, high = (bound.double().flatten().expand(channels) for bound in cohort.bounds)
        kernel = probe.new_zeros(clients, clients, channels, channels)
        offset = probe.new_zeros(clients, clients, channels)
        own = torch.arange(clients)
        kernel[own, own] = torch.diag(self.scale / (high - low)).to(kernel)
        offset[own, own] = (-self.scale * low / (high - low)).to(offset)
        slope = 1 / (edges[1:] - edges[:-1])
        planted = {
            "imprint.kernel": kernel.flatten(1, 2),
            "imprint.offset": offset.flatten(1),
            "imprint.weight": (slope[:, None] * probe / self.scale).repeat(1, clients)[None],
            "imprint.bias": (-slope * edges[:-1])[None],
            "imprint.out": torch.full_like(slope, 1 / self.bins)[None],
        }
        return {name: value.to(cohort.model.dtype) for name, value in planted.items()}

    def run(self, observation: Observation) -> Recovery:
        """Claim what the bins of every client give, client after client, (T, K * N, *input_shape)."""
        # All clients got the same dense layer, which is not that of the honest model.
        difference = observation.difference(observation.update, model=observation.client_model(0))
        weight = difference["imprint.weight"]
        weight = weight.view(*weight.shape[:2], observation.clients, -1)
        bias = difference["imprint.bias"].double()
        prepared, (low, high) = observation.prepared, observation.bounds
        found, certain = [], []
        for k, count in enumerate(observation.client_sizes.tolist()):  # in float64, a client's columns at a time
            pixels = weight[:, :, k].double() / self.scale
            size = self._sizes(pixels @ prepared["probe"], bias, prepared["edges"])
            rows = pixels / size.where(size != 0, 1)[..., None]
            bounds = (torch.zeros_like(prepared["mean"]), torch.ones_like(prepared["mean"]))
            best, doubt = best_rows(rows, size, prepared, bounds, count)
            found.append(best)
            certain.append((doubt <= SURE).double().sum(1))
        images = torch.cat(found, 1).view(len(bias), -1, *observation.input_spec.shape)
        claimed = (low + (high - low) * images).clamp(low, high)
        return Recovery(inputs=claimed, model_evaluations=0, notes={"found": torch.stack(certain).sum(0)})

    def _sizes(self, measured: Tensor, bias: Tensor, edges: Tensor) -> Tensor:
        """Return how much each bin's image weighs in the gradient, (T, bins): see the class."""
        brightness = measured / bias.where(bias != 0, 1)
        alone = (bias != 0) & (brightness >= edges[:-1]) & (brightness <= edges[1:])
        return torch.where(alone, bias, 2 * measured / (edges[1:] + edges[:-1]))

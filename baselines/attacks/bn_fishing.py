"""Fishing models of "Breaking Secure Aggregation": one preset BatchNorm layer per client tells the clients apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import scipy.linalg
import torch
from leakbench_baselines.attacks.bias_count import round_to_total
from leakbench_baselines.attacks.random_image import uniform_pixels
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leakbench import Attack, Cohort, Knowledge, Model, NotApplicable, Observation, Recovery, UserError, register

PLANT = "plant/"
DESIGNS = ("auto", "blocks", "selected")
DUMMIES = 2
"""Inputs of a planted net whose embedding does not depend on them; BatchNorm takes no batch of one."""
SAMPLED = 64
"""Inputs that estimate the mean embedding where the scale is not 0."""
SAME = 1e-3
"""Greatest relative spread of features that count as equal: later BatchNorms blow rounding errors up."""
MARGIN = 4
"""Scales by which other clients' channels lie below 0: normalised activations are rarely beyond 4."""
SPREADS = (3.0, 1.0)
"""Size of the shifts for one local step, and for several. Shifts of 1 leave a unit of LeNet-5's last layer dead for all
clients (rank 83 of 84 on CIFAR-10), of 3 none. With two steps (mlp, 10 clients, lr .01) 1 is exact, 3 for 5% only."""
FLOOR = 1e-2
"""Singular value, for rows of length 1, of a direction that counts as half determined."""
ENOUGH = 0.99


@register("bn_fishing", version=1)
class BNFishing(Attack):
    """BN fishing: presets one BatchNorm layer per client and solves a linear system for each client's label counts.

    A BatchNorm layer of scale 0 and shift beta_k passes beta_k on whatever the input is. All examples of client k then
    have one embedding e_k and one softmax p_k, which the server computes beforehand, and its last-layer gradients are
    (p_k - n_k / N_k) e_k and p_k - n_k / N_k. Under secure aggregation the server sees their weighted sums: for each
    class d + 1 equations (d without a bias) in K unknowns. Up to K = d + 1 clients counts are exact; beyond, the
    solution of least norm is taken. The note ``rank`` tells.

    Sees: gradient of the last layer's weight and bias; weights, batch sizes; learning rate and local steps unless a
    gradient is sent. Exact for one local step, approximate for more: the embeddings move apart while training.

    A re-implementation from the paper's abstract, which alone was at hand: the preset, where it goes, the choice of the
    shifts and the rounding are choices made here.

    Args:
        layer: Name of the BatchNorm layer, or ``auto``: the last one if no path leads around it, else the first one for
            which this holds (of ResNets the stem's).
        scale: Preset scale. 0 is exact and plain to see; for a small one, embeddings are means over auxiliary inputs
            where they are granted, else over random ones.
        design: ``blocks``: every client has channels of its own, which is best where they are the embedding.
            ``selected``: those of random shifts whose embeddings depend the least on each other. ``auto``:
            blocks if these determine nearly every client, else the better of the two; always blocks where every trial
            has weights of its own, because one set of shifts serves all trials.
        spread: Size of the shifts. None: 3, or 1 where clients take several local steps.
        pool: Random shifts per client to select from.

    Reference: Wang, Chang, Hu, Pang, Du, Chen, Ren, "Breaking Secure Aggregation: Label Leakage from Aggregated
    Gradients in Federated Learning", INFOCOM 2024, arXiv 2406.15731
    """

    recovers = frozenset({"labels"})
    needs = frozenset({"batch_size", "change_parameters", "per_client", "weights"})
    reads = ("head.weight", "head.bias")

    def __init__(
        self,
        *,
        layer: str = "auto",
        scale: float = 0.0,
        design: str = "auto",
        spread: float | None = None,
        pool: int = 2,
    ) -> None:
        if design not in DESIGNS:
            raise UserError(f"bn_fishing: design: expected {', '.join(DESIGNS)}, got {design!r}; write design='auto'")
        if scale < 0:
            raise UserError(f"bn_fishing: scale: expected at least 0, got {scale}; write bn_fishing(scale=0.0)")
        if spread is not None and spread <= 0:
            raise UserError(f"bn_fishing: spread: expected above 0, got {spread}; write bn_fishing(spread=3.0)")
        if pool < 1:
            raise UserError(f"bn_fishing: pool: expected at least 1, got {pool}; write bn_fishing(pool=2)")
        self.layer = layer
        self.scale = scale
        self.design = design
        self.spread = spread
        self.pool = pool

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Choose layer and shifts, and compute ``embeddings`` (M, K, d) and ``probabilities`` (M, K, C) of the clients.

        Raises:
            NotApplicable: There is no such layer, or the shifts would depend on the weights, of which each trial has
                its own.
        """
        if not knowledge.grants("per_client") or not knowledge.grants("change_parameters"):
            raise NotApplicable("bn_fishing: sends each client its own model; grant change_parameters, per_client")
        if knowledge.sends != "gradient":
            knowledge.lr, knowledge.local_steps  # noqa: B018 - without them there is no gradient
        model = knowledge.model
        layer = self._layer(knowledge)
        inputs = self._inputs(knowledge)
        channels = model.parameters[f"{layer}.bias"].shape[1]
        shifts = self._blocks(knowledge, channels)
        if self.design == "selected" and model.draws > 1:
            raise NotApplicable("bn_fishing: design selected chooses by one model's weights; use model_draws: one")
        if model.draws > 1:
            seen = self._embed(knowledge, layer, shifts, inputs)
        else:
            shifts, seen = self._chosen(knowledge, layer, shifts, inputs)
        scales = torch.full_like(shifts, self.scale)
        planted = {f"{PLANT}{layer}.weight": scales, f"{PLANT}{layer}.bias": shifts}
        return {name: value.to(model.device, model.dtype) for name, value in planted.items()} | seen

    def plant(
        self,
        model: Model,  # noqa: ARG002
        cohort: Cohort,
        history: Sequence[Mapping[str, Tensor]],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Preset scales and shifts (K, channels)."""
        return {k.removeprefix(PLANT): v for k, v in cohort.prepared.items() if k.startswith(PLANT)}

    def run(self, observation: Observation) -> Recovery:
        """Solve for label counts (T, K, C) and round them."""
        sizes = observation.client_sizes.double()
        unit = observation.client_weights.double()
        if observation.reduction == "sum":
            unit = unit * sizes / round(observation.inputs_per_client / observation.batch_size)
        known = observation.prepared["probabilities"] - 1 / observation.num_classes
        rows = _rows(observation, observation.prepared["embeddings"]) * unit[:, None]  # (M, K, d + 1)
        seen = observation.head_weight.double()
        if observation.model.has_head_bias:
            seen = torch.cat([seen, observation.head_bias.double()[..., None]], -1)
        steps = 1 if observation.sends == "gradient" else observation.local_steps
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        # The clients' arithmetic drowns what is smaller.
        kept = values > values[:, :1] * torch.finfo(observation.model.dtype).eps
        inverse = right.mT * torch.where(kept, 1 / values, 0)[:, None] @ left.mT
        excess = (known.mT @ rows - seen / steps) @ inverse  # (T, C, K): frequencies less 1 / C
        counts = (sizes[:, None] * (excess.mT + 1 / observation.num_classes)).nan_to_num(posinf=0.0, neginf=0.0)
        whole = [round_to_total(counts[:, k], size) for k, size in enumerate(observation.client_sizes.tolist())]
        smallest = torch.where(kept, values, torch.inf).amin(1)
        notes = {
            "condition": values[:, 0] / smallest,
            "rank": kept.sum(1).double(),
            "off_integer": (counts - counts.round()).abs().amax((1, 2)),
        }
        trials = observation.trials
        return Recovery(
            label_counts=torch.stack(whole, 1), notes={name: value.expand(trials) for name, value in notes.items()}
        )

    def _layer(self, knowledge: Knowledge) -> str:
        """Return the layer to preset: one after which features do not depend on the input if its scale is 0."""
        model = knowledge.model
        tracked = [name.removesuffix(".running_mean") for name in model.buffers if name.endswith(".running_mean")]
        norms = [layer for layer in tracked if f"{layer}.bias" in model.parameters]
        if self.layer != "auto":
            if self.layer not in norms:
                raise NotApplicable(f"bn_fishing: the net has no BatchNorm layer {self.layer!r}; it has {norms}")
            return self.layer
        dummies = uniform_pixels(knowledge, DUMMIES, model.dtype)
        for name in dict.fromkeys([*norms[-1:], *norms]):
            shift = torch.full_like(model.parameters[f"{name}.bias"][:1], self._spread(knowledge))
            features = _features(knowledge, name, shift, 0.0, dummies)[1]
            if bool((features - features[:, :1]).abs().amax() <= SAME * features.abs().amax()):
                return name
        raise NotApplicable("bn_fishing: needs a BatchNorm layer that no path leads around; choose another net")

    def _inputs(self, knowledge: Knowledge) -> Tensor:
        """Return inputs (M, n, *input_shape) that stand for the clients'."""
        count, dtype = DUMMIES if self.scale == 0 else SAMPLED, knowledge.model.dtype
        if self.scale and knowledge.grants("auxiliary"):
            own = knowledge.auxiliary[0][:count].to(dtype)
            return own.expand(knowledge.model.draws, *own.shape)
        pixels: Tensor = uniform_pixels(knowledge, count, dtype)
        return pixels

    def _spread(self, knowledge: Knowledge) -> float:
        several = knowledge.sends != "gradient" and knowledge.local_steps > 1
        return SPREADS[several] if self.spread is None else self.spread

    def _blocks(self, knowledge: Knowledge, channels: int) -> Tensor:
        """Return shifts (K, channels): clients have channels of their own, or share them at greater shifts."""
        clients = knowledge.clients
        client, channel = torch.arange(clients)[:, None], torch.arange(channels)
        own = (channel - client) % min(clients, channels) == 0
        return torch.where(own, self._spread(knowledge) * (1 + client // channels), -MARGIN * self.scale)

    def _chosen(
        self, knowledge: Knowledge, layer: str, blocks: Tensor, inputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the shifts (K, channels) of the wanted design, and what they give."""
        clients, channels = blocks.shape
        seen = self._embed(knowledge, layer, blocks, inputs)
        rows = _directions(knowledge, seen)
        if self.design == "blocks" or (self.design == "auto" and _determined(rows) >= ENOUGH * min(rows.shape)):
            return blocks, seen
        stream = torch.Generator().manual_seed(0)
        pool = torch.cat(
            [blocks, self._spread(knowledge) * torch.randn(self.pool * clients, channels, generator=stream)]
        )
        extra = self._embed(knowledge, layer, pool[clients:], inputs)
        both = {name: torch.cat([value, extra[name]], 1) for name, value in seen.items()}
        candidates = _directions(knowledge, both)
        order = scipy.linalg.qr(candidates.mT.cpu().numpy(), mode="r", pivoting=True)[1]
        picks = torch.from_numpy(order[:clients].copy()).long()
        if self.design == "auto" and _determined(candidates[picks]) <= _determined(rows):
            return blocks, seen
        return pool[picks], {name: value[:, picks.to(value.device)] for name, value in both.items()}

    def _embed(self, knowledge: Knowledge, layer: str, shifts: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """Return mean embeddings (M, n, d) and probabilities (M, n, C) of clients with ``shifts`` (n, channels)."""
        embeddings, probabilities = [], []
        for k, shift in enumerate(shifts):
            logits, features = _features(knowledge, layer, shift[None], self.scale, inputs)
            embeddings.append(features.double().mean(1).nan_to_num())
            probabilities.append(logits.double().softmax(-1).mean(1))
            knowledge.progress(k + 1, len(shifts))
        return {"embeddings": torch.stack(embeddings, 1), "probabilities": torch.stack(probabilities, 1)}


def _features(knowledge: Knowledge, layer: str, shift: Tensor, scale: float, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (M, n, C) and features (M, n, d) with ``layer`` preset to ``shift`` (1, channels)."""
    model = knowledge.model
    shift = shift.to(model.device, model.dtype)
    preset = {f"{layer}.weight": torch.full_like(shift, scale), f"{layer}.bias": shift}
    return knowledge.forward(inputs, model=model.with_state(parameters=preset))


def _rows(knowledge: Knowledge, embeddings: Tensor) -> Tensor:
    """Return the clients' coefficients (M, K, d + 1): their embeddings, and 1 for the bias where there is one."""
    if not knowledge.model.has_head_bias:
        return embeddings
    return torch.cat([embeddings, torch.ones_like(embeddings[..., :1])], -1)


def _directions(knowledge: Knowledge, seen: Mapping[str, Tensor]) -> Tensor:
    """Return one model's coefficients (K, d + 1), each row of length 1."""
    return F.normalize(_rows(knowledge, seen["embeddings"])[0])


def _determined(rows: Tensor) -> float:
    """Return how many clients the equations determine: directions (K, d + 1) well above the errors to expect."""
    squares = torch.linalg.svdvals(rows).square()
    return float((squares / (squares + FLOOR**2)).sum())

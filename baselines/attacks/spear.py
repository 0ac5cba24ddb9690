"""SPEAR: a whole batch, exactly, from the gradient of a dense first layer before a ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench import Attack, Knowledge, NotApplicable, Observation, Recovery, UserError, register

NEAR_ZERO = 1e-3
"""An entry this small, in units of a direction's root mean square, may be a zero of the ReLU."""
NOISE = 30
"""How many times the median of a direction's zeros, which is rounding, a zero may be."""
GAP = 4
"""How far a singular value has to stand above the first one that can only be noise."""
ALIKE, INDEPENDENT = 1 - 1e-6, 1e-3
"""Cosine from which directions are the same; distance from the span of others from which they are independent."""
REFINEMENTS = 10
SPARE = 4
"""Directions kept, in units of those wanted."""
LEAN = 12
"""How much rows that probably have many zeros are preferred in every other draw."""
ENOUGH = 0.995
"""Share of neurons explained at which the search ends."""
ROUNDING = 1000
"""What may pass for a zero, in units of the update's precision: the factorisation multiplies its rounding."""
CHUNK = 1 << 14
"""Most samples drawn between two looks at what they gave."""


def dense_first_layer(knowledge: Knowledge, *, relu: bool) -> tuple[str, str]:
    """Return the names of the weight and the bias of a dense layer that acts on the flat inputs.

    Asked of the function, not of the code: for one random input the weight's gradient is the outer product of the
    bias's gradient with the input, and with ``relu`` the bias's gradient vanishes where the layer's output is negative.

    Raises:
        NotApplicable: The model's first parameter is not of such a layer, or no ReLU follows where one is asked for.
    """
    model = knowledge.model
    weight = model.parameter_names[0]
    bias = weight.removesuffix("weight") + "bias"
    size = torch.Size(model.input_shape).numel()
    if model.parameters[weight].shape[2:] != (size,) or bias not in model.parameters or knowledge.examples_interact:
        raise NotApplicable("the first layer is not a dense one with a bias, on inputs that do not interact")
    x = knowledge.randn(1, *model.input_shape).to(model.dtype)
    label = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    at = knowledge.gradients(x, label, names=[weight, bias], create_graph=False)
    flat = x.flatten(1)
    if not torch.allclose(at[weight], at[bias][:, :, None] * flat[:, None], rtol=1e-3, atol=1e-12):
        raise NotApplicable("the first layer does not act on the flat inputs")
    z = (model.parameters[weight] @ flat[:, :, None])[..., 0] + model.parameters[bias]
    passes = at[bias] != 0
    if relu and not (bool((~passes[z < 0]).all()) and float(passes[z > 0].double().mean()) > 0.5):
        raise NotApplicable("no ReLU follows the first layer")
    return weight, bias


def first_layer_gradients(observation: Observation, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the gradients (T, m, n) and (T, m) of the first layer, up to a common positive factor, as float64."""
    difference = observation.difference(observation.update)
    weight, bias = (difference[name].double() for name in names)
    return weight, bias


@dataclass(frozen=True)
class Layer:
    """One trial: gradient and value of the layer, restricted to the rows whose gradient is not zero.

    Args:
        left: (m, b) orthonormal columns, L of the gradient L R.
        right: (b, n) the other factor, R.
        bias_gradient: (m,).
        weight: (m, n).
        bias: (m,).
        rounding: See `zeros`.
    """

    left: Tensor
    right: Tensor
    bias_gradient: Tensor
    weight: Tensor
    bias: Tensor
    rounding: float

    def invert(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (..., b, n) and the share (...) of neurons whose ReLU they explain, for bases (..., b, b).

        Column i of L Q is the gradient at the layer's output of example i up to a scale, which the bias's gradient,
        their sum over examples, tells.
        """
        basis = directions.mT
        at_output = self.left @ basis
        scale = torch.linalg.pinv(at_output) @ self.bias_gradient
        inputs = (torch.linalg.pinv(basis) @ self.right) / scale[..., None]
        inputs = inputs.nan_to_num(0.0, 0.0, 0.0)
        active = inputs @ self.weight.T + self.bias > 0
        agree = active == ~zeros(at_output.mT, self.rounding)
        return inputs, agree.double().mean((-2, -1))


def zeros(values: Tensor, rounding: float, noise: float = NOISE) -> Tensor:
    """Mark the entries (..., m) that are zero but for rounding.

    Args:
        values: Entries of directions (..., m).
        rounding: What may pass for zero at the least, in units of a direction's root mean square.
        noise: How many times the median of the small entries may as well.
    """
    size = values.abs()
    unit = size.square().mean(-1, keepdim=True).sqrt()
    near = size <= NEAR_ZERO * unit
    median = torch.where(near, size, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
    return near & (size <= torch.maximum(noise * median, rounding * unit))


@register("spear", version=1)
class Spear(Attack):
    """SPEAR: disaggregates the gradient of a dense layer by the zeros that its ReLU leaves.

    The weight's gradient is (dL/dZ)^T X and has rank b, the number of inputs: it factors as L R, and dL/dZ = L Q for
    an unknown Q. A column of dL/dZ is zero wherever the ReLU was off, so b - 1 rows of L that happen to meet such zeros
    only have that column of Q as their null vector. Rows are drawn until b independent directions q with many zeros in
    L q are found; the bias's gradient gives their scales, and X = Q^-1 R is exact. The expected number of draws grows
    as 2^b / b where half the neurons are off.

    A re-implementation: the paper's code was not at hand. Chosen here: rows come from random orders cut into pieces. In
    every other order the rows that many known directions make zero come first, since a neuron that is off for some
    examples is more often off for others. A direction is refined by all the rows it makes zero. The sparsest
    independent directions are taken first and then exchanged while that raises the share lambda of neurons whose ReLU
    state the inputs explain. Sampling ends early where lambda reaches 0.995. Directions that were not found are filled
    up by the complement of the found ones, which leaves the inputs they belong to mixed among themselves. Inputs that
    share a direction, or whose gradient vanishes, are claimed grey.

    Sees: gradient of the first layer, its weights, number of inputs. The gradient's scale cancels, so that the learning
    rate may be unknown; several local steps are met as long as they see the same inputs.

    Args:
        samples: Most sets of rows drawn in a trial, and never more than 1000 * 3^b.
        tau: Least share of zeros of a direction.
        max_batch: Most inputs it is tried on.

    Reference: Dimitrov, Baader, Müller, Vechev, "SPEAR: Exact Gradient Inversion of Batches in Federated Learning",
    NeurIPS 2024, arXiv 2403.03945
    """

    recovers = frozenset({"inputs"})
    exact: ClassVar[bool] = True
    needs = frozenset({"batch_size", "weights"})

    def __init__(self, *, samples: int = 2_000_000, tau: float = 0.1, max_batch: int = 25) -> None:
        if samples < 1 or not 0 < tau < 1 or max_batch < 1:
            raise UserError(
                f"spear: expected samples >= 1, 0 < tau < 1 and max_batch >= 1, got {samples}, {tau}, {max_batch}; "
                "write spear(samples=2000000, tau=0.1)"
            )
        self.samples = samples
        self.tau = tau
        self.max_batch = max_batch

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline nets that do not start with a dense layer and a ReLU, and batches beyond reach."""
        total = knowledge.total_inputs
        if total > self.max_batch:
            raise NotApplicable(f"{total} inputs: the search is exponential in their number, at most {self.max_batch}")
        dense_first_layer(knowledge, relu=True)
        return {}

    def run(self, observation: Observation) -> Recovery:
        """Invert the first layer trial by trial: how many draws a trial takes is known only while drawing."""
        names = observation.model.parameter_names[:2]
        low, high = observation.bounds
        total, trials = observation.total_inputs, observation.trials
        weight, bias = (observation.model.parameters[name].double() for name in names)
        rounding = ROUNDING * torch.finfo(observation.update[names[0]].dtype).eps
        seeds = observation.randint(1 << 62, 1).flatten().tolist()
        shape = observation.input_spec.shape
        claimed = ((low + high) / 2).double().expand(trials, total, *shape).clone()
        mismatch = torch.zeros(trials, dtype=torch.float64)
        for t, (gradient, bias_gradient) in enumerate(zip(*first_layer_gradients(observation, names), strict=True)):
            own = t if len(weight) > 1 else 0
            inputs, agreement = self._trial(gradient, bias_gradient, weight[own], bias[own], total, seeds[t], rounding)
            claimed[t, : len(inputs)] = inputs.view(-1, *shape)
            mismatch[t] = 1 - agreement
            observation.progress(t + 1, trials, float(mismatch[: t + 1].mean()))
        return Recovery(inputs=claimed.clamp(low, high), visible_loss=mismatch, model_evaluations=0)

    def _trial(
        self,
        gradient: Tensor,
        bias_gradient: Tensor,
        weight: Tensor,
        bias: Tensor,
        total: int,
        seed: int,
        rounding: float,
    ) -> tuple[Tensor, float]:
        """Return inputs (b, n), b <= total, and the share of neurons whose ReLU they explain."""
        norms = gradient.norm(dim=1)
        alive = norms > 0
        if not bool(norms.isfinite().all()) or not bool(alive.any()):
            return gradient[:0], 0.0
        scale = norms.max()
        u, s, v = torch.linalg.svd(gradient[alive] / scale, full_matrices=False)
        noise = s[total] if len(s) > total else 0
        rank = max(1, int((s[:total] > GAP * noise).sum()))
        layer = Layer(
            u[:, :rank], s[:rank, None] * v[:rank], bias_gradient[alive] / scale, weight[alive], bias[alive], rounding
        )
        return self._search(layer, torch.Generator().manual_seed(seed))

    def _search(self, layer: Layer, generator: torch.Generator) -> tuple[Tensor, float]:
        """Draw until the directions found explain every ReLU; return inputs and the share that they explain."""
        rank = layer.left.shape[1]
        found = Directions(layer.left, self.tau, layer.rounding)
        samples = min(self.samples, 1000 * 3**rank)  # more hardly find what these did not
        drawn, chunk = 0, 64
        while True:
            if found.draw(min(chunk, samples - drawn), generator):
                basis = found.basis()
                inputs, agreement = layer.invert(found.completed(basis))
                if len(basis) == rank and agreement >= ENOUGH:
                    break
            drawn, chunk = drawn + chunk, min(2 * chunk, CHUNK)
            if drawn >= samples:
                return self._exchange(layer, found)
        return inputs, float(agreement)

    def _exchange(self, layer: Layer, found: Directions) -> tuple[Tensor, float]:
        """Start from the sparsest directions and put others in their places while that explains more."""
        basis = found.completed(found.basis())
        inputs, best = layer.invert(basis)
        for other in found.vectors:
            places = basis.expand(len(basis), -1, -1).clone()
            places.diagonal(dim1=0, dim2=1).copy_(other[:, None].expand_as(basis))
            tried, agreement = layer.invert(places)
            place = int(agreement.argmax())
            if agreement[place] > best:
                basis, inputs, best = places[place], tried[place], agreement[place]
        return inputs, float(best)


class Directions:
    """The distinct directions (c, b) found so far, those with most zeros first.

    Args:
        left: (m, b) orthonormal columns, the factor L.
        tau: Least share of zeros of L q.
        rounding: See `zeros`.
    """

    def __init__(self, left: Tensor, tau: float, rounding: float) -> None:
        self.left = left
        self.rounding = rounding
        rows, rank = left.shape
        self.least, self.most = max(rank + 2, tau * rows), SPARE * rank
        self.vectors = left.new_ones(1, 1) if rank == 1 else left.new_zeros(0, rank)
        self.counts = torch.zeros(len(self.vectors), dtype=torch.int64, device=left.device)

    def draw(self, samples: int, generator: torch.Generator) -> bool:
        """Draw sets of b - 1 rows and keep the null vectors with many zeros; return whether there is a basis to try."""
        rows, rank = self.left.shape
        if rank == 1 or rows < rank:
            return rank == 1
        pieces = -(-rows // (2 * rank - 2))  # the better half
        wait = torch.empty(-(-samples // pieces), rows).exponential_(generator=generator)
        wait[::2] /= self._rate().cpu()
        order = wait.argsort(1)
        sets = order[:, : pieces * (rank - 1)].reshape(-1, rank - 1)[:samples].to(self.left.device)
        # The last coordinate is solved for as 1; turned at random, no direction lacks it.
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q.to(self.left)
        drawn = (self.left @ turn)[sets]
        free, _ = torch.linalg.solve_ex(drawn[..., :-1], -drawn[..., -1:])
        vectors = torch.cat([free[..., 0], torch.ones_like(free[:, :1, 0])], 1) @ turn.T
        vectors = vectors[vectors.isfinite().all(1)]
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        values = vectors @ self.left.T
        counts = (values.abs() <= NEAR_ZERO / rows**0.5).sum(1)
        new = self._distinct(vectors[counts >= self.least], counts[counts >= self.least])
        for vector in new:
            self._add(self._refined(vector))
        return len(new) > 0 and len(self.vectors) >= rank

    def _rate(self) -> Tensor:
        """Return how often each row (m,) is drawn: neurons that some examples leave off, others often do as well."""
        known = self.basis()
        if 2 * len(known) >= self.left.shape[1]:
            off = zeros(known @ self.left.T, self.rounding).double().mean(0)
        else:  # a row of small norm has many zeros
            off = -self.left.norm(dim=1)
        return torch.exp(LEAN * off / off.abs().max().clamp(min=1e-9))

    def basis(self) -> Tensor:
        """Return independent directions (k, b), k <= b, greedily those with most zeros."""
        chosen: list[Tensor] = []
        span = self.left.new_zeros(0, self.left.shape[1])
        for vector in self.vectors:
            rest = vector - (vector @ span.T) @ span
            if rest.norm() > INDEPENDENT:
                chosen.append(vector)
                span = torch.cat([span, (rest / rest.norm())[None]])
                if len(chosen) == len(vector):
                    break
        return torch.stack(chosen) if chosen else span

    def completed(self, basis: Tensor) -> Tensor:
        """Return ``basis`` (k, b) with the missing directions out of its complement, (b, b)."""
        missing = basis.shape[1] - len(basis)
        full = torch.linalg.svd(basis, full_matrices=True).Vh if len(basis) else torch.eye(missing).to(basis)
        return torch.cat([basis, full[len(basis) :]])

    def _distinct(self, vectors: Tensor, counts: Tensor) -> Tensor:
        """Return those ``vectors`` (k, b) that are neither known nor alike."""
        vectors = vectors[counts.argsort(descending=True, stable=True)]
        kept: list[Tensor] = []
        while len(vectors) and len(kept) < self.most:
            if not len(self.vectors) or (self.vectors @ vectors[0]).abs().max() < ALIKE:
                kept.append(vectors[0])
            vectors = vectors[(vectors @ vectors[0]).abs() < ALIKE]
        return torch.stack(kept) if kept else vectors

    def _refined(self, vector: Tensor) -> Tensor:
        """Return the null vector of all the rows that ``vector`` makes zero: it averages their rounding."""
        for _ in range(REFINEMENTS):
            rows = self.left[zeros(self.left @ vector, self.rounding, noise=3)]
            if len(rows) < len(vector):
                break
            vector = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, 0]
        return vector

    def _add(self, vector: Tensor) -> None:
        count = zeros(self.left @ vector, self.rounding).sum()
        alike = (self.vectors @ vector).abs() >= ALIKE
        if bool((alike & (self.counts >= count)).any()):
            return
        self.vectors, self.counts = self.vectors[~alike], self.counts[~alike]
        place = int((self.counts >= count).sum())
        self.vectors = torch.cat([self.vectors[:place], vector[None], self.vectors[place:]])[: self.most]
        self.counts = torch.cat([self.counts[:place], count[None], self.counts[place:]])[: self.most]
        if len(self.counts) == self.most:
            self.least = max(self.least, int(self.counts[-1]) + 1)

"""Cocktail Party Attack: inputs as independent components of a dense layer's gradient."""

from __future__ import annotations

import torch
from leakbench_baselines.attacks.spear import dense_first_layer, first_layer_gradients
from torch import Tensor

from leakbench import Attack, Knowledge, NotApplicable, Observation, Recovery, UserError, register

TRACE = 200


@register("cocktail_party", version=1)
class CocktailParty(Attack):
    """Cocktail Party Attack: blind source separation of the rows of a dense layer's weight gradient.

    Every row of that gradient is a linear mixture of the layer's inputs. The rows are centred and whitened, and unit
    vectors that unmix them are optimised by Adam: components far from Gaussian (negentropy by log cosh), unmixing
    vectors unlike each other (exp(temperature |cos|)), and images with little total variation.

    Sees: gradient of a dense first layer, number of inputs. The gradient's scale cancels, so that the learning rate may
    be unknown.

    Departures: components come with unknown sign and scale, which the released evaluation takes from the truth (sign)
    and from each image's least and greatest value (scale). Here both follow from the bias's gradient, which mixes the
    same inputs by the same coefficients; no truth is used. The released code computes the negentropy and then sets
    it to 0; the paper has it, and so has this. The penalty on negative values and the inversion of features, for dense
    layers behind convolutions, are left out. The defaults are the released ones for Tiny ImageNet in batches of 128,
    which its authors chose by the best LPIPS on one batch: an oracle.

    Args:
        steps: Iterations of Adam; no gradient is evaluated, but each counts as one of the suite's budget.
        lr: Its learning rate.
        decorrelation: Weight of the penalty on alike unmixing vectors.
        temperature: Its sharpness.
        tv: Weight of the total variation.
        negentropy: Weight of the negentropy; 0 is what the released code runs.

    Reference: Kariyappa, Guo, Maeng, Xiong, Suh, Qureshi, Lee, "Cocktail Party Attack: Breaking Aggregation-Based
    Privacy in Federated Learning using Independent Component Analysis", ICML 2023, arXiv 2209.05578
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size", "weights"})

    def __init__(
        self,
        *,
        steps: int = 25000,
        lr: float = 1e-3,
        decorrelation: float = 1.47,
        temperature: float = 12.4,
        tv: float = 3.1,
        negentropy: float = 1.0,
    ) -> None:
        if steps < 1 or lr <= 0:
            raise UserError(
                f"cocktail_party: expected steps >= 1 and lr > 0, got {steps}, {lr}; write cocktail_party(steps=25000)"
            )
        if min(decorrelation, temperature, tv, negentropy) < 0:
            raise UserError(
                "cocktail_party: expected decorrelation, temperature, tv and negentropy of at least 0, got "
                f"{decorrelation}, {temperature}, {tv} and {negentropy}"
            )
        self.steps = steps
        self.lr = lr
        self.decorrelation = decorrelation
        self.temperature = temperature
        self.tv = tv
        self.negentropy = negentropy

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Decline nets whose first layer is not dense, and inputs that are no images."""
        if len(knowledge.input_spec.shape) != 3:
            raise NotApplicable("inputs are no images")
        dense_first_layer(knowledge, relu=False)
        return {}

    def run(self, observation: Observation) -> Recovery:
        """Separate the inputs (T, n, *input_shape) of all trials together; n is at most the layer's width."""
        weight, bias = first_layer_gradients(observation, observation.model.parameter_names[:2])
        size = weight.abs().amax((1, 2))
        size = size.where((size > 0) & size.isfinite(), 1)
        rows, bias = (weight / size[:, None, None]).nan_to_num(), (bias / size[:, None]).nan_to_num()
        count = min(observation.total_inputs, *rows.shape[1:])
        whiten = whitening(rows, count)
        shape = observation.input_spec.shape
        mixed = (whiten @ rows).float()
        unmix, loss, trace = self._separate(observation, mixed, shape)
        found = inputs_from(unmix.double() @ whiten, rows, bias)
        low, high = observation.bounds
        inputs = found.reshape(*found.shape[:2], *shape).clamp(low, high)
        return Recovery(inputs=inputs, visible_loss=loss, visible_loss_trace=trace, model_evaluations=0)

    def _separate(
        self, observation: Observation, mixed: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit unmixing vectors (T, n, n) of whitened rows (T, n, P), their loss (T,) and its trace."""
        trials, count = mixed.shape[:2]
        free = torch.eye(count).to(mixed).repeat(trials, 1, 1).requires_grad_()
        centred = mixed - mixed.mean(2, keepdim=True)
        optimiser = torch.optim.Adam([free], lr=self.lr)
        trace: list[Tensor] = []
        steps = self.steps if observation.budget is None else min(self.steps, observation.budget)
        for step in range(steps):
            unmix = torch.nn.functional.normalize(free, dim=2)
            loss = self._loss(unmix, mixed, centred, shape)
            (free.grad,) = torch.autograd.grad(loss.sum(), free)
            optimiser.step()
            if step * (TRACE - 1) % steps < TRACE - 1:
                trace.append(loss.detach())
            if step * 100 % steps < 100:
                observation.progress(step + 1, steps, float(loss.detach().mean()))
        with torch.no_grad():
            unmix = torch.nn.functional.normalize(free, dim=2)
            loss = self._loss(unmix, mixed, centred, shape)
        return unmix, loss, torch.stack([*trace, loss], 1)

    def _loss(self, unmix: Tensor, mixed: Tensor, centred: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the objective (T,) of unit unmixing vectors (T, n, n)."""
        others = 1 - torch.eye(unmix.shape[1]).to(unmix)  # a vector is always like itself: a constant, and a large one
        alike = (((unmix @ unmix.mT).abs() * others * self.temperature).exp() - 1).mean((1, 2))
        images = (unmix @ mixed).reshape(*mixed.shape[:2], *shape)
        smooth = images.diff(dim=-1).abs().flatten(1).mean(1) + images.diff(dim=-2).abs().flatten(1).mean(1)
        # log cosh, written so that it does not overflow
        size = (unmix @ centred).abs()
        log_cosh = size + torch.nn.functional.softplus(-2 * size) - 0.6931471805599453
        surprise = log_cosh.mean(2).square().mean(1)
        loss: Tensor = self.decorrelation * alike + self.tv * smooth - self.negentropy * surprise
        return loss


def whitening(rows: Tensor, count: int) -> Tensor:
    """Return (T, count, m) so that it times the centred ``rows`` (T, m, P) has uncorrelated rows of variance 1."""
    centred = rows - rows.mean(2, keepdim=True)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    s = s[:, :count]
    floor = torch.finfo(torch.float32).eps * s[:, :1]
    inverse = torch.where(s > floor, 1 / s.clamp(min=torch.finfo(s.dtype).tiny), 0)
    whiten: Tensor = (rows.shape[2] - 1) ** 0.5 * inverse[:, :, None] * u[:, :, :count].mT
    return whiten


def inputs_from(unmixing: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
    """Return inputs (T, n, P) from unmixing vectors (T, n, m), their sign and scale by the bias's gradient (T, m).

    With G = D X the components are S = diag(a) X, so that D = G S^+ diag(a); the bias's gradient is the row sum of D.
    """
    components = unmixing @ rows
    mixing = rows @ torch.linalg.pinv(components)
    scale = torch.linalg.pinv(mixing) @ bias[:, :, None]
    inputs: Tensor = components / scale
    return inputs.nan_to_num(0.0, 0.0, 0.0)

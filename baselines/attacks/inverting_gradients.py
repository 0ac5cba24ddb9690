"""Inverting Gradients: images by matching the direction of the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from leakbench_baselines.attacks.llg import extract_counts, head_rows, impact_of_negatives
from torch import Tensor

from leakbench import Attack, NotGranted, Observation, Recovery, UserError, register

TRACE = 200


def total_variation(images: Tensor) -> Tensor:
    """Return the anisotropic total variation (T, R) of images (T, R, N, c, h, w), in the mean over pixels."""
    down, right = (images.diff(dim=dim).abs().flatten(2) for dim in (-2, -1))
    return down.sum(2) / max(1, down.shape[2]) + right.sum(2) / max(1, right.shape[2])


@register("inverting_gradients", version=2)
class InvertingGradients(Attack):
    """Inverting Gradients: cosine distance between gradients plus total variation, by Adam on the gradient's sign.

    The distance is one cosine over all layers; images stay within the valid pixel values; the learning rate falls to a
    tenth at 3/8, 5/8 and 7/8 of the steps; of several restarts the one with the least distance is claimed. Labels that
    are not known come from the row sums of the last layer's weight gradient, which for one input is iDLG's rule (Zhao
    et al. 2020, arXiv 2001.02610) and for more LLG's (Wainakh et al. 2022, arXiv 2105.09369).

    Sees: gradients of all layers, weights, number of inputs; labels where granted. An update after several local steps
    is matched by the gradient of all its inputs at the weights sent out: a direction needs no learning rate.

    Args:
        steps: Iterations; fewer where the suite's budget of gradient evaluations ends earlier. The default is that of
            the paper's library.
        tv: Weight of the total variation. The default is that of the paper's ``reconstruct_image.py``; its library's
            0.1 is for 224x224 images and flattens 8x8 ones below the mean image (8.9 against 11.3 dB on digits).
        lr: Learning rate of Adam.
        restarts: Random initialisations.

    Reference: Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients - How easy is it to break privacy in
    federated learning?", NeurIPS 2020, arXiv 2003.14053
    """

    recovers = frozenset({"inputs"})
    needs = frozenset({"batch_size", "weights"})

    def __init__(self, *, steps: int = 4800, tv: float = 1e-4, lr: float = 0.1, restarts: int = 1) -> None:
        if steps < 1 or restarts < 1:
            raise UserError(f"inverting_gradients: expected steps and restarts of at least 1, got {steps}, {restarts}")
        self.steps = steps
        self.tv = tv
        self.lr = lr
        self.restarts = restarts

    def run(self, observation: Observation) -> Recovery:
        """Optimise inputs (T, K * N, *input_shape) of all trials and restarts together."""
        steps, restarts = self._within(observation.budget)
        target, labels = _target(observation), _labels(observation)
        dtype = observation.model.dtype
        images = observation.randn(restarts, labels.shape[1], *observation.input_spec.shape).to(dtype)
        low, high = (bound.to(images.device, dtype) for bound in observation.bounds)
        images.requires_grad_()
        optimiser = torch.optim.Adam([images], lr=self.lr)
        milestones = [int(steps // part) for part in (2.667, 1.6, 1.142)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
        trace = []
        for step in range(steps):
            distance = _distance(observation, target, images, labels, create_graph=True)
            (gradient,) = torch.autograd.grad((distance + self.tv * total_variation(images)).sum(), images)
            images.grad = gradient.sign()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(low, high)
            if step * (TRACE - 1) % steps < TRACE - 1:
                trace.append(distance.detach())
            if step * 100 % steps < 100:
                observation.progress(step + 1, steps, float(distance.detach().min(1).values.mean()))
        distance = _distance(observation, target, images, labels, create_graph=False)
        rows, best = torch.arange(len(distance), device=distance.device), distance.argmin(1)
        return Recovery(
            inputs=images.detach()[rows, best],
            visible_loss=distance[rows, best],
            visible_loss_trace=torch.stack([*trace, distance])[:, rows, best].T,
            model_evaluations=restarts * (steps + 1),
        )

    def _within(self, budget: int | None) -> tuple[int, int]:
        """Return the steps and restarts that ``budget`` evaluations pay for; choosing among restarts costs one each."""
        if budget is None:
            return self.steps, self.restarts
        restarts = min(self.restarts, max(1, budget))
        return max(0, min(self.steps, budget // restarts - 1)), restarts


def _target(observation: Observation) -> dict[str, Tensor]:
    """Return the direction to match, (T, *shape) by parameter name: the update of all layers, scaled to length 1."""
    start = observation.model.parameters
    sent = {name: value for name, value in observation.update.items() if name in start}
    if observation.sends == "weights":
        sent = {name: start[name] - value for name, value in sent.items()}
    length = _root(torch.stack([value.flatten(1).square().sum(1) for value in sent.values()]).sum(0))
    return {name: value / length.view(-1, *(1,) * (value.dim() - 1)) for name, value in sent.items()}


def _labels(observation: Observation) -> Tensor:
    """Return the known labels (T, K * N), or else those that the row sums tell."""
    try:
        return observation.labels
    except NotGranted:
        g = head_rows(observation).sum(-1)
    total = observation.inputs_per_client * observation.clients
    counts = extract_counts(g, impact_of_negatives(g, total), total, capped=True)
    classes = torch.arange(observation.num_classes, device=g.device).repeat(len(g))
    return classes.repeat_interleave(counts.flatten()).view(len(g), total)


def _distance(
    observation: Observation, target: Mapping[str, Tensor], images: Tensor, labels: Tensor, *, create_graph: bool
) -> Tensor:
    """Return 1 - cosine (T, R) between the target and the gradients of images (T, R, N, *input_shape)."""
    trials, restarts = images.shape[:2]

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return observation.gradients(x, y, names=list(target), create_graph=create_graph)

    if observation.model.draws == 1:
        flat = gradients(images.flatten(0, 1), labels.repeat_interleave(restarts, 0))
        found = {name: value.view(trials, restarts, *value.shape[1:]) for name, value in flat.items()}
    else:  # a model per trial serves one batch of that trial at a time
        each = [gradients(images[:, restart], labels) for restart in range(restarts)]
        found = {name: torch.stack([grads[name] for grads in each], 1) for name in target}
    pairs = [(found[name].flatten(2), goal.flatten(1)[:, None]) for name, goal in target.items()]
    dot = torch.stack([(value * goal).sum(2) for value, goal in pairs]).sum(0)
    return 1 - dot / _root(torch.stack([value.square().sum(2) for value, _ in pairs]).sum(0))


def _root(square: Tensor) -> Tensor:
    """Return the square root, kept off 0: a gradient that vanishes has no direction, and its root no derivative."""
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()

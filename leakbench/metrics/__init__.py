"""The metrics and what they mean. No torch here; the arithmetic is in the modules named after the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leakbench.tasks import INFERENCE

_LLG = "Wainakh et al. 2022, arXiv 2105.09369"
_ILRG = "Ma et al. 2023, iLRG (ICLR)"
_RLG = "Dang et al. 2021, arXiv 2111.00556"


@dataclass(frozen=True)
class MetricSpec:
    """One number per trial.

    Args:
        name: Name of the row column.
        target: What the attack recovers, ``inference`` standing for attribute and membership; or ``stealth``: what one
            client can find out about the model that it got, whatever is recovered; the most visible of at most four
            clients and of all rounds.
        higher_is_better: For the attack; of stealth, less visible is better.
        unit: ``1`` for a fraction or a distance without unit, ``dB``, ``intensity^2`` (intensities are in [0, 1]),
            ``position`` (from 1), ``rank`` (of a matrix).
        description: Formula; n_c is the true and m_c the recovered count of class c, N and M their sums.
        source: Who defined or first reported it.
        headline: Whether boards rank by it; one per target.
    """

    name: str
    target: Literal["labels", "inputs", "inference", "stealth"]
    higher_is_better: bool
    unit: str
    description: str
    source: str
    headline: bool = False

    @property
    def reference(self) -> str:
        """Name of the row column to compare with.

        What knows nothing of the update: ``*_chance`` (labels, inference), ``*_floor`` (inputs). What the honest model
        looks like on the same batch: ``*_honest`` (stealth).
        """
        return f"{self.name}_{_REFERENCES[self.target]}"


_REFERENCES = {"labels": "chance", "inputs": "floor", "inference": "chance", "stealth": "honest"}


def _labels(
    name: str, description: str, source: str, *, higher_is_better: bool = True, headline: bool = False
) -> MetricSpec:
    return MetricSpec(name, "labels", higher_is_better, "1", description, source, headline)


def _stealth(
    name: str,
    description: str,
    source: str = "leakbench",
    *,
    higher_is_better: bool = False,
    unit: str = "1",
    headline: bool = False,
) -> MetricSpec:
    return MetricSpec(name, "stealth", higher_is_better, unit, description, source, headline)


METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        _labels("instance_recall", "sum_c min(n_c, m_c) / max(N, M); LLG's attack success rate", _LLG, headline=True),
        _labels("instance_precision", "sum_c min(n_c, m_c) / M; 0 when M = 0", _LLG),
        _labels("irec", "IRec: sum_c min(n_c, m_c) / N; claiming more never lowers it", _ILRG),
        _labels("count_exact_match", "1 when n_c = m_c for every class, else 0", "leakbench"),
        _labels("presence_precision", "share of the claimed classes that are present; 0 when none is claimed", _RLG),
        _labels("presence_recall", "share of the present classes that are claimed", _RLG),
        _labels("presence_f1", "harmonic mean of presence precision and recall", _RLG),
        _labels("set_exact_match", "1 when claimed and present classes are the same set, else 0", _RLG),
        _labels("class_accuracy", "LeAcc: share of all classes with (n_c > 0) = (m_c > 0); absent ones count", _ILRG),
        _labels("count_accuracy", "LnAcc: share of all classes with n_c = m_c; absent ones count", _ILRG),
        _labels("count_accuracy_present", "share of n_c = m_c among the classes present or claimed", "leakbench"),
        _labels("l1_count_error", "sum_c |n_c - m_c| / N", "leakbench", higher_is_better=False),
        _labels("total_variation", "sum_c |n_c / N - m_c / M| / 2; 1 when M = 0", "leakbench", higher_is_better=False),
        MetricSpec(
            "psnr",
            "inputs",
            True,
            "dB",
            "10 log10(1 / MSE) of an image, at most 120, averaged over the images",
            "standard; matching as in Wu et al. 2023 (LTI, UAI)",
            True,
        ),
        MetricSpec(
            "ssim",
            "inputs",
            True,
            "1",
            "structural similarity, Gaussian window of 11 (at most the image) with sigma 1.5, data range 1",
            "Wang et al. 2004, doi 10.1109/TIP.2003.819861",
        ),
        MetricSpec("mse", "inputs", False, "intensity^2", "mean squared error of intensities in [0, 1]", "standard"),
        MetricSpec(
            "lpips",
            "inputs",
            False,
            "1",
            "LPIPS with AlexNet, inputs in [-1, 1]; null below 31 pixels a side, and where torchvision's AlexNet "
            "weights are not in torch's cache (nothing is downloaded)",
            "Zhang et al. 2018, arXiv 1801.03924",
        ),
        MetricSpec(
            "feature_distance",
            "inputs",
            False,
            "1",
            "1 - cosine of the last layer's inputs in the net that `feature_checkpoint` names: trained on the dataset "
            "(stage converged, draw 0), of another architecture than the task's; null where no such checkpoint is "
            "official or in the cache (none is trained for it)",
            "leakbench",
        ),
        MetricSpec(
            "identification_rank",
            "inputs",
            False,
            "position",
            "1 + number of gallery images that are nearer (pixel L2) to the recovered image than the true one, mean "
            "over the images; gallery: the first 1,000 images of the private split, of any label, and the victims",
            "standard",
        ),
        MetricSpec(
            "identified",
            "inputs",
            True,
            "1",
            "share of images with identification rank 1; IIP without its restriction to images of the true label",
            "Yin et al. 2021, arXiv 2104.07586",
        ),
        MetricSpec(
            "recovered",
            "inputs",
            True,
            "1",
            "share of images with PSNR of at least 20 dB (40 dB for an attack that declares itself exact) and at least "
            "6 dB above that image's best floor",
            "leakbench",
        ),
        MetricSpec(
            "inference_accuracy",
            "inference",
            True,
            "1",
            "1 when the claimed probability is on the side of the truth, 1/2 when it is exactly .5, else 0; the truth "
            "is a fair coin, so the mean estimates the balanced accuracy",
            "standard",
            True,
        ),
        MetricSpec(
            "inference_bits",
            "inference",
            True,
            "bit",
            "1 + log2 of the probability given to the truth, the claim clipped to .01 .. .99; the mean is a lower "
            "bound on the information usable by the attack's family, as far as its claims are calibrated",
            "after Xu et al. 2020, arXiv 2002.10689",
        ),
        _stealth(
            "detected",
            "1 when the client would refuse the model by a threshold on the numbers below but model_disagreement "
            "(`leakbench.metrics.stealth.Thresholds`), else 0",
            headline=True,
        ),
        _stealth(
            "least_norm_scale",
            "smallest, over the normalisation layers, of the largest absolute scale in the layer, 0 = a zeroed layer; "
            "layers that were zeroed before are left out; null for nets without any",
            higher_is_better=True,
        ),
        _stealth(
            "logit_spread",
            "largest range (max - min over the batch) of a logit, over the largest absolute logit; 0 = identical "
            "logits for all inputs; null for B = 1",
            higher_is_better=True,
        ),
        _stealth("dead_gradient_share", "share of the parameters that lie in tensors whose gradient is exactly zero"),
        _stealth(
            "head_gradient_rank",
            "numerical rank of the last layer's weight gradient (C, d): singular values above "
            "max(C, d) * eps * the largest, eps of the gradient's type",
            higher_is_better=True,
            unit="rank",
        ),
        _stealth(
            "d_snr",
            "D-SNR: largest, over the layers' weights, of n_max / (sum of the other n_i + 1e-6), n_i the norm of "
            "example i's gradient; BatchNorm's batch statistics held fixed; null for B = 1",
            "Garov et al. 2024, arXiv 2306.03013; as in their code",
        ),
        _stealth("parameter_distance", "||w - w_previous|| / ||w_previous|| over all parameters"),
        _stealth(
            "model_disagreement",
            "(distinct models - 1) / (K - 1) by the hashes of what the K clients got; null for one client",
        ),
    )
}
"""Every metric by name, in the order of columns and tables."""


def metric_target(target: str) -> str:
    """Return what `MetricSpec.target` calls a task's target."""
    return "inference" if target in INFERENCE else target


def headline(target: str) -> MetricSpec:
    """Return the metric that boards of a task's ``target`` rank by, or that sums up ``stealth``."""
    return next(spec for spec in METRICS.values() if spec.headline and spec.target == metric_target(target))

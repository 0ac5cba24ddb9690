"""The ladder of classifiers that V-information of an attribute is measured with; each has one fixed feature map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch.nn.functional import binary_cross_entropy_with_logits

from leakbench.measures.features import Floats, coordinates, kernel, standardised
from leakbench.measures.nets import ConvOnGradients, mlp, trained

AXES = 128
"""Principal coordinates that the MLP reads."""
SOFT = 0.1
"""Pseudo-counts of calibration."""


@dataclass(frozen=True)
class View:
    """What rules see of one layer, or of several at once: rows to fit to, then to calibrate with, then held out.

    Args:
        signed: (n, n) inner products of the standardised sketches of g (`kernel`).
        mixed: The same of sketches and moduli, in equal parts.
        moduli: (n, d) sizes of g.
        matrices: (n, outputs, inputs) of each layer.
        truth: (fit + calibrate,) 0 or 1, of the first rows alone: no rule can read what it is tested on.
        fit: Rows to fit to.
    """

    signed: Floats
    mixed: Floats
    moduli: NDArray[np.float32]
    matrices: Sequence[NDArray[np.float32]]
    truth: NDArray[np.int64]
    fit: int

    @classmethod
    def of(
        cls,
        signed: Sequence[NDArray[np.float32]],
        moduli: Sequence[NDArray[np.float32]],
        matrices: Sequence[NDArray[np.float32]],
        truth: NDArray[np.int64],
        fit: int,
    ) -> View:
        """Return the view of one or more layers, each of which counts alike in the inner products."""
        products = [np.mean([kernel(own, fit) for own in part], axis=0) for part in (signed, moduli)]
        return cls(products[0], (products[0] + products[1]) / 2, np.concatenate(moduli, axis=1), matrices, truth, fit)

    @cached_property
    def mixed_coordinates(self) -> NDArray[np.float32]:
        """The leading `AXES` coordinates of ``mixed``, of unit variance on average."""
        points = coordinates(self.mixed, self.fit, AXES)
        return (points / max(float(points[: self.fit].std()), 1e-30)).astype(np.float32)


def logistic(view: View) -> Floats:
    """Logistic regression on the sketch of g, its L2 penalty by 5-fold cross-validation."""
    points, truth = coordinates(view.signed, view.fit), view.truth[: view.fit]
    folds = StratifiedKFold(min(5, int(np.bincount(truth, minlength=2).min())))

    def rule(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=2000)

    def score(strength: float) -> float:
        own = cross_val_score(rule(strength), points[: view.fit], truth, cv=folds, scoring="neg_log_loss")
        return float(own.mean())

    best = max(np.logspace(-3, 4, 8), key=score)
    return np.asarray(rule(best).fit(points[: view.fit], truth).decision_function(points))


def forest(view: View) -> Floats:
    """Random forest on the sizes of g: 100 trees, leaves and splits of 5 examples (Melis et al.)."""
    rule = RandomForestClassifier(100, min_samples_leaf=5, min_samples_split=5, random_state=0)
    rule.fit(view.moduli[: view.fit], view.truth[: view.fit])
    return np.asarray(logit(np.clip(rule.predict_proba(view.moduli)[:, 1], 1e-3, 1 - 1e-3)))


def perceptron(view: View) -> Floats:
    """MLP 256-64 on the leading principal coordinates of sketch and sizes, stopped by the calibration rows."""
    inputs = torch.from_numpy(view.mixed_coordinates)
    return _log_odds(view, lambda: mlp(inputs.shape[1]), [inputs])


def conv(view: View) -> Floats:
    """Convolution over the outputs of each layer's weight gradient (Nasr et al.), stopped by the calibration rows.

    Its kernels read each number and its size: a few hundred examples do not teach them that signs follow the labels.
    """
    both = [np.concatenate([own, np.abs(own)], axis=2) for own in view.matrices]
    inputs = [torch.from_numpy(standardised(own, view.fit)).float() for own in both]
    return _log_odds(view, lambda: ConvOnGradients([(own.shape[1], own.shape[2]) for own in inputs]), inputs)


FAMILIES: Mapping[str, Callable[[View], Floats]] = {
    "logistic": logistic,
    "forest": forest,
    "mlp": perceptron,
    "conv": conv,
}
"""Each returns log-odds (n,) of all rows."""


def calibrated(scores: Floats, view: View) -> Floats:
    """Return log-odds (n,) whose scale and offset minimise the log loss of the calibration rows (Platt 1999).

    The scale is not negative and may be 0, so that every family can also ignore what it sees. So that rows which are
    all told apart do not make the scale infinite, their truths are softened: by a tenth of Platt's pseudo-counts, since
    the whole ones cost 0.05 bit of a linear rule that is right (400 rows) and saved none on noise. No row is claimed
    with more odds than the number of rows that could have spoken against it.
    """
    own, truth = scores[view.fit : len(view.truth)], view.truth[view.fit :]
    spread = max(float(own.std()), 1e-12)
    centre = float(own.mean())
    ones = int(truth.sum())
    soft = np.where(truth == 1, (ones + SOFT) / (ones + 2 * SOFT), SOFT / (len(truth) - ones + 2 * SOFT))

    def loss(line: Floats) -> tuple[float, Floats]:
        x = (own - centre) / spread
        odds = line[0] * x + line[1]
        slope = expit(odds) - soft
        return float((np.logaddexp(0, odds) - soft * odds).sum()), np.array([(slope * x).sum(), slope.sum()])

    line = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(0, None), (None, None)], method="L-BFGS-B").x
    most = np.log(len(truth) + 1)
    return np.asarray((line[0] * (scores - centre) / spread + line[1]).clip(-most, most))


def _log_odds(view: View, build: Callable[[], torch.nn.Module], inputs: Sequence[torch.Tensor]) -> Floats:
    targets = torch.from_numpy(view.truth).float()[:, None]
    outputs = trained(build, binary_cross_entropy_with_logits, inputs, targets, view.fit)
    return outputs[:, 0].double().numpy()

"""Attribute inference: a linear or small neural classifier on all of a simulated update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from leakbench_baselines.attacks.property_inference import attribute_picks, changed, fitted_scores, simulated
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from leakbench import Attack, Knowledge, Observation, Recovery, UserError, register

FAMILIES = ("logistic", "mlp")
FOLDS = 5


@register("attribute_inference", version=1)
class AttributeInference(Attack):
    """Attribute inference: a classifier on simulated updates as they are, signs and all tensors included.

    Clients with and without the attribute in their batches are simulated on auxiliary data, as in `property_inference`
    but with the share of examples that the task declares; the granted defense takes part. Each tensor is scaled to the
    same norm, so that layers with small gradients count too and no learning rate matters, and the update is hashed to
    `features` numbers with random signs. The classifier's strength of regularisation or its calibration is
    cross-validated, so that its probabilities can be read as such.

    Sees: updates, weights, batch size, auxiliary data with the attribute, learning rate and number of local steps where
    more than a gradient is sent; the defense where it is granted.

    A re-implementation of an idea that several works share, not of one work's numbers: the shadow-trained classifiers
    of the reference are nets on the updates of a whole shadow federation, of which this paper's sizes were not at hand.
    Clients that differ in size are simulated with their mean size.

    Args:
        family: ``logistic`` (L2, strength by cross-validation) or ``mlp`` (one hidden layer of 64, early stopping,
            Platt scaling by cross-validation).
        simulations: Updates to simulate, half of them with the attribute.
        features: Numbers that are read of an update.

    Reference: Feng, Hashemi, Hebbar, Annavaram, Narayanan, "Attribute Inference Attack of Speech Emotion Recognition in
    Federated Learning Settings", arXiv 2112.13416
    """

    recovers = frozenset({"attribute"})
    needs = frozenset({"auxiliary", "batch_size", "weights"})

    def __init__(self, *, family: str = "logistic", simulations: int = 400, features: int = 1024) -> None:
        if family not in FAMILIES or simulations < 20 or features < 1:
            raise UserError(
                "attribute_inference: expected family logistic or mlp, simulations >= 20 and features >= 1, got "
                f"{family!r}, {simulations}, {features}; write attribute_inference(family='mlp')"
            )
        self.family = family
        self.simulations = simulations
        self.features = features

    def prepare(self, knowledge: Knowledge) -> dict[str, Tensor]:
        """Return ``features`` (M, s, F) of simulated updates and their ``truth`` (s,)."""
        picks, truth = attribute_picks(knowledge, self.simulations, "task")
        return {"features": simulated(knowledge, picks, lambda _, change: self._hashed(change)), "truth": truth}

    def run(self, observation: Observation) -> Recovery:
        """Fit the classifier to the simulated updates, one per model, and ask it about each trial's."""
        features = self._hashed(changed(observation, observation.update))
        return Recovery(scores=fitted_scores(self._classifier, observation.prepared, features), model_evaluations=0)

    def _classifier(self) -> Any:
        if self.family == "logistic":
            strengths = {"C": [10.0**power for power in range(-5, 2)]}
            return GridSearchCV(LogisticRegression(max_iter=300), strengths, cv=FOLDS, scoring="neg_log_loss")
        net = MLPClassifier(64, early_stopping=True, max_iter=300, random_state=0)
        return CalibratedClassifierCV(net, method="sigmoid", cv=FOLDS, ensemble=False)

    def _hashed(self, change: Mapping[str, Tensor]) -> Tensor:
        """Return each row's update as (rows, at most features) numbers."""
        scaled = []
        for value in change.values():
            entries = value.detach().double().flatten(1).nan_to_num()
            largest = entries.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            scaled.append(torch.nn.functional.normalize(entries / largest, dim=1))
        vectors = torch.cat(scaled, 1)
        if vectors.shape[1] <= self.features:
            return vectors.float()
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (vectors.shape[1],), generator=draw).to(vectors) * 2 - 1
        places = torch.randint(0, self.features, (vectors.shape[1],), generator=draw).to(vectors.device)
        hashed = vectors.new_zeros(len(vectors), self.features)
        return hashed.index_add_(1, places, vectors * signs).float()

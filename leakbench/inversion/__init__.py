"""The shared engine of optimisation attacks: a published attack names its objective, priors, optimiser and start."""

from leakbench.inversion.engine import Inversion, InversionAttack
from leakbench.inversion.labels import LabelSource
from leakbench.inversion.networks import ConvolutionalPrior
from leakbench.inversion.objectives import (
    Comparison,
    Cosine,
    Intervals,
    JointScale,
    Masked,
    MeanNorm,
    Objective,
    Signs,
    SquaredL2,
)
from leakbench.inversion.optimisers import LBFGS, Adam, Optimiser
from leakbench.inversion.priors import (
    BatchNormStatistics,
    FeatureMatch,
    GroupConsistency,
    L2Norm,
    Prior,
    TotalVariation,
    Weighted,
)
from leakbench.inversion.rows import Rows
from leakbench.inversion.sources import OneStep, Source, Surrogate, Unrolled
from leakbench.inversion.spaces import Pixels, Space

__all__ = [
    "LBFGS",
    "Adam",
    "BatchNormStatistics",
    "Comparison",
    "ConvolutionalPrior",
    "Cosine",
    "FeatureMatch",
    "GroupConsistency",
    "Intervals",
    "Inversion",
    "InversionAttack",
    "JointScale",
    "L2Norm",
    "LabelSource",
    "Masked",
    "MeanNorm",
    "Objective",
    "OneStep",
    "Optimiser",
    "Pixels",
    "Prior",
    "Rows",
    "Signs",
    "Source",
    "Space",
    "SquaredL2",
    "Surrogate",
    "TotalVariation",
    "Unrolled",
    "Weighted",
]

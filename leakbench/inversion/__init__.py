"""The shared engine of optimisation attacks: a published attack names its objective, priors, optimiser and start."""

from leakbench.inversion.engine import Inversion, InversionAttack
from leakbench.inversion.labels import LabelSource
from leakbench.inversion.networks import ConvolutionalPrior
from leakbench.inversion.objectives import (
    Comparison,
    Cosine,
    JointScale,
    Likelihood,
    MeanNorm,
    Objective,
    SquaredL2,
)
from leakbench.inversion.optimisers import LBFGS, Adam, Optimiser
from leakbench.inversion.presets import cosine_inversion
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
from leakbench.inversion.sources import Defended, OneStep, Source, Surrogate, Unrolled
from leakbench.inversion.spaces import Pixels, Space

__all__ = [
    "LBFGS",
    "Adam",
    "BatchNormStatistics",
    "Comparison",
    "ConvolutionalPrior",
    "Cosine",
    "Defended",
    "FeatureMatch",
    "GroupConsistency",
    "Inversion",
    "InversionAttack",
    "JointScale",
    "L2Norm",
    "LabelSource",
    "Likelihood",
    "MeanNorm",
    "Objective",
    "OneStep",
    "Optimiser",
    "Pixels",
    "Prior",
    "Rows",
    "Source",
    "Space",
    "SquaredL2",
    "Surrogate",
    "TotalVariation",
    "Unrolled",
    "Weighted",
    "cosine_inversion",
]

"""The shared engine of optimisation attacks: a published attack names its objective, priors, optimiser and start."""

from leakbench.inversion.engine import Inversion as Inversion
from leakbench.inversion.objectives import Comparison as Comparison
from leakbench.inversion.objectives import Cosine as Cosine
from leakbench.inversion.objectives import Intervals as Intervals
from leakbench.inversion.objectives import JointScale as JointScale
from leakbench.inversion.objectives import Masked as Masked
from leakbench.inversion.objectives import MeanNorm as MeanNorm
from leakbench.inversion.objectives import Objective as Objective
from leakbench.inversion.objectives import Signs as Signs
from leakbench.inversion.objectives import SquaredL2 as SquaredL2
from leakbench.inversion.optimisers import LBFGS as LBFGS
from leakbench.inversion.optimisers import Adam as Adam
from leakbench.inversion.optimisers import Optimiser as Optimiser
from leakbench.inversion.priors import BatchNormStatistics as BatchNormStatistics
from leakbench.inversion.priors import FeatureMatch as FeatureMatch
from leakbench.inversion.priors import GroupConsistency as GroupConsistency
from leakbench.inversion.priors import L2Norm as L2Norm
from leakbench.inversion.priors import Prior as Prior
from leakbench.inversion.priors import TotalVariation as TotalVariation
from leakbench.inversion.rows import Rows as Rows
from leakbench.inversion.sources import OneStep as OneStep
from leakbench.inversion.sources import Source as Source
from leakbench.inversion.sources import Surrogate as Surrogate
from leakbench.inversion.sources import Unrolled as Unrolled
from leakbench.inversion.spaces import Pixels as Pixels
from leakbench.inversion.spaces import Space as Space

"""Zeroth-order optimisation for PyTorch: directions, SPSA, evolution strategies. Imports nothing but torch."""

from zopro.zo.directions import Directions, Gaussian, LowRank, Rademacher, Signs, Targeted
from zopro.zo.displacement import Displacement
from zopro.zo.eps import auto_eps, noise_floor
from zopro.zo.es import ES
from zopro.zo.evolution import ESStrategy
from zopro.zo.guided import ResidualFeedback
from zopro.zo.ranks import Ranks
from zopro.zo.records import Estimate, StepRecord
from zopro.zo.schedules import target_share
from zopro.zo.spsa import SPSA
from zopro.zo.strategy import SPSAStrategy, Strategy
from zopro.zo.weights import Weights

__all__ = [
    "ES",
    "SPSA",
    "Directions",
    "Displacement",
    "ESStrategy",
    "Estimate",
    "Gaussian",
    "LowRank",
    "Rademacher",
    "Ranks",
    "ResidualFeedback",
    "SPSAStrategy",
    "Signs",
    "StepRecord",
    "Strategy",
    "Targeted",
    "Weights",
    "auto_eps",
    "noise_floor",
    "target_share",
]

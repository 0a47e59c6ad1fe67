"""The verb `expect` and the gradients through a k-subset it may use."""

from distset.expect.baselines import Baseline, LeaveOneOut, NoBaseline, Past, Ridge, Tangent
from distset.expect.chunked import SparseEstimate, expect_chunked
from distset.expect.estimator import Estimator, describe
from distset.expect.rivals import (
    IMLE,
    NCPSS,
    AdaptiveTarget,
    FixedTarget,
    GumbelScore,
    GumbelSoftmax,
    Simple,
    StraightThrough,
)
from distset.expect.score import ScoreFunction
from distset.expect.verb import expect

__all__ = [
    "IMLE", "NCPSS", "AdaptiveTarget", "Baseline", "Estimator", "FixedTarget", "GumbelScore", "GumbelSoftmax",
    "LeaveOneOut", "NoBaseline", "Past", "Ridge", "ScoreFunction", "Simple", "SparseEstimate", "StraightThrough", "Tangent",
    "describe", "expect", "expect_chunked",
]  # fmt: skip

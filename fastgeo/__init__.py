"""Geodesics between trained networks: every network on the path in one pass."""

from fastgeo.evaluate import Evaluation, SplitEvaluation, evaluate
from fastgeo.matching import Matching, match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.stacking import stack

__all__ = [
    "Evaluation",
    "Matching",
    "Path",
    "SplitEvaluation",
    "evaluate",
    "match",
    "optimize",
    "stack",
]

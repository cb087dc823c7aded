"""Geodesics between trained networks: every network on the path in one pass."""

from fastgeo.allocator import keep_pages
from fastgeo.checkpoint import Checkpoints
from fastgeo.evaluate import Evaluation, SplitEvaluation, evaluate
from fastgeo.matching import Matching, match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.recalibrate import recalibrate
from fastgeo.stacking import stack

__all__ = [
    "Checkpoints",
    "Evaluation",
    "Matching",
    "Path",
    "SplitEvaluation",
    "evaluate",
    "keep_pages",
    "match",
    "optimize",
    "recalibrate",
    "stack",
]

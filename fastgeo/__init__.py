"""Geodesics between trained networks: every network on the path in one pass."""

from fastgeo.allocator import keep_pages
from fastgeo.evaluate import Evaluation, SplitEvaluation, evaluate
from fastgeo.matching import Matching, match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.permutation import PermutationSpec
from fastgeo.recalibrate import recalibrate
from fastgeo.stacking import stack
from fastgeo.symmetry import permutation_spec

__all__ = [
    "Evaluation",
    "Matching",
    "Path",
    "PermutationSpec",
    "SplitEvaluation",
    "evaluate",
    "keep_pages",
    "match",
    "optimize",
    "permutation_spec",
    "recalibrate",
    "stack",
]

"""Geodesics between trained networks: every network on the path in one pass."""

from fastgeo.allocator import keep_pages
from fastgeo.checkpoint import Checkpoints
from fastgeo.common_frame import CommonFrame, match_many
from fastgeo.evaluate import Evaluation, SplitEvaluation, evaluate
from fastgeo.matching import Matching, match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.permutation import PermutationSpec
from fastgeo.recalibrate import recalibrate
from fastgeo.replayed import optimize_static
from fastgeo.stacking import stack
from fastgeo.symmetry import permutation_spec

__all__ = [
    "Checkpoints",
    "CommonFrame",
    "Evaluation",
    "Matching",
    "Path",
    "PermutationSpec",
    "SplitEvaluation",
    "evaluate",
    "keep_pages",
    "match",
    "match_many",
    "optimize",
    "optimize_static",
    "permutation_spec",
    "recalibrate",
    "stack",
]

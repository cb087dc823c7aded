"""The public names, which `fastgeo` has, too."""

from fastgeo_kernels import keep_pages

from fastgeo import operations  # noqa: F401 - fills the table of operations
from fastgeo.evaluate import Evaluation, SplitEvaluation, evaluate
from fastgeo.figures import Comparison, compare
from fastgeo.forward.options import Forward
from fastgeo.matching.many import CommonFrame, match_many
from fastgeo.matching.pair import Matching, match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.plane import Plane, plane
from fastgeo.recalibrate import recalibrate
from fastgeo.schedule import Training
from fastgeo.stacking.module import stack
from fastgeo.step.descent import Descent
from fastgeo.store.checkpoint import Checkpoints
from fastgeo.symmetry.derive import permutation_spec
from fastgeo.symmetry.spec import PermutationSpec
from fastgeo.train import train_ends

__all__ = [
    "Checkpoints",
    "CommonFrame",
    "Comparison",
    "Descent",
    "Evaluation",
    "Forward",
    "Matching",
    "Path",
    "PermutationSpec",
    "Plane",
    "SplitEvaluation",
    "Training",
    "compare",
    "evaluate",
    "keep_pages",
    "match",
    "match_many",
    "optimize",
    "permutation_spec",
    "plane",
    "recalibrate",
    "stack",
    "train_ends",
]

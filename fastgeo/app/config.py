"""Every number of a run, with where it comes from, and the presets.

"Paper" is Tan et al., "Geodesic Mode Connectivity" (ICLR 2023 Tiny Papers) with its public code;
"Git Re-Basin" is Ainsworth et al. (2022).
"""

import ast
import functools
import inspect
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fastgeo.forward.options import Forward, bytes_of
from fastgeo.step.descent import Descent
from fastgeo.train import Training


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where to compute."""

    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(DeviceConfig):
    """How N networks are evaluated."""

    engine: Literal["auto", "stacked", "vmap", "loop"] = "auto"
    """auto: they take turns in the first steps until the fastest is known. All compute the same up
    to rounding; a run repeats itself to the last bit with an engine that is named"""
    channels_last: bool | None = None
    """memory format of images; None: the faster one if the engine is auto, no if it is named"""
    chunk: int | None = None
    """networks in one pass, two chunks' activations being kept at most; None for all"""
    batchnorm: Literal["refuse", "recalibrate"] = "refuse"
    """recalibrate: the running statistics of every network are computed anew from training data"""
    output: str = "logits"
    """name of the logits, an attribute or key of what the network returns; logits is also a tensor
    by itself, what is named out, or else the first tensor of a tuple or list"""
    mask: str | None = None
    """name of an input, in the logits' shape but for the classes, that is 0 where a row does not
    count, such as attention_mask; rows whose label is -100 never count"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineConfig):
    """Data, network and training of the two ends."""

    data: str = "digits"
    """digits (bundled), cifar10, cifar100, mnist, fashion-mnist (downloaded), npz:PATH, or
    PACKAGE.MODULE:FUNCTION, which returns (train, test), iterables of batches (inputs, labels)"""
    data_root: str = "~/.cache/fastgeo"
    """where downloads are kept"""
    train_subset: int | None = None
    """use the first so many training images; None for all"""
    augment: Literal["auto", "none", "flip-crop"] = "auto"
    """random mirror and 4-pixel reflected crop (paper); auto: for CIFAR only"""
    model: str = "resnet8"
    """resnet8, resnet14, resnet20, ... or mlp (paper: resnet20), or PACKAGE.MODULE:FUNCTION, which
    returns an nn.Module"""
    a: str | None = None
    """weights of end a, instead of training it: a state dict in a .safetensors or .pt file"""
    b: str | None = None
    """weights of end b"""
    count: int = 2
    """networks to train; the further ones, c, d, ..., are not used by later stages"""
    width: float = 0.5
    """factor on the ResNet's 16-32-64 channels, or on the MLP's 512 (paper: 4)"""
    norm: Literal["group", "channel"] = "group"
    """group: statistics over C, H, W (paper); channel: over C at each pixel (Git Re-Basin)"""
    seed_a: int = 0
    """weights, order and augmentation of end a (paper: 0)"""
    seed_b: int = 1
    """the same of end b (paper: 1); c, d, ... have the seeds that follow"""
    epochs: int = 20
    """passes over the training images (paper: 100)"""
    train_batch_size: int = 64
    """images of each network in a training step (paper: 128)"""
    train_lr: float = 0.1
    """peak of the one-cycle rate (paper)"""
    weight_decay: float = 1e-4
    """L2 penalty (paper)"""
    warmup_fraction: float = 0.1
    """share of the steps with rising rate, two steps at least (paper: pct_start)"""
    lr_start_divisor: float = 1e9
    """peak rate over first rate (paper: div_factor)"""
    lr_end_divisor: float = 1e6
    """first rate over last rate (paper: final_div_factor)"""
    momentum_low: float = 0.85
    """Nesterov momentum at the peak rate (paper)"""
    momentum_high: float = 0.95
    """Nesterov momentum at the first and last rate (paper)"""


@dataclass(frozen=True, kw_only=True)
class MatchConfig(DeviceConfig):
    """Weight matching of end b to end a."""

    match_method: Literal["weights", "activations"] = "weights"
    """weights: coordinate descent on the inner product of the parameters (paper); activations: by
    the correlations of the features on a batch of eval-batch-size training inputs"""
    match_restarts: int = 3
    """starts of the coordinate descent, the best of which is kept: b as it is (paper), from the
    fixed axes inwards, from the activations and mixtures of permutations, then random ones"""
    match_sweeps: int = 30
    """limit on the sweeps over all permutations in each (paper)"""
    match_seed: int = 0
    """of the order of the permutations in a sweep (paper: 0), and of random starts"""


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig(EngineConfig):
    """The path and its optimisation."""

    points: int = 25
    """N, networks on the path with both ends (paper)"""
    spacing: Literal["even", "release"] = "even"
    """even: point i at i / (N - 1) (paper); release: at i / (N + 1) (its public code)"""
    steps: int = 100
    """optimisation steps (paper: 3,920, 20 epochs of 196; a partial batch is left out here)"""
    batch_size: int = 128
    """images in an optimisation step (paper: 256)"""
    lr: float = 0.1
    """learning rate of the path (paper)"""
    momentum: float = 0.9
    """Nesterov momentum of the path, on the preconditioned gradient (paper: 0)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """the path's rate falls to 0, linearly or as half a cosine wave; constant: it stays (paper)"""
    precondition: bool = True
    """multiply the gradient by the inverse path Laplacian; no: the gradient itself (paper)"""
    coarse_to_fine: bool = True
    """begin with 5 points and insert midpoints on the way to N; no: all N from the start (paper)"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of convolutions and products in the optimisation; bf16: of all layers but the last, with the
    weights of the path and the divergence in fp32"""
    path_seed: int = 0
    """order and augmentation of the images in the optimisation"""
    memory_budget: str | None = None
    """choose the chunk so that the activations kept take at most so much, as in 8GiB"""
    cuda_graph: bool | None = None
    """the whole step is captured in a CUDA graph and replayed, without a GPU done one operation
    after the other; it is stacked, and on a GPU in channels-last, and no chunk is chosen. The host
    looks at it, and may save a state or stop, every 50 steps or five seconds. By default on a GPU
    where nothing forbids it"""

    @property
    def descent(self) -> Descent:
        return Descent(
            self.lr, self.momentum, self.lr_schedule, self.precondition, self.coarse_to_fine
        )


@dataclass(frozen=True, kw_only=True)
class StepConfig(OptimizeConfig, TrainConfig):
    """What an optimisation step depends on."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EngineConfig):
    """Evaluation of the three paths."""

    eval_batch_size: int = 256
    """images in one pass over all points"""


@dataclass(frozen=True, kw_only=True)
class Config(EvaluateConfig, OptimizeConfig, MatchConfig, TrainConfig):  # shown in reverse
    """All of a run."""

    def __post_init__(self) -> None:
        """ValueError on the first number that cannot be meant."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bounds = f"at least {low:g}" if high == math.inf else f"within {low:g}..{high:g}"
                raise ValueError(f"{flag(name)} must be {bounds}, got {value}")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} must be positive, got {getattr(self, name)}")
        if self.points < 3:
            raise ValueError(
                f"points must be at least 3 (two ends and one between), got {self.points}"
            )
        if (self.a is None) != (self.b is None):
            raise ValueError("--a and --b go together; give both files of weights or neither")
        if self.a is not None and self.count != 2:
            raise ValueError("--count is of networks to train; --a and --b are given instead")
        if self.chunk is not None and self.memory_budget is not None:
            raise ValueError("chunk and memory-budget both bound the memory; give one of them")
        if self.cuda_graph and self.engine not in ("auto", "stacked"):
            raise ValueError(f"--cuda-graph runs networks stacked, not as a {self.engine}")
        if self.cuda_graph and self.batchnorm != "refuse":
            raise ValueError("--cuda-graph has no --batchnorm recalibrate; leave one of them out")
        if self.memory_budget is not None:
            bytes_of(self.memory_budget)
        if len(set(self.seeds)) < self.count:
            raise ValueError(
                f"seed-a ({self.seed_a}) is one of the seeds from seed-b on: {self.seeds[1:]}"
            )

    @property
    def forward(self) -> Forward:
        """How networks are evaluated in training and evaluation."""
        return Forward(
            engine=self.engine,
            channels_last=self.channels_last,
            chunk=self.chunk,
            batchnorm=self.batchnorm,
            output=self.output,
            mask=self.mask,
        )

    @property
    def step_forward(self) -> Forward:
        """How networks are evaluated in the optimisation."""
        return replace(self.forward, memory_budget=self.memory_budget, precision=self.precision)

    @property
    def training(self) -> Training:
        return Training(**select(self, Training))

    @property
    def seeds(self) -> list[int]:
        """Of the networks a, b, c, ..."""
        return [self.seed_a, *range(self.seed_b, self.seed_b + self.count - 1)]


# Settings that an older config.json lacks, and what its run did.
BEFORE = {
    "output": "logits",
    "coarse_to_fine": False,
    "momentum": 0.0,
    "lr_schedule": "constant",
    "cuda_graph": None,
}
POSITIVE = ("train_lr", "lr", "lr_start_divisor", "lr_end_divisor", "width")
RANGES = {
    "width": (0, 1000),
    "weight_decay": (0, 1),
    "warmup_fraction": (0, 1),
    "momentum_low": (0, 1),
    "momentum_high": (0, 1),
    "momentum": (0, 0.999),
    "count": (2, 26),
} | dict.fromkeys(
    (
        "epochs",
        "train_batch_size",
        "batch_size",
        "eval_batch_size",
        "steps",
        "match_restarts",
        "match_sweeps",
        "chunk",
    ),
    (1, math.inf),
)
RANGES |= dict.fromkeys(("seed_a", "seed_b", "match_seed", "path_seed"), (0, 2**63 - 1))


def flag(field: str) -> str:
    """A field as it is written on the command line."""
    return field.replace("_", "-")


def select(config: Any, part: type) -> dict[str, Any]:
    """The fields of `config` that the dataclass `part` has."""
    return {f.name: getattr(config, f.name) for f in fields(part)}


@functools.cache
def about() -> dict[str, str]:
    """Setting -> what it means and where its default is from: the docstring of the field."""
    found = {}
    for part in Config.__mro__[:-1]:
        body = ast.parse(inspect.getsource(part)).body[0].body
        for statement, behind in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(behind, ast.Expr):
                found[statement.target.id] = " ".join(behind.value.value.split())
    return {field.name: found[field.name] for field in fields(Config)}


PRESETS = {
    # Of the pairs in benchmarks/results/seeds.json, one whose matched line has a clear bump. The
    # engine is the fastest here and named, so that a run repeats itself.
    "digits": Config(seed_a=14, seed_b=15, match_restarts=1, engine="stacked"),
    "cifar10": Config(
        data="cifar10",
        model="resnet20",
        width=1,
        epochs=40,
        train_batch_size=128,
        steps=400,
        batch_size=256,
    ),
    # What the paper shows, in small, for a CPU. The ends must fit their data, or no path between
    # them has a low loss: few images, small batches, and no augmentation.
    "paper-small": Config(
        data="cifar10",
        train_subset=1000,
        augment="none",
        width=1,
        epochs=60,
        train_batch_size=50,
        points=9,
        steps=900,
        batch_size=64,
        engine="stacked",
    ),
    "paper": Config(
        data="cifar10",
        model="resnet20",
        width=4,
        epochs=100,
        train_batch_size=128,
        match_restarts=1,
        steps=3920,
        batch_size=256,
        momentum=0.0,
        lr_schedule="constant",
        precondition=False,
        coarse_to_fine=False,
    ),
}

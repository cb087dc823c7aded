"""Every number of a run, with where it comes from, and the presets.

"Paper" is Tan et al., "Geodesic Mode Connectivity" (ICLR 2023 Tiny Papers) with its public code;
"Git Re-Basin" is Ainsworth et al. (2022).
"""

import functools
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import docstring_parser

from fastgeo.forward.options import Forward
from fastgeo.schedule import Training, within
from fastgeo.step.descent import Descent

SEEDS = (0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the networks are trained and evaluated on.

    Attributes:
        data: digits (bundled), cifar10, cifar100, mnist, fashion-mnist (downloaded), npz:PATH, or
            PACKAGE.MODULE:FUNCTION, which returns (train, test), iterables of batches (inputs,
            labels)
        data_root: where downloads are kept
        train_subset: use the first so many training images; None for all
        augment: random mirror and 4-pixel reflected crop (paper); auto: for CIFAR only
    """

    data: str = "digits"
    data_root: str = "~/.cache/fastgeo"
    train_subset: int | None = None
    augment: Literal["auto", "none", "flip-crop"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The two networks at the ends of the path.

    Attributes:
        model: resnet8, resnet14, resnet20, ... or mlp (paper: resnet20), or
            PACKAGE.MODULE:FUNCTION, which returns an nn.Module
        a: weights of end a, instead of training it: a state dict in a .safetensors or .pt file
        b: weights of end b
        count: networks to train; the further ones, c, d, ..., are not used by later stages
        width: factor on the ResNet's 16-32-64 channels, or on the MLP's 512 (paper: 4)
        norm: group: statistics over C, H, W (paper); channel: over C at each pixel (Git Re-Basin)
        seed_a: weights, order and augmentation of end a (paper: 0)
        seed_b: the same of end b (paper: 1); c, d, ... have the seeds that follow
    """

    model: str = "resnet8"
    a: str | None = None
    b: str | None = None
    count: int = 2
    width: float = 0.5
    norm: Literal["group", "channel"] = "group"
    seed_a: int = 0
    seed_b: int = 1

    def __post_init__(self) -> None:
        within(0, 1000, above=True, width=self.width)
        within(2, 26, count=self.count)
        within(*SEEDS, seed_a=self.seed_a, seed_b=self.seed_b)
        if (self.a is None) != (self.b is None):
            raise ValueError("--a and --b go together; give both files of weights or neither")
        if self.a is not None and self.count != 2:
            raise ValueError("--count is of networks to train; --a and --b are given instead")
        if len(set(self.seeds)) < self.count:
            raise ValueError(
                f"seed_a ({self.seed_a}) is one of the seeds from seed_b on: {self.seeds[1:]}"
            )

    @property
    def seeds(self) -> list[int]:
        """Of the networks a, b, c, ..."""
        return [self.seed_a, *range(self.seed_b, self.seed_b + self.count - 1)]

    @property
    def files(self) -> tuple[str, str] | None:
        """The weights of a and b, if they are given."""
        return None if self.a is None or self.b is None else (self.a, self.b)


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Weight matching of end b to end a.

    Attributes:
        match_method: weights: coordinate descent on the inner product of the parameters (paper);
            activations: by the correlations of the features on a batch of eval-batch-size training
            inputs
        match_restarts: starts of the coordinate descent, the best of which is kept: b as it is
            (paper), from the fixed axes inwards, from the activations and mixtures of permutations,
            then random ones
        match_sweeps: limit on the sweeps over all permutations in each (paper)
        match_seed: of the order of the permutations in a sweep (paper: 0), and of random starts
    """

    match_method: Literal["weights", "activations"] = "weights"
    match_restarts: int = 3
    match_sweeps: int = 30
    match_seed: int = 0

    def __post_init__(self) -> None:
        within(1, match_restarts=self.match_restarts, match_sweeps=self.match_sweeps)
        within(*SEEDS, match_seed=self.match_seed)


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """The points of the path and the steps of its optimisation.

    Attributes:
        points: N, networks on the path with both ends (paper)
        spacing: even: point i at i / (N - 1) (paper); release: at i / (N + 1) (its public code)
        steps: optimisation steps (paper: 3,920, 20 epochs of 196; a partial batch is left out here)
        batch_size: images in an optimisation step (paper: 256)
        path_seed: order and augmentation of the images in the optimisation
        cuda_graph: True: the whole step is captured in a CUDA graph and replayed, without a GPU
            done one operation after the other; it is stacked, and on a GPU in channels-last, and no
            chunk is chosen. The host looks at it, and may save a state or stop, every 50 steps or
            five seconds. None: on a GPU, where nothing forbids it
    """

    points: int = 25
    spacing: Literal["even", "release"] = "even"
    steps: int = 100
    batch_size: int = 128
    path_seed: int = 0
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        if self.points < 3:
            raise ValueError(
                f"points must be at least 3 (two ends and one between), got {self.points}"
            )
        within(1, steps=self.steps, batch_size=self.batch_size)
        within(*SEEDS, path_seed=self.path_seed)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation of the three paths.

    Attributes:
        eval_batch_size: images in one pass over all points
    """

    eval_batch_size: int = 256

    def __post_init__(self) -> None:
        within(1, eval_batch_size=self.eval_batch_size)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run.

    Attributes:
        device: auto (cuda where there is one), cpu, cuda, cuda:1, ...
        data: what the networks are trained and evaluated on
        ends: the two networks at the ends of the path
        training: how they are trained
        matching: how end b is permuted towards end a
        path: its points, and the steps of its optimisation
        descent: how its energy is descended
        forward: how N networks are evaluated. Presets name the stacked engine, with which a run
            repeats itself to the last bit; auto is often faster on a CPU. Precision and memory
            budget are those of the optimisation: training and evaluation are in fp32
        evaluation: of the line, the matched line and the geodesic
    """

    device: str = "auto"
    data: Data = Data()
    ends: Ends = Ends()
    training: Training = Training()
    matching: Matching = Matching()
    path: PathSettings = PathSettings()
    descent: Descent = Descent()
    forward: Forward = Forward(engine="stacked")
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        """ValueError on settings of two groups that exclude each other."""
        if self.path.cuda_graph and self.forward.engine not in ("auto", "stacked"):
            raise ValueError(f"--cuda-graph runs networks stacked, not as a {self.forward.engine}")
        if self.path.cuda_graph and self.forward.batchnorm != "refuse":
            raise ValueError("--cuda-graph has no --batchnorm recalibrate; leave one of them out")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Config":
        """From settings by their names alone.

        Raises:
            KeyError: one is missing.
            TypeError: one is unknown.
        """
        left = dict(settings)
        parts: dict[str, Any] = {}
        for part in fields(cls):
            if isinstance(part.type, type) and is_dataclass(part.type):
                own = {one.name: left.pop(one.name) for one in fields(part.type)}
                parts[part.name] = part.type(**own)
            else:
                parts[part.name] = left.pop(part.name)
        if left:
            raise TypeError(f"there is no setting {next(iter(left))!r}")
        return cls(**parts)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its name alone, which no two groups share."""
        found: dict[str, Any] = {}
        for name, part in vars(self).items():
            found |= vars(part) if is_dataclass(part) else {name: part}
        return found

    def changed(self, **settings: Any) -> "Config":
        """With some settings, by their names alone, of other values."""
        return Config.of(self.settings | settings)

    @property
    def forward_in_fp32(self) -> Forward:
        """How networks are evaluated in training and evaluation."""
        return replace(self.forward, precision="fp32", memory_budget=None)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When a long command saves its state and stops, and what it logs.

    Attributes:
        checkpoint_seconds: between two saved states; longer where saving one takes more than a
            twentieth of that
        max_minutes: stop with the state saved after so many, with exit code 75; --resume goes on
        log: also write what each step finds as csv when a stage ends or stops, or as it is found
            for tensorboard (which needs the package of that name)
    """

    checkpoint_seconds: float = 60.0
    max_minutes: float | None = None
    log: Literal["csv", "tensorboard"] | None = None
    started: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        if not self.checkpoint_seconds >= 0:
            raise ValueError(
                f"checkpoint-seconds must not be negative, got {self.checkpoint_seconds}"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max-minutes must be positive, got {self.max_minutes}")
        if self.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--log tensorboard needs a package: pip install tensorboard")


def flag(setting: str) -> str:
    """A setting as it is written on the command line."""
    return setting.replace("_", "-")


@functools.cache
def meanings(group: type) -> dict[str, str]:
    """Attribute -> what its class, or one it inherits from, says of it."""
    found = {}
    for part in reversed(group.__mro__[:-1]):
        for said in docstring_parser.parse(part.__doc__ or "").params:
            found[said.arg_name] = " ".join((said.description or "").split())
    return found


def about() -> dict[str, str]:
    """Setting -> what it means and where its default is from."""
    found = {"device": meanings(Config)["device"]}
    for part in fields(Config):
        if isinstance(part.type, type) and is_dataclass(part.type):
            found |= meanings(part.type)
    return found


PRESETS = {
    # Of the pairs in benchmarks/results/seeds.json, one whose matched line has a clear bump.
    "digits": Config(ends=Ends(seed_a=14, seed_b=15), matching=Matching(match_restarts=1)),
    "cifar10": Config(
        data=Data(data="cifar10"),
        ends=Ends(model="resnet20", width=1),
        training=Training(epochs=40, train_batch_size=128),
        path=PathSettings(steps=400, batch_size=256),
    ),
    # What the paper shows, in small, for a CPU. The ends must fit their data, or no path between
    # them has a low loss: few images, small batches, and no augmentation.
    "paper-small": Config(
        data=Data(data="cifar10", train_subset=1000, augment="none"),
        ends=Ends(width=1),
        training=Training(epochs=60, train_batch_size=50),
        path=PathSettings(points=9, steps=900, batch_size=64),
    ),
    "paper": Config(
        data=Data(data="cifar10"),
        ends=Ends(model="resnet20", width=4),
        training=Training(epochs=100, train_batch_size=128),
        matching=Matching(match_restarts=1),
        path=PathSettings(steps=3920, batch_size=256),
        descent=Descent(
            momentum=0.0, lr_schedule="constant", precondition=False, coarse_to_fine=False
        ),
    ),
}

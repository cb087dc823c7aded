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
Precision = Literal["fp32", "tf32", "bf16", "auto"]
Format = Literal["png", "pdf", "svg"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the networks are trained and evaluated on.

    Attributes:
        data: digits (bundled), cifar10, cifar100, mnist, fashion-mnist (downloaded), npz:PATH,
            text:FILE_OR_FOLDER, text:stdlib (sources of Python's standard library), or
            PACKAGE.MODULE:FUNCTION, which returns two iterables, (train, test), of batches (inputs,
            labels)
        data_root: folder where downloads are kept
        train_subset: how many training images, or blocks of a text, to use, from the first on; None
            for all
        block_size: tokens in a block of a text
        tokens: of a text: characters, bytes, or PACKAGE.MODULE:FUNCTION, which is given the text
            and returns its tokens and the size of their vocabulary
        augment: flip-crop: mirror images at random and crop them after 4 pixels of reflected
            padding (paper); auto: do so on CIFAR only
    """

    data: str = "digits"
    data_root: str = "~/.cache/fastgeo"
    train_subset: int | None = None
    block_size: int = 64
    tokens: str = "characters"
    augment: Literal["auto", "none", "flip-crop"] = "auto"

    def __post_init__(self) -> None:
        within(1, block_size=self.block_size)

    @property
    def file(self) -> str | None:
        """The file or folder that the data are read from, if there is one."""
        kind, _, name = self.data.partition(":")
        return name if kind in ("npz", "text") and self.data != "text:stdlib" else None


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The two networks at the ends of the path.

    Attributes:
        model: resnet8, resnet14, resnet20, ... or mlp (paper: resnet20); gpt for text; or
            PACKAGE.MODULE:FUNCTION, which returns an nn.Module
        a: file with the weights of end a, which is then not trained: a state dict in a .safetensors
            or .pt file, or RUN/ends.safetensors#a of an earlier run
        b: the same for end b
        count: how many networks to train; later stages use the first two, a and b, only
        width: factor on the ResNet's 16-32-64 channels, the MLP's 512, or the GPT's 128 (paper: 4)
        depth: blocks of the GPT
        norm: group: normalise over C, H and W together (paper); channel: over C at each pixel (Git
            Re-Basin). Both are LayerNorm over C at each token in a GPT, and rms is RMSNorm there
        seed_a: seed of the first weights, the order of the images and their augmentation, for end
            a (paper: 0)
        seed_b: the same for end b (paper: 1); the networks c, d, ... take the seeds that follow
        train_precision: of their training. tf32 rounds the factors of products on a GPU, as torch
            does for convolutions by itself, and is fp32 on a CPU
    """

    model: str = "resnet8"
    a: str | None = None
    b: str | None = None
    count: int = 2
    width: float = 0.5
    depth: int = 2
    norm: Literal["group", "channel", "rms"] = "group"
    seed_a: int = 0
    seed_b: int = 1
    train_precision: Precision = "tf32"

    def __post_init__(self) -> None:
        within(0, 1000, above=True, width=self.width)
        within(2, 26, count=self.count)
        within(1, depth=self.depth)
        within(*SEEDS, seed_a=self.seed_a, seed_b=self.seed_b)
        if (self.a is None) != (self.b is None):
            raise ValueError("--a and --b go together; give both files of weights or neither")
        if self.a is not None and self.count != 2:
            raise ValueError(
                "--count says how many networks to train, and --a and --b replace training; leave "
                "one of them out"
            )
        if len(set(self.seeds)) < self.count:
            raise ValueError(
                f"the networks need different seeds: seed_a is {self.seed_a}, and those from "
                f"seed_b on are {', '.join(map(str, self.seeds[1:]))}"
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
        match_method: weights: maximise the inner product of the parameters by coordinate descent
            (paper); activations: pair features by their correlations on a batch of eval-batch-size
            training inputs
        match_restarts: how many starts the coordinate descent has, the best of which is kept: first
            b as it is (paper), then one that goes from the fixed axes inwards, then one from the
            activations through mixtures of permutations, then random ones
        match_sweeps: from each start, go over all permutations at most so many times (paper)
        match_seed: seed of the order of the permutations in a sweep (paper: 0) and of random starts
        symmetries: permutation: of channels (paper); all: rotations of a transformer's residual
            stream and invertible maps within its heads, too, for which both ends are brought to one
            form first
    """

    match_method: Literal["weights", "activations"] = "weights"
    match_restarts: int = 3
    match_sweeps: int = 30
    match_seed: int = 0
    symmetries: Literal["permutation", "all"] = "permutation"

    def __post_init__(self) -> None:
        within(1, match_restarts=self.match_restarts, match_sweeps=self.match_sweeps)
        within(*SEEDS, match_seed=self.match_seed)
        if self.symmetries == "all" and self.match_method != "weights":
            raise ValueError(
                "--symmetries all and --match-method activations exclude each other; leave one of "
                "them out"
            )


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """The points of the path and the steps of its optimisation.

    Attributes:
        points: N, the number of networks on the path, both ends included (paper: 25)
        curve: points: all N points move, with straight lines between them (paper); bezier or
            polychain: a curve of few control points moves, and the N points lie on it
        controls: control points of a bezier between its ends, or bends of a polychain
        spacing: even: point i starts at i / (N - 1) of the way (paper); release: at i / (N + 1), as
            in the paper's public code
        steps: optimisation steps (paper: 3,920, which is 20 epochs of 196; the last, partial batch
            of an epoch is left out here)
        batch_size: images, or blocks of a text, in an optimisation step (paper: 256)
        path_seed: seed of the order and augmentation of the images in the optimisation
        cuda_graph: True: capture the whole step in a CUDA graph and replay it, and losses and
            gradients of the training. Networks are stacked then, on a GPU in channels-last, and no
            chunk is chosen; states are saved, and the run can stop, every 50 steps or five seconds.
            Without a GPU the operations run one by one. None: do so on a GPU where nothing forbids
            it
    """

    points: int = 25
    curve: Literal["points", "bezier", "polychain"] = "points"
    controls: int = 1
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
        within(1, self.points - 2, controls=self.controls)
        if self.curve == "points" and self.controls > 1:
            raise ValueError(
                "--controls are those of a curve; give --curve bezier or polychain, too, or leave "
                "them out"
            )
        if self.curve != "points" and self.spacing != "even":
            raise ValueError(
                f"a {self.curve} has its control points at even places; leave out --spacing, "
                "or give --method geodesic"
            )
        within(1, steps=self.steps, batch_size=self.batch_size)
        within(*SEEDS, path_seed=self.path_seed)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation of the line, the matched line and the optimised path.

    Attributes:
        eval_batch_size: images, or blocks of a text, in one pass over all points of a path
        eval_precision: of that, as train-precision; losses are in fp32
    """

    eval_batch_size: int = 256
    eval_precision: Precision = "tf32"

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
        forward: how N networks are evaluated. The presets name the stacked engine, so that a run
            repeats itself to the last bit; auto is often faster on a CPU. The memory budget is for
            the optimisation alone, and so is the precision: training and evaluation have their own
        evaluation: how the line, the matched line and the optimised path are evaluated
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
            raise ValueError(
                "--cuda-graph and --batchnorm recalibrate exclude each other; leave one of them out"
            )

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

    def by(self, method: str) -> "Config":
        """With the curve, the objective and the nodes of one of `METHODS`."""
        return self.changed(**METHODS[method])

    @property
    def method(self) -> str:
        """What the optimised path is called: that of its curve."""
        return next(name for name, own in METHODS.items() if own["curve"] == self.path.curve)

    def forward_of(self, stage: str) -> Forward:
        """How networks are evaluated in a stage: train, optimize or evaluate."""
        if stage == "optimize":
            return self.forward
        own = {"train": self.ends.train_precision, "evaluate": self.evaluation.eval_precision}
        return replace(self.forward, precision=own[stage], memory_budget=None)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When a long command saves its state and stops, and what it logs.

    Attributes:
        checkpoint_seconds: how often the state is saved; less often if saving would take more than
            a twentieth of the time
        max_minutes: save the state after so many minutes and stop with exit code 75; --resume goes
            on
        log: also write what each step finds: csv, a table when a stage ends or stops; tensorboard,
            step by step (needs the package of that name)
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


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the figures of a run are drawn.

    Attributes:
        format: png, or pdf or svg beside the png, which report.md shows
        dpi: dots per inch of a png
        title: what stands above the figures, "" for nothing; by default the network, the data and
            the number of points
    """

    format: Format = "png"
    dpi: int = 300
    title: str | None = None

    def __post_init__(self) -> None:
        within(10, 2400, dpi=self.dpi)

    def files(self, figure: str) -> list[str]:
        """The names of the files of a figure."""
        return [f"{figure}.{form}" for form in sorted({"png", self.format})]


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


METHODS: dict[str, dict[str, Any]] = {
    "geodesic": dict(curve="points", controls=1, objective="jsd", nodes=None),
    "bezier": dict(curve="bezier", controls=1, spacing="even", objective="jsd", nodes=3),
    "polychain": dict(curve="polychain", controls=1, spacing="even", objective="jsd", nodes=3),
}

PRESETS = {
    # Of the pairs in benchmarks/results/seeds.json, one whose matched line has a clear bump.
    "digits": Config(ends=Ends(seed_a=14, seed_b=15), matching=Matching(match_restarts=1)),
    "cifar10": Config(
        data=Data(data="cifar10"),
        ends=Ends(model="resnet20", width=1),
        training=Training(epochs=40, train_batch_size=128),
        path=PathSettings(steps=400, batch_size=256),
    ),
    # A model of characters. The rate is high, since SGD hardly moves the weights of attention.
    "text": Config(
        data=Data(data="text:stdlib", train_subset=4096),
        ends=Ends(model="gpt"),
        training=Training(
            epochs=4, train_batch_size=32, optimizer="adamw", train_lr=4e-3, weight_decay=0.01
        ),
        matching=Matching(match_restarts=1),
        path=PathSettings(points=9, steps=400, batch_size=32),
        descent=Descent(lr=1.0),
        evaluation=Evaluation(eval_batch_size=64),
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
# The paper's experiment with what this project adds: bf16, and descent in a tenth of the steps.
PRESETS["paper-fast"] = PRESETS["paper"].changed(
    steps=392,
    precision="bf16",
    train_precision="bf16",
    **vars(Descent()),
)

# What makes a curve cost as many passes of one network as the preset's geodesic.
CURVES: dict[str, dict[str, Any]] = {
    "digits": dict(steps=286, lr=0.2),
    "cifar10": dict(steps=1146),
    "paper-small": dict(steps=1300),
}
# Where a Bezier curve is known to be better at that cost (benchmarks/README.md).
DEFAULT_METHODS = {"digits": "bezier"}


def chosen(preset: str, method: str | None = None) -> Config:
    """The settings of a preset by a method; by default, a curve where that is known to be better.

    Raises:
        ValueError: there is no such preset or method.
    """
    for name, value, known in (("preset", preset, PRESETS), ("method", method, METHODS)):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    method = method or DEFAULT_METHODS.get(preset, "geodesic")
    config = PRESETS[preset].by(method)
    return config if method == "geodesic" else config.changed(**CURVES.get(preset, {}))

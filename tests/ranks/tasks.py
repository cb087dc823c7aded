"""What the processes of a mesh are asked to do; each is a function of the mesh."""

import errno
import functools
import os
import signal
import time
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path as FilePath

import torch
import torch.distributed as dist
from cases import CASES, GEODESIC, LABELLED, STACKED, Net, inputs, linear, run, with_labels
from torch.utils._python_dispatch import TorchDispatchMode

from fastgeo import Checkpoints, Forward, Path, evaluate, optimize
from fastgeo.profiling import breakdown
from fastgeo.ranks import alike, states
from fastgeo.ranks.gather import gather
from fastgeo.step.step import Step
from fastgeo.store import checkpoint


def quietly(task):
    """Without warnings of an energy that did not fall, which is not what is looked at."""

    @functools.wraps(task)
    def quiet(*args):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the (energy|loss) did not fall")
            return task(*args)

    return quiet


@quietly
def optimized(mesh, name: str) -> tuple[dict, list]:
    """Weights of the whole path, and the history."""
    section = run(name, mesh=mesh)
    return gather(section, mesh).interior, section.history


@quietly
def in_fp32(mesh) -> dict:
    path, batches = linear(9, torch.float32), [inputs(64, seed).float() for seed in range(3)]
    how = dict(steps=6, descent=GEODESIC, forward=Forward(engine="loop"), mesh=mesh)
    path = optimize(path, Net(), batches, **how)
    return (path if mesh is None else gather(path, mesh)).interior


@quietly
def sections(mesh) -> tuple[list, Path, Path]:
    """What on_step is given, which the first rank has none of; the result and the whole."""
    path, batches, descent, forward = CASES["coarse to fine"]()
    seen: list = []
    on_step = None
    if dist.get_rank():
        on_step = lambda metrics, section: seen.append((metrics, section))  # noqa: E731
    how = dict(steps=8, descent=descent, forward=forward, mesh=mesh, on_step=on_step)
    result = optimize(path, Net().double(), batches, **how)
    return seen, result, gather(result, mesh)


def evaluated(mesh) -> dict:
    """In float64, of five batches of other sizes, in some of which rows do not count."""
    path, module = linear(6), Net().double()
    splits = {"one": LABELLED + [with_labels(8, 3)], "other": (inputs(30), torch.arange(30) % 5)}
    how = dict(batch_size=7, forward=STACKED, mesh=mesh)
    return evaluate(path, module, splits, **how).to_json()


# --- States ---------------------------------------------------------------------------------------


@quietly
def with_states(mesh, folder: FilePath, name: str, stop: int | None):
    """Go on from the state there, until a signal comes to the last rank at a step."""
    states.SHARE = checkpoint.SHARE = 0  # every step is saved
    with Checkpoints(folder, seconds=0, log=folder.with_suffix(".jsonl")) as checkpoints:
        last = mesh is None or dist.get_rank() == dist.get_world_size() - 1

        def on_step(metrics, path) -> None:
            if metrics["step"] == stop and last:
                checkpoints._ask(signal.SIGTERM, None)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = run(name, mesh=mesh, checkpoints=checkpoints, on_step=on_step)
    told = [str(w.message) for w in caught if "going on" in str(w.message)]
    return (path if mesh is None else gather(path, mesh)).interior, told


# --- Errors ---------------------------------------------------------------------------------------


def not_finite(mesh, where: str):
    path, module, lr = linear(9), Net().double(), 0.1
    if where == "weights":
        path.interior["first.weight"][5, 2, 3] = torch.nan
    else:
        lr = 1e300
    how = dict(descent=replace(GEODESIC, lr=lr), forward=STACKED, mesh=mesh)
    optimize(path, module, [inputs()], steps=4, **how)


def loader_raises(mesh):
    def batches():
        for step in range(6):
            if step == 3 and dist.get_rank() == 1:
                raise OSError("the disk of the data went away")
            yield inputs(seed=step)

    optimize(
        linear(9), Net().double(), batches(), steps=6, mesh=mesh, descent=GEODESIC, forward=STACKED
    )


def loaders_disagree(mesh):
    batches = [inputs(seed=3 + (step == 2) * dist.get_rank()) for step in range(4)]
    optimize(
        linear(9), Net().double(), batches, steps=4, mesh=mesh, descent=GEODESIC, forward=STACKED
    )


def one_loader_ends(mesh):
    batches = iter([inputs()] * (5 - (dist.get_rank() == 0)))
    optimize(
        linear(9), Net().double(), batches, steps=5, mesh=mesh, descent=GEODESIC, forward=STACKED
    )


def settings_differ(mesh):
    descent = replace(GEODESIC, lr=0.1 + dist.get_rank())
    optimize(
        linear(9), Net().double(), [inputs()], steps=5, mesh=mesh, descent=descent, forward=STACKED
    )


class Failing(Net):
    """Fails on one rank after so many forward passes."""

    calls = 0

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def forward(self, x):
        Failing.calls += 1
        if dist.get_rank() == 1 and Failing.calls == self.at:
            raise MemoryError("no room for the activations")
        return super().forward(x)


def network_fails(mesh, forward: Forward, steps: int):
    """In a step, after some points were evaluated and their logits sent."""
    Failing.calls = 0
    module = Failing(10**9).double()
    how = dict(steps=2, mesh=mesh, descent=GEODESIC, forward=forward)
    optimize(linear(13), module, [inputs()], **how)
    counted, Failing.calls = Failing.calls, 0
    optimize(linear(13), Failing(counted - steps).double(), [inputs()], **how)


def callback_raises(mesh):
    def on_step(metrics, path):
        if metrics["step"] == 2 and dist.get_rank() == 0:
            raise ValueError("nobody reads this")

    how = dict(steps=5, mesh=mesh, descent=GEODESIC, forward=STACKED, on_step=on_step)
    optimize(linear(9), Net().double(), [inputs()], **how)


def folder_is_a_file(mesh, file: FilePath):
    file.touch()
    with Checkpoints(file / "states", seconds=0) as checkpoints:
        how = dict(steps=5, mesh=mesh, descent=GEODESIC, forward=STACKED)
        optimize(linear(9), Net().double(), [inputs()], checkpoints=checkpoints, **how)


class Full:
    """A file on a disk that is full."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_is_full(mesh, folder: FilePath, what: str):
    """Of rank 0, when it has written three times."""
    owner = {"state": states, "log": checkpoint._Log}[what]
    name = {"state": "write_tensors", "log": "append"}[what]
    original, calls = getattr(owner, name), count(1)

    def write(*args):
        full = next(calls) > 3
        if full and what == "state":
            Full(None).write(b"")
        elif full:
            args[0]._stream = Full(args[0]._stream)
        return original(*args)

    states.SHARE = checkpoint.SHARE = 0
    if not dist.get_rank():
        setattr(owner, name, write)
    try:
        with Checkpoints(folder / what, seconds=0, log=folder / f"{what}.log") as checkpoints:
            run("geodesic", mesh=mesh, checkpoints=checkpoints)
    finally:
        setattr(owner, name, original)


def folders_differ(mesh, folder: FilePath):
    """As on a node that does not see the folder of the others."""
    with Checkpoints(folder / str(dist.get_rank()), seconds=0) as checkpoints:
        run("geodesic", mesh=mesh, checkpoints=checkpoints)


class Coupled(Net):
    """Outputs of an input depend on the others of its batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def coupled(mesh):
    optimize(
        linear(5),
        Coupled().double(),
        [inputs()],
        steps=2,
        mesh=mesh,
        descent=GEODESIC,
        forward=STACKED,
    )


# --- What is sent and held ------------------------------------------------------------------------


@quietly
def phases(mesh) -> breakdown.Breakdown:
    """Where a step's time goes, one rank being late in each."""
    breakdown.matmul_rate = lambda *_: 1e9  # which is not looked at

    def batches():
        while True:
            time.sleep(0.05 * dist.get_rank())
            yield inputs()

    descent = replace(GEODESIC, lr_schedule="constant")
    how = dict(descent=descent, forward=STACKED, mesh=mesh)
    return breakdown.breakdown(Net().double(), linear(9), batches(), **how)


def written() -> int:
    """Bytes that this process has handed to the system so far, sockets included."""
    lines = FilePath("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


class Wide(torch.nn.Module):
    """Of many weights, so that messages are long beside their headers."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Sequential(torch.nn.Linear(40, 90), torch.nn.Tanh())
        self.head = torch.nn.Linear(90, 30)

    def forward(self, x):
        return self.head(self.body(x))


class Allocated(TorchDispatchMode):
    """Shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                if tensor.untyped_storage().data_ptr() not in given:
                    self.shapes.add(tensor.shape)
        return result


def traffic(mesh, points: int) -> dict:
    """Bytes a step by kind, those that the system has seen, the shapes of new tensors, and how many
    bytes of weights, momentum and masters stay."""
    made, ranks, held = [], alike.Ranks, []
    step_init = Step.__init__
    Step.__init__ = lambda self, *a, **k: step_init(self, *a, **k) or held.append(self._blocks)
    alike.Ranks = lambda mesh: made.append(ranks(mesh)) or made[-1]
    seen: list[tuple[dict, int]] = []
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))

    def batches():
        while True:
            seen.append((dict(made[0].sent), written()))
            yield x

    path = Path.linear(Wide(1), Wide(2), points)
    how = dict(steps=12, descent=GEODESIC, forward=Forward(engine="stacked", chunk=2), mesh=mesh)
    try:
        with Allocated() as allocated:
            optimize(path, Wide(), batches(), **how)
    finally:
        alike.Ranks, Step.__init__ = ranks, step_init
    own = {t.data_ptr(): t.nbytes for b in held[-1] for t in (b.weight, b.velocity, b.master)}
    (before, early), (after, late) = seen[2], seen[10]
    sent = {kind: (after[kind] - before.get(kind, 0)) / 8 for kind in after}
    seen_by_system = (late - early) / 8
    return dict(sent=sent, seen=seen_by_system, shapes=allocated.shapes, held=sum(own.values()))

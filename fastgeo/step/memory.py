"""How much memory a step takes, before it is taken, and how much there is.

A network that is evaluated keeps its activations for the backward pass, which are counted
(`step_memory`). Beside those the pass itself needs room, in proportion to the networks in it:
gradients of activations and, on a CPU, oneDNN's copies in other memory formats. That share is
measured, not derived (`python -m benchmarks.memory --estimate`).
"""

import re
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor

from fastgeo.data.inputs import Inputs, tensors_of
from fastgeo.stacking.module import Parameters, StackedModule
from fastgeo.stacking.products import Products
from fastgeo.step.logits import LARGE, most_in

ROOM = {"cpu": 1.2, "cuda": 0.5}  # of a network's activations; that of cuda was not measured
# Of all networks' weights, alive at once. On a path they are those of this step, the one before and
# the next, the gradient and the preconditioned one; with momentum, three velocities as well.
COPIES = {"training": 6, "optimisation": 5, "optimisation, momentum": 8, "evaluation": 2}
ROWS = 4  # times `LARGE`: the logits of three slices of points, put together, and the gradient
AT_START = 50 * 2**20  # bytes of libraries that the first step loads, beside any network


def path_work(momentum: float) -> str:
    """The key of `COPIES` of optimising a path."""
    return "optimisation, momentum" if momentum else "optimisation"


def point_bytes(parameters: int, *, momentum: bool, ranks: int) -> dict[str, int]:
    """What a rank of a mesh holds of each of its control points, in bytes, beside activations.

    Args:
        parameters: P, of those that are trained, in fp32.
        ranks: how many hold the same points, and share what is updated.
    """
    whole, own = 4 * parameters, 4 * -(-parameters // ranks)
    held = {"weights": whole, "gradient": whole}
    held |= {"momentum": own} if momentum else {}
    return held | ({"masters": own} if ranks > 1 else {})


@dataclass(frozen=True)
class StepMemory:
    """What a step takes.

    Attributes:
        weights: bytes of all networks' weights, gradients and copies.
        activations: bytes that one network keeps.
        room: share of them for each network in one pass, while the pass is done.
        at_once: whether the networks in one chunk are in one pass (not so in a loop).
        kept: whether activations are kept for a backward pass.
        rows: bytes of logits, and of what is made of them, where these come by rows.
    """

    weights: int
    activations: int
    room: float
    at_once: bool
    kept: bool = True
    rows: int = 0

    def peak(self, networks: int, chunk: int | None = None, *, streamed: bool = True) -> int:
        """Bytes of a step on so many networks.

        Args:
            chunk: networks in one pass; None for all.
            streamed: whether a chunk waits for the next one's logits, as on a path.
        """
        size = min(chunk or networks, networks)
        alive = min(networks, 2 * size if streamed else size) if self.kept else 0
        passing = size if self.at_once else 1
        fixed = AT_START + self.weights + self.rows
        return int(fixed + self.activations * (alive + self.room * passing))

    def fitting(self, networks: int, free: int, *, streamed: bool = True) -> int | None:
        """The largest chunk that takes no more than so many bytes; None if not even 1 does."""
        for chunk in range(networks, 0, -1):
            if self.peak(networks, chunk, streamed=streamed) <= free:
                return chunk
        return None


def activation_bytes(
    network: StackedModule,
    params: Parameters,
    inputs: Inputs,
    *,
    per_point: bool = False,
    most: int | None = None,
) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside its parameters and inputs.

    Args:
        network: what `stack` returned.
        params: name -> [N, ...].
        inputs: [B, ...], or [N, B, ...] if per_point.
        most: as of `StackedModule.by_rows`; of outputs that are more none is kept.
    """
    return _kept(network, params, inputs, per_point, most)[0]


def _kept(
    network: StackedModule, params: Parameters, inputs: Inputs, per_point: bool, most: int | None
) -> tuple[int, bool]:
    """As `activation_bytes`, and whether outputs come by rows."""
    own = dict(network.module.named_parameters(remove_duplicate=False))
    leaves = {
        name: tensor.detach().requires_grad_(name in own and tensor.is_floating_point())
        for name, tensor in params.items()
    }
    given = [*leaves.values(), *tensors_of(inputs)]
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network.by_rows(leaves, inputs, most, per_point=per_point)
        if isinstance(outputs, Tensor):
            keep(outputs)
        elif isinstance(outputs, Products):
            for tensor in (t for product in outputs for t in product.parts.values()):
                keep(tensor)
    return sum(kept.values()), isinstance(outputs, Products)


def step_memory(
    network: StackedModule,
    params: Parameters,
    inputs: Inputs,
    *,
    networks: int,
    work: str = "optimisation",
    per_point: bool = False,
    scale: float = 1.0,
) -> StepMemory:
    """The memory of a step, from a forward pass of one network on a few inputs.

    Args:
        network: what `stack` returned, of a module in the mode that it is to be evaluated in.
        params: name -> [1, ...] of one network.
        inputs: [B, ...], or [1, B, ...] if per_point.
        networks: how many there are in a step.
        work: what the step is of, a key of `COPIES`.
        scale: how many times as many inputs a step has.
    """
    most = most_in(work, networks, scale)
    kept, by_rows = _kept(network, params, inputs, per_point, most)
    first = next(iter(params.values()))
    weights = networks * COPIES[work] * sum(tensor.nbytes for tensor in params.values())
    return StepMemory(
        weights,
        int(kept * scale),
        ROOM[first.device.type],
        at_once=network.engine != "loop",
        rows=ROWS * LARGE * first.itemsize if by_rows else 0,
    )


def free_bytes(device: torch.device) -> int | None:
    """How much more this process may take on a device; None where nothing tells."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    found = re.search(r"MemAvailable:\s*(\d+) kB", _text(FilePath("/proc/meminfo")))
    free = [] if found is None else [1024 * int(found[1])]
    free += [left for group in _groups() if (left := _left(*group)) is not None]
    return min(free, default=None)


def _groups() -> list[tuple[FilePath, str, str, str]]:
    """Control groups of this process: folder, and names of the limit, use and reclaimable part."""
    groups = []
    for line in _text(FilePath("/proc/self/cgroup")).splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            root = FilePath("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = FilePath("/sys/fs/cgroup/memory")
        else:
            continue
        folder = root / own.lstrip("/")
        places = [place for place in (folder, *folder.parents) if place.is_relative_to(root)]
        groups += [(place, *names) for place in places]
    return groups


def _left(folder: FilePath, limit: str, used: str, reclaimable: str) -> int | None:
    numbers = [_text(folder / name).strip() for name in (limit, used)]
    if not all(number.isdigit() for number in numbers):  # no limit is "max"
        return None
    found = re.search(rf"^{reclaimable} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return int(numbers[0]) - int(numbers[1]) + (int(found[1]) if found else 0)


def _text(file: FilePath) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

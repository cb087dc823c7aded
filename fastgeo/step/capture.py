"""Work on a stream of batches that a GPU replays from a CUDA graph, without the host in between."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgeo.forward.options import Forward
from fastgeo.stacking.module import StackedModule
from fastgeo.stacking.precision import multiplies_in_bf16

AT_ONCE = 50  # captured steps that the host reads together
WARM_UP = 3  # runs before a capture, in which libraries choose and compile what they run
SECONDS = 5.0  # to the next look at them, about
T = TypeVar("T")


class NotCaptured(ValueError):
    """Why a step cannot be captured."""


def captures(asked: bool | None, forward: Forward, device: torch.device) -> bool:
    """Whether steps are captured: as asked, or on a GPU where the settings allow it."""
    if asked is not None:
        return asked
    stackable = forward.engine in ("auto", "stacked") and forward.batchnorm == "refuse"
    return device.type == "cuda" and stackable


def captured_forward(forward: Forward, device: torch.device) -> Forward:
    """How networks are evaluated in a graph, in which nothing can take turns to be measured."""
    layout = forward.channels_last
    if layout is None:
        layout = device.type == "cuda"
    return replace(not_measured(forward, device), engine="stacked", channels_last=layout)


def not_measured(forward: Forward, device: torch.device) -> Forward:
    """With the precision that suits a device, in place of the one that would prove to."""
    if forward.precision != "auto":
        return forward
    return replace(forward, precision="bf16" if multiplies_in_bf16(device) else "fp32")


def check_capturable(network: StackedModule) -> None:
    """NotCaptured, naming the line, if a forward that has run looks at numbers on the device."""
    for line in network.reads():
        name = type(network.module).__name__
        raise NotCaptured(f"{name} reads numbers back from the device, {line}")


@contextlib.contextmanager
def plans_measured() -> Iterator[None]:
    """In which cuDNN times its ways to convolve tensors of a form that it has not seen, and keeps
    the fastest for later, unless results are to repeat: it may choose differently in another run.

    Around all that runs before a capture, in which nothing can be timed and all forms are known.
    """
    cudnn = torch.backends.cudnn
    before, repeatable = cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = before or not (cudnn.deterministic or repeatable)
    try:
        yield
    finally:
        cudnn.benchmark = before


def paced(most: int, each: float) -> int:
    """How many steps of so many seconds to take before the host looks at them: a few seconds'."""
    return min(most, max(1, int(SECONDS / max(each, 1e-6))))


class Replay(Generic[T]):
    """Work on batches: captured at the first one, and replayed on all of the same form.

    Batches of another form are worked on operation by operation, as all are without a GPU.

    Args:
        work: takes a batch, any nest of tensors; it never waits for the device.
        device: where.
        changed: tensors that the work changes, which warming up leaves as they were.
    """

    def __init__(self, work: Callable[[Any], T], device: torch.device, changed: list[Tensor]):
        self._work, self._device, self._changed = work, device, changed
        self._form: Any = None  # of the batch that is captured
        self._held: list[Tensor] = []  # its tensors, at fixed places
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: T

    def __call__(self, batch: Any) -> T:
        leaves, form = _taken_apart(batch)
        if self._form is None:
            self._form, self._held = form, [leaf.clone() for leaf in leaves]
            if self._device.type == "cuda":
                self._capture()
        if form != self._form:
            return self._work(batch)
        torch._foreach_copy_(self._held, leaves)
        return self.again()

    def again(self) -> T:
        """Once more on the batch that is held."""
        if self._graph is None:
            return self._work(self._batch())
        self._graph.replay()
        return self._found

    def warm_up(self) -> None:
        """Runs that leave everything as it was."""
        kept = [tensor.clone() for tensor in self._changed]
        with plans_measured():
            for _ in range(WARM_UP):
                self._work(self._batch())
                for tensor, before in zip(self._changed, kept, strict=True):
                    tensor.copy_(before)

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # or what only cycles hold stays beside the graph's own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # nothing runs
            self._found = self._work(self._batch())

    def _batch(self) -> Any:
        """The batch at its fixed place."""
        structure, others, _ = self._form
        held = iter(self._held)
        leaves = [next(held) if other is Tensor else other for other in others]
        return pytree.tree_unflatten(leaves, structure)


def _taken_apart(value: Any) -> tuple[list[Tensor], Any]:
    """All tensors in a value, and what it is beside their numbers."""
    leaves, structure = pytree.tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tensors, (structure, others, [(t.shape, t.dtype) for t in tensors])

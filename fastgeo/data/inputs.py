"""Inputs of a network: one tensor, or several by the names of its forward's arguments."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Tensor | Mapping[str, Any]  # [B, ...]; a mapping holds keyword arguments of forward


def is_inputs(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(torch.is_tensor, value.values()))
    return isinstance(value, Tensor)


def arguments(module: nn.Module, inputs: Inputs) -> tuple[tuple, dict[str, Any]]:
    """What a module is called with on inputs: (args, kwargs).

    Labels, of which a module would compute a loss, are left out, and caches of a language model are
    off: neither is needed for logits.
    """
    args: tuple = (inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        args, kwargs = (), {name: value for name, value in inputs.items() if name != "labels"}
    if "use_cache" in inspect.signature(module.forward).parameters:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def tensors_within(value: Any) -> Iterator[Tensor]:
    """All tensors in what a module returns, those that objects of a class of its own hold, too."""
    seen, waiting = set(), [value]
    while waiting:
        for leaf in pytree.tree_leaves(waiting.pop()):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, nn.Module | type) and id(leaf) not in seen:
                seen.add(id(leaf))
                held = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
                waiting.append(list(held.values()))


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a module, those with several names under each of them."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    values = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
    return tuple(value for value in values if isinstance(value, Tensor))


def each_tensor(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with a function applied to every tensor."""
    if isinstance(inputs, Mapping):
        return {
            name: function(value) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
    return function(inputs)


def first_few(inputs: Inputs, count: int, axis: int = 0) -> tuple[Inputs, float]:
    """The first inputs of a batch, and how many times as many there are.

    All of them, where not all tensors have the same length on that axis.
    """
    sizes = {tensor.shape[axis : axis + 1] for tensor in tensors_of(inputs)}
    size = next(iter(sizes))
    if len(sizes) > 1 or not size or size[0] <= count:
        return inputs, 1.0
    return each_tensor(lambda t: t.narrow(axis, 0, count), inputs), size[0] / count


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    return each_tensor(lambda tensor: tensor.to(device), inputs)


class Stream(ABC, Iterator):
    """Batches without end, whose place can be kept and returned to."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The place before the next batch."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on as from the place where `state_dict` gave this."""


class Passes(Stream):
    """Inputs and targets of one pass over batches, or of pass after pass until one is empty.

    Targets are the second entry of a batch, None where there is none.

    The place in an iterable is the state of torch's global generator at the start of its pass and
    how many batches were drawn since, which are drawn again and left aside to return there.

    Args:
        batches: any iterable of inputs, or of tuples that begin with inputs and targets.
        repeat: whether to begin again where a pass ends.
        alone: whether a batch of one input counts that comes after larger ones.
    """

    def __init__(self, batches: Iterable, *, repeat: bool, alone: bool = True):
        if is_inputs(batches):
            raise TypeError("batches must be an iterable of inputs; give one batch as [inputs]")
        self.batches, self.repeat, self.alone = batches, repeat, alone
        self._pass: Iterator | None = None
        self._start, self._drawn = torch.get_rng_state(), 0
        self._largest = 0  # inputs in a batch so far
        self._waiting: list[tuple[Inputs, Any]] = []
        self._before: dict[str, Tensor] = {}  # the place of what waits, in a stream

    def peek(self) -> tuple[Inputs, Any] | None:
        """What comes next, and still does afterwards; None if nothing does."""
        if not self._waiting:
            before = self.batches.state_dict() if isinstance(self.batches, Stream) else {}
            drawn = next(self, None)
            if drawn is not None:
                self.put_back(drawn)
                self._before = before
        return self._waiting[-1] if self._waiting else None

    def put_back(self, drawn: tuple[Inputs, Any]) -> None:
        """Let this be what comes next."""
        self._waiting.append(drawn)

    def __next__(self) -> tuple[Inputs, Any]:
        if self._waiting:
            self._before = {}
            return self._waiting.pop()
        while True:
            inputs, targets = self._inputs_of(self._draw())
            size = max((len(t) for t in tensors_of(inputs) if t.ndim), default=1)
            self._largest = max(self._largest, size)
            if self.alone or size == self._largest or size > 1:
                return inputs, targets

    def state_dict(self) -> dict[str, Tensor]:
        largest = {"largest": torch.tensor(self._largest)}
        if isinstance(self.batches, Stream):
            return (self._before or self.batches.state_dict()) | largest
        start = torch.get_rng_state() if self._pass is None else self._start
        place = {"drawn": torch.tensor(self._drawn), "waiting": torch.tensor(len(self._waiting))}
        return {"start": start} | place | largest

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._waiting, self._before, self._largest = [], {}, int(state.get("largest", 0))
        if isinstance(self.batches, Stream):
            self.batches.load_state_dict(state)
            return
        torch.set_rng_state(state["start"])
        self._begin()
        batch = None
        for _ in range(int(state["drawn"])):
            batch = self._draw()
        if state.get("waiting"):
            self._waiting = [self._inputs_of(batch)]

    def _draw(self) -> Any:
        """A batch as it comes."""
        batch = next(self._pass or self._begin(), _END)
        if batch is _END and self.repeat and self._drawn:
            batch = next(self._begin(), _END)
        if batch is _END:
            raise StopIteration
        self._drawn += 1
        return batch

    def _inputs_of(self, batch: Any) -> tuple[Inputs, Any]:
        several = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        inputs, targets = (*several, None, None)[:2]
        if not is_inputs(inputs):
            raise TypeError(
                "each of batches must be inputs [B, ...], a mapping with such tensors, or a tuple "
                f"that begins with either, got {type(batch).__name__}"
            )
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        # No gradient goes through what inference mode made.
        return each_tensor(lambda t: t.clone() if t.is_inference() else t, inputs), targets

    def _begin(self) -> Iterator:
        self._start, self._drawn = torch.get_rng_state(), 0
        self._pass = iter(self.batches)
        return self._pass


_END = object()

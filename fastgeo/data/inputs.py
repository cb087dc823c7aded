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
    """

    def __init__(self, batches: Iterable, *, repeat: bool):
        if is_inputs(batches):
            raise TypeError("batches must be an iterable of inputs; give one batch as [inputs]")
        self.batches, self.repeat = batches, repeat
        self._pass: Iterator | None = None
        self._start, self._drawn = torch.get_rng_state(), 0
        self._waiting: list[tuple[Inputs, Any]] = []

    def put_back(self, drawn: tuple[Inputs, Any]) -> None:
        """Let this be what comes next."""
        self._waiting.append(drawn)

    def __next__(self) -> tuple[Inputs, Any]:
        if self._waiting:
            return self._waiting.pop()
        batch = next(self._pass or self._begin(), _END)
        if batch is _END and self.repeat and self._drawn:
            batch = next(self._begin(), _END)
        if batch is _END:
            raise StopIteration
        self._drawn += 1
        several = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        inputs, targets = (*several, None, None)[:2]
        if not is_inputs(inputs):
            raise TypeError(
                "each of batches must be inputs [B, ...], a mapping with such tensors, or a tuple "
                f"that begins with either, got {type(batch).__name__}"
            )
        return (dict(inputs) if isinstance(inputs, Mapping) else inputs), targets

    def state_dict(self) -> dict[str, Tensor]:
        if isinstance(self.batches, Stream):
            return self.batches.state_dict()
        start = torch.get_rng_state() if self._pass is None else self._start
        return {"start": start, "drawn": torch.tensor(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if isinstance(self.batches, Stream):
            self.batches.load_state_dict(state)
            return
        torch.set_rng_state(state["start"])
        self._begin()
        for _ in range(int(state["drawn"])):
            next(self)

    def _begin(self) -> Iterator:
        self._start, self._drawn = torch.get_rng_state(), 0
        self._pass = iter(self.batches)
        return self._pass


_END = object()

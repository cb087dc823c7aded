"""Inputs of a network: one tensor, or several by the names of its forward's arguments."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | Mapping[str, Tensor]  # [B, ...]; a mapping holds keyword arguments of forward


def is_inputs(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(torch.is_tensor, value.values()))
    return isinstance(value, Tensor)


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs.values()) if isinstance(inputs, Mapping) else (inputs,)


def each_tensor(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with a function applied to every tensor."""
    if isinstance(inputs, Mapping):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return function(inputs)


def first_few(inputs: Inputs, count: int, axis: int = 0) -> tuple[Inputs, float]:
    """The first inputs of a batch, and how many times as many there are.

    All of them, where not all tensors have the batch on that axis.
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
    """The inputs of one pass over batches, or of pass after pass until one is empty.

    The place in an iterable is the state of torch's global generator at the start of its pass and
    how many batches were drawn since, which are drawn again and left aside to return there.
    """

    def __init__(self, batches: Iterable, *, repeat: bool):
        if is_inputs(batches):
            raise TypeError("batches must be an iterable of inputs; give one batch as [inputs]")
        self.batches, self.repeat = batches, repeat
        self._pass: Iterator | None = None
        self._start, self._drawn = torch.get_rng_state(), 0

    def __next__(self) -> Inputs:
        batch = next(self._pass or self._begin(), _END)
        if batch is _END and self.repeat and self._drawn:
            batch = next(self._begin(), _END)
        if batch is _END:
            raise StopIteration
        self._drawn += 1
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        if not is_inputs(inputs):
            raise TypeError(
                "each of batches must be inputs [B, ...], a mapping of them, or a tuple that "
                f"begins with either, got {type(batch).__name__}"
            )
        return inputs

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

"""Inputs of a network: one tensor, or several by the names of its forward's arguments."""

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


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    return each_tensor(lambda tensor: tensor.to(device), inputs)


def inputs_of(batches: Iterable, *, repeat: bool) -> Iterator[Inputs]:
    """The inputs of one pass, or of pass after pass until one is empty."""
    if is_inputs(batches):
        raise TypeError("batches must be an iterable of inputs; give one batch as [inputs]")
    while True:
        empty = True
        for batch in batches:
            empty = False
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            if not is_inputs(inputs):
                raise TypeError(
                    "each of batches must be inputs [B, ...], a mapping of them, or a tuple that "
                    f"begins with either, got {type(batch).__name__}"
                )
            yield inputs
        if empty or not repeat:
            return

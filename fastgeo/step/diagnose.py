"""Where numbers stopped being finite: in which layer of which network."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastgeo.data.inputs import Inputs, arguments
from fastgeo.data.outputs import opened


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of them is."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    # A sum is finite only if its terms are, and takes a fraction of the time; but it may overflow.
    sums = torch.stack([tensor.sum().double() for tensor in tensors])
    return bool(sums.isfinite().all()) or all(bool(t.isfinite().all()) for t in tensors)


def first_not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """The first name of [N, ...] tensors that holds a number that is not finite, and which of N."""
    for name, tensor in tensors.items():
        bad = ~tensor.reshape(len(tensor), -1).isfinite().all(1)
        if bad.any():
            return name, int(bad.nonzero()[0])
    raise ValueError("all of them are finite")


@torch.no_grad()
def where(module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> str:
    """In words, the first thing that is not finite when a network is evaluated.

    Args:
        module: the network, in the mode that it is to be evaluated in.
        state: name -> tensor of one network.
        inputs: [B, ...], or a mapping of them.
    """
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    if not all(t.isfinite().all() for t in _tensors(inputs)):
        return "the inputs are not finite"
    found: list[str] = []

    def hook(name: str):
        def look(layer: nn.Module, args: tuple, outputs: object) -> None:
            if not all(tensor.isfinite().all() for tensor in _tensors(outputs)):
                found.append(name or type(module).__name__)

        return look

    hooks = [layer.register_forward_hook(hook(n)) for n, layer in module.named_modules()]
    try:
        args, kwargs = arguments(module, inputs)
        functional_call(module, state, args, kwargs, tie_weights=False)
    except Exception as error:  # noqa: BLE001 - what is reported is the numbers, not this
        return f"it cannot be evaluated by itself ({type(error).__name__}: {error})"
    finally:
        for handle in hooks:
            handle.remove()
    if not found:
        return "evaluated by itself, every layer of it gives finite numbers"
    return f"what layer {found[0]} gives is not finite"  # an inner layer ends before an outer one


def _tensors(value: object) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(opened(value)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf

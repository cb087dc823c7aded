"""Modes in which a network is evaluated: without dropout, and BatchNorm on which statistics."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastgeo.data.inputs import Inputs, arguments
from fastgeo.forward.standin import eagerly, held_by, unchanged


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout and its like off for a while: a path is one of networks, not of their noise."""
    training = [layer for layer in module.modules() if layer.training]
    module.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Transformer layers as they are trained: their kernels for inference have no gradient, vmap
    hides that one is wanted, and without one they give zeros where keys are padded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


Sparse = nn.Embedding | nn.EmbeddingBag


@contextlib.contextmanager
def dense_gradients(layers: Sequence[Sparse]) -> Iterator[None]:
    """Embeddings with sparse=True as without, as parts of a tensor [N, ...] have to be."""
    for layer in layers:
        layer.sparse = False
    try:
        yield
    finally:
        for layer in layers:
            layer.sparse = True


def sparse_layers(module: nn.Module) -> list[Sparse]:
    """The embeddings with sparse=True."""
    return [layer for layer in module.modules() if isinstance(layer, Sparse) and layer.sparse]


@contextlib.contextmanager
def looked_at(module: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, as Python and not compiled, that leaves no trace."""
    with (
        evaluation_mode(module),
        torch.no_grad(),
        no_fast_path(),
        unchanged(held_by(module.modules())),
        eagerly(),
    ):
        yield


@dataclass(frozen=True)
class Statistics:
    """What a network computes of its data while it is trained, to use it when it is evaluated.

    Attributes:
        names: of the buffers, such as the running mean of BatchNorm.
        layers: in train mode they update these, and compute with those of the batch.
    """

    names: frozenset[str]
    layers: tuple[nn.Module, ...]


def statistics(module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> Statistics:
    """The buffers that a forward in train mode writes to, whatever their names and layers are.

    Args:
        module: the network; it is not changed.
        state: name -> tensor of one network.
        inputs: a batch, on which the forward is called.

    Raises:
        ValueError: there are none.
    """
    _, names = _after(module, state, inputs, module.modules())
    owners = {name.rpartition(".")[0] for name in names}
    layers = [layer for name, layer in module.named_modules() if name in owners]
    _, found = _after(module, state, inputs, layers)
    if not names <= found:  # a layer around them decides
        above = [f"{name}." for name in names - found]
        layers = [
            layer
            for name, layer in module.named_modules()
            if name in owners or any(own.startswith(f"{name}.".lstrip(".")) for own in above)
        ]
        _, found = _after(module, state, inputs, layers)
    if not names & found:
        raise ValueError(
            "the module has nothing to recalibrate: in train mode its forward updates no buffer, "
            "as BatchNorm with running statistics does; leave out batchnorm='recalibrate'"
        )
    return Statistics(frozenset(names & found), tuple(layers))


def after_training(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs, found: Statistics
) -> dict[str, Tensor]:
    """The statistics of a network after one pass in train mode."""
    state, _ = _after(module, state, inputs, found.layers)
    return {name: state[name] for name in found.names}


def _after(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs, layers: Iterable[nn.Module]
) -> tuple[dict[str, Tensor], set[str]]:
    """The state after one pass with these layers in train mode, and the buffers it wrote to.

    What is written may be what was there: the vectors of spectral norm come to rest.
    """
    own = copied_state(module, state)
    buffers = [name for name, _ in module.named_buffers(remove_duplicate=False)]
    before = [(name, own[name], own[name]._version, own[name].clone()) for name in buffers]
    devices = {tensor.device for tensor in own.values() if tensor.is_cuda}
    with (
        torch.random.fork_rng(devices=devices),
        looked_at(module),
        in_training(module, layers),
        plain_averages(module),
    ):
        called_with(module, own, inputs)
    return own, {
        name
        for name, tensor, version, value in before
        if own[name] is not tensor or tensor._version > version or not torch.equal(value, tensor)
    }


def copied_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's parameters and buffers by all of their names, copied; the module's own of those
    that the state lacks."""
    device = next((tensor.device for tensor in state.values()), None)
    own, copies = {}, {}  # tensors may have several names
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if tensor not in copies:
                copies[tensor] = state.get(name, tensor).detach().to(device, copy=True)
            own[name] = copies[tensor]
    return own


def called_with(module: nn.Module, own: dict[str, Tensor], inputs: Inputs) -> Any:
    """What a module returns in another state, which it may update, on a copy of the inputs."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, arguments(module, inputs))
    return functional_call(module, own, args, kwargs, tie_weights=False)


@contextlib.contextmanager
def in_training(module: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """These layers in train mode for a while, and all else in evaluation mode."""
    layers = list(layers)
    with evaluation_mode(module):
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


@contextlib.contextmanager
def plain_averages(module: nn.Module) -> Iterator[None]:
    """BatchNorm weighs all batches that it counts alike, for a while."""
    before = [(layer, layer.momentum) for layer in batch_norms(module).values()]
    for layer, _ in before:
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum


@contextlib.contextmanager
def batch_statistics(module: nn.Module, found: Statistics) -> Iterator[None]:
    """The network on the statistics of its batch, which leave no trace, for a while."""
    buffers: dict[nn.Module, list[str]] = {}
    of = dict(module.named_modules(remove_duplicate=False))
    for name in found.names:
        layer, _, key = name.rpartition(".")
        buffers.setdefault(of[layer], []).append(key)
    kept: dict[nn.Module, list[dict]] = {layer: [] for layer in buffers}

    def to_copies(layer: nn.Module, args: tuple) -> None:
        kept[layer].append({key: layer._buffers[key] for key in buffers[layer]})
        layer._buffers.update({key: t.clone() for key, t in kept[layer][-1].items()})

    def back(layer: nn.Module, args: tuple, outputs: object) -> None:
        layer._buffers.update(kept[layer].pop())

    hooks = [layer.register_forward_pre_hook(to_copies, prepend=True) for layer in buffers]
    hooks += [layer.register_forward_hook(back, always_call=True) for layer in buffers]
    try:
        with in_training(module, found.layers):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def batch_norms(module: nn.Module) -> "dict[str, nn.modules.batchnorm._BatchNorm]":
    """The BatchNorm layers by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kind)}


def refuse_batch_norm(module: nn.Module) -> None:
    """ValueError, naming the layer, if the module has BatchNorm with running statistics."""
    for name, layer in batch_norms(module).items():
        if layer.running_mean is not None:
            raise ValueError(
                f"layer {name or type(layer).__name__} is BatchNorm, whose running statistics do "
                "not interpolate between networks; use GroupNorm or LayerNorm in its place and "
                "train again, or have them computed anew with batchnorm='recalibrate'"
            )

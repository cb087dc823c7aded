"""Modes in which a network is evaluated: without dropout, and BatchNorm on which statistics."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fastgeo.forward.standin import eagerly, held_by, unchanged


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself.

    Raises:
        TypeError: anything else than a module written in Python.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(module).__name__} is TorchScript, whose forward cannot be called on other "
            "parameters; give the nn.Module that it was made of"
        )
    return getattr(module, "_orig_mod", module)


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


@contextlib.contextmanager
def batch_statistics(module: nn.Module, *, update: bool) -> Iterator[None]:
    """BatchNorm on the statistics of its batch, all else in evaluation mode, for a while.

    Args:
        module: the network.
        update: whether running statistics become the mean over the batches that are seen; they are
            left alone otherwise.
    """
    with evaluation_mode(module):
        layers = batch_norms(module).values()
        before = [(layer, layer.track_running_stats, layer.momentum) for layer in layers]
        for layer in layers:
            layer.training, layer.track_running_stats, layer.momentum = True, update, None
        try:
            yield
        finally:
            for layer, tracked, momentum in before:
                layer.training, layer.track_running_stats, layer.momentum = False, tracked, momentum


def batch_norms(module: nn.Module) -> "dict[str, nn.modules.batchnorm._BatchNorm]":
    """The BatchNorm layers by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kind)}


def refuse_batch_norm(module: nn.Module) -> None:
    """ValueError, naming the layer, if the module has BatchNorm."""
    for name, layer in batch_norms(module).items():
        raise ValueError(
            f"layer {name or type(layer).__name__} is BatchNorm, whose running statistics do not "
            "interpolate between networks; use GroupNorm or LayerNorm in its place and train "
            "again, or have them computed anew with batchnorm='recalibrate'"
        )


def tracking_instance_norm(module: nn.Module) -> str | None:
    """The name of the first InstanceNorm that tracks statistics, if there is one."""
    kind = nn.modules.instancenorm._InstanceNorm
    for name, layer in module.named_modules():
        if isinstance(layer, kind) and layer.track_running_stats:
            return name or type(layer).__name__
    return None

"""Values of N networks at once, and functions of one network applied to them.

In a stacked run a value that differs between the networks is `Stacked`, a tensor [N, ...]; any
other value, the shared input for one, is as in a single network and is computed once.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False, slots=True)
class Stacked:
    """A value of N networks: tensor [N, ...]."""

    tensor: Tensor


def each(value: Stacked | Tensor, n: int) -> Tensor:
    """The value as [N, ...]; a shared one without a copy."""
    return value.tensor if isinstance(value, Stacked) else value.expand(n, *value.shape)


def any_stacked(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(any_stacked, value))
    if isinstance(value, dict):
        return any(map(any_stacked, value.values()))
    return isinstance(value, Stacked)


def by_vmap(function: Callable, args: tuple, kwargs: Mapping[str, Any], n: int) -> Any:
    """A function of one network's values, vectorised over N; random numbers differ."""
    stacked, call = _one_network(function, args, kwargs)
    form: list[Any] = []

    def one(n_th: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        leaves, structure = pytree.tree_flatten(call(own))
        _check_outputs(leaves)
        form[:] = [structure, *(None if torch.is_tensor(leaf) else [leaf] for leaf in leaves)]
        return tuple(leaf for leaf in leaves if torch.is_tensor(leaf))

    with no_fast_path(), _no_fallback_warnings(), _no_gradient_hooks():
        out = iter(torch.vmap(one, randomness="different")(torch.empty(n), *stacked))
    structure, *others = form
    return pytree.tree_unflatten(
        [Stacked(next(out)) if other is None else other[0] for other in others], structure
    )


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Transformer layers as they are trained: their kernels for inference have no gradient, vmap
    and torch.fx hide that one is wanted, and without one they give zeros where keys are padded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _no_fallback_warnings() -> Iterator[None]:
    """Without torch's request to report which operations vmap runs one by one."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)


@contextlib.contextmanager
def _no_gradient_hooks() -> Iterator[None]:
    """RuntimeError where one is set, which vmap would never call."""
    before = Tensor.register_hook

    def refuse(self: Tensor, hook: Callable) -> NoReturn:
        raise RuntimeError("vmap has no gradient hooks")

    Tensor.register_hook = refuse
    try:
        yield
    finally:
        Tensor.register_hook = before


def by_loop(function: Callable, args: tuple, kwargs: Mapping[str, Any], n: int) -> Any:
    """A function of one network's values, called N times."""
    stacked, call = _one_network(function, args, kwargs)

    def i_th(i: int, own: tuple[Tensor, ...]) -> Any:
        places = [tensor.data_ptr() for tensor in own]
        out = call(own)
        for tensor, place, whole in zip(own, places, stacked, strict=True):
            if tensor.data_ptr() != place:  # its .data was assigned
                whole.data[i].copy_(tensor)
        return out

    each_own = zip(*(tensor.unbind(0) for tensor in stacked), strict=True)
    with no_fast_path():
        outputs = [i_th(i, own) for i, own in enumerate(each_own if stacked else [()] * n)]
    return pytree.tree_map(_joined, *outputs)


class NoForm(Exception):
    """A stacked form does not cover what it was given: why, and which way that runs instead."""

    def __init__(self, reason: str, way: Callable = by_vmap):
        super().__init__(reason)
        self.way = way


def _one_network(
    function: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The stacked tensors among the arguments, and the function of one network's part of them."""
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Stacked)]

    def call(own: Sequence[Tensor]) -> Any:
        mine = list(leaves)
        for place, tensor in zip(places, own, strict=True):
            mine[place] = tensor
        args, kwargs = pytree.tree_unflatten(mine, structure)
        return function(*args, **kwargs)

    return [leaves[i].tensor for i in places], call


def _check_outputs(leaves: Iterable[Any]) -> None:
    """TypeError for tensors inside of what pytree does not look into, a dataclass for one."""
    for leaf in leaves:
        inside = pytree.tree_leaves(getattr(leaf, "__dict__", {}))
        if not torch.is_tensor(leaf) and any(map(torch.is_tensor, inside)):
            raise TypeError(
                f"a {type(leaf).__name__} with tensors cannot be joined over networks; return a "
                "tensor, a tuple or a dict"
            )


def _joined(*values: Any) -> Any:
    _check_outputs(values)
    if torch.is_tensor(values[0]):
        return Stacked(torch.stack(values))
    if any(value != values[0] for value in values):
        raise ValueError(f"a value that is no tensor differs between the networks: {values}")
    return values[0]


def without_n(value: Any, n: int) -> Any:
    """What all networks returned, with every tensor [N, ...]."""
    return pytree.tree_map(
        lambda leaf: each(leaf, n) if isinstance(leaf, Stacked | Tensor) else leaf, value
    )


def aligned(value: Any, rank: int) -> Any:
    """A stacked tensor with `rank` axes behind N, so that it broadcasts as without N."""
    if isinstance(value, Stacked):
        t = value.tensor
        return t if t.ndim > rank else t.reshape(len(t), *(1,) * (rank + 1 - t.ndim), *t.shape[1:])
    return value


def rank_of(value: Any) -> int:
    """The number of axes that one network sees."""
    if isinstance(value, Stacked):
        return value.tensor.ndim - 1
    return value.ndim if isinstance(value, Tensor) else 0


def call(module: nn.Module, *, copies: bool = False) -> Callable:
    """The module as a function of (state, args, kwargs), which updates the buffers in state.

    Args:
        module: must be given its state under all names.
        copies: call it on copies of the tensors among args and kwargs.
    """

    def function(state: Mapping[str, Tensor], args: tuple, kwargs: dict) -> Any:
        if copies:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        now = dict(state)  # in which functional_call returns what the forward assigned
        out = functional_call(module, now, args, kwargs, tie_weights=False)
        for name, tensor in state.items():
            if now[name] is not tensor:
                with torch.no_grad():
                    tensor.copy_(now[name])
        return out

    return function


def own_buffers(module: nn.Module, n: int) -> dict[str, Stacked | Tensor]:
    """The module's own buffers by name; in train mode a copy for each network to update."""
    named = module.named_buffers(remove_duplicate=False)
    if not any(layer.training for layer in module.modules()):
        return dict(named)
    return {name: Stacked(t.expand(n, *t.shape).clone()) for name, t in named}


class ChangedInput(Exception):
    """A module changed its input in place, which other networks or operations use, too."""


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, the stacked ones whole; but those of inference mode, which have no
    version."""
    leaves = pytree.tree_leaves(value)
    leaves = [leaf.tensor if isinstance(leaf, Stacked) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if torch.is_tensor(leaf) and not leaf.is_inference()]


@contextlib.contextmanager
def refused_in_place(tensors: Sequence[Tensor]) -> Iterator[None]:
    """ChangedInput if any of the tensors was changed in place."""
    versions = [tensor._version for tensor in tensors]
    try:
        yield
    finally:
        if versions != [tensor._version for tensor in tensors]:
            raise ChangedInput("a module changes its input in place")


@contextlib.contextmanager
def undone_on_failure(tensors: Iterable[Tensor]) -> Iterator[None]:
    """The tensors as they were before, if an exception ends this."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def forms(names: Iterable[str], make: Callable[[Callable], Callable]) -> dict:
    """torch.name, F.name and the tensor method, each with the handler made of it."""
    handlers = {}
    for name in names:
        functions = [getattr(module, name, None) for module in (torch, F)]
        handlers |= {f: make(f) for f in functions if callable(f)}
        if hasattr(Tensor, name):
            handlers[name] = make(getattr(Tensor, name))
    return handlers


def same(handler: Callable) -> Callable:
    """For `forms`: one handler, whatever it is called as."""
    return lambda function: handler

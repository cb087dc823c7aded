"""Values of N networks at once, and functions of one network applied to them.

In a stacked pass a value that differs between the networks is `Stacked`, which holds a tensor
[N, ...]; any other value, the shared input for one, is as in a single network and is computed once.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastgeo.forward.modes import no_fast_path
from fastgeo.forward.standin import StandIn, held_by, unchanged


class Stacked(StandIn):
    """A value of N networks, seen as that of one.

    Attributes:
        tensor: [N, ...].
        waiting: what will compute the tensor when it is asked for (`fusion`), or None.
        of: names of the parameters that it was computed of, None if of anything else as well.
        at: place in its pass's record of the call that gave it.
    """

    waiting, of, at = None, None, None

    @staticmethod
    def __new__(cls, tensor: Tensor) -> "Stacked":
        one = Tensor._make_wrapper_subclass(
            cls,
            tensor.shape[1:],
            None if tensor.is_contiguous() else strides_of_one(tensor),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )
        one._tensor = tensor
        return one

    @property
    def tensor(self) -> Tensor:
        if self.waiting is not None:
            self._tensor, self.waiting = self.waiting.value(), None
        return self._tensor

    @tensor.setter
    def tensor(self, tensor: Tensor) -> None:
        self._tensor, self.waiting = tensor, None

    @classmethod
    def later(cls, waiting: Any) -> "Stacked":
        """One whose tensor `waiting.value()` gives, in the shape of `waiting.x`."""
        x = waiting.x
        one = Tensor._make_wrapper_subclass(
            cls, x.shape[1:], dtype=x.dtype, device=x.device, requires_grad=waiting.needs
        )
        one._tensor, one.waiting = None, waiting
        return one

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return f"Stacked({list(self.shape)} of each network, {self.dtype})"


def strides_of_one(t: Tensor) -> list[int]:
    """Of a network's own value of [N, ...], as it would lie in memory by itself."""
    n, between = len(t), t.stride(0)
    return [step // n if n > 1 and step > between > 0 else step for step in t.stride()[1:]]


def each(value: Stacked | Tensor, n: int) -> Tensor:
    """The value as [N, ...]; a shared one without a copy."""
    return value.tensor if isinstance(value, Stacked) else value.expand(n, *value.shape)


def any_stacked(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(any_stacked, value))
    return isinstance(value, Stacked)


def by_vmap(function: Callable, args: tuple, kwargs: Mapping[str, Any], n: int) -> Any:
    """A function of one network's values, vectorised over N; random numbers differ."""
    stacked, call = one_network(function, args, kwargs)
    form: list[Any] = []

    def one(n_th: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        leaves, structure = pytree.tree_flatten(call(own))
        _check_outputs(leaves)
        form[:] = [structure, *(None if torch.is_tensor(leaf) else [leaf] for leaf in leaves)]
        return tuple(leaf for leaf in leaves if torch.is_tensor(leaf))

    with no_fast_path(), _no_fallback_warnings():
        out = iter(torch.vmap(one, randomness="different")(torch.empty(n), *stacked))
    structure, *others = form
    return pytree.tree_unflatten(
        [Stacked(next(out)) if other is None else other[0] for other in others], structure
    )


@contextlib.contextmanager
def _no_fallback_warnings() -> Iterator[None]:
    """Without torch's request to report which operations vmap runs one by one."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)


class NoGradientHooks(TorchFunctionMode):
    """RuntimeError where one is set, which vmap would never call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in SETS_HOOKS:
            raise RuntimeError("vmap has no gradient hooks")
        return func(*args, **kwargs or {})


SETS_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


def by_loop(function: Callable, args: tuple, kwargs: Mapping[str, Any], n: int) -> Any:
    """A function of one network's values, called N times."""
    stacked, call = one_network(function, args, kwargs)

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


def one_network(
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
                "tensor, a tuple or a dict, or name the output that is meant: output="
            )


class Differs(ValueError):
    """The networks give what cannot be one value of all of them."""


def _joined(*values: Any) -> Any:
    _check_outputs(values)
    if torch.is_tensor(values[0]):
        if any(value.shape != values[0].shape for value in values):
            raise Differs("its size differs between the networks")
        return Stacked(torch.stack(values))
    if any(value != values[0] for value in values):
        raise Differs(f"a value that is no tensor differs between the networks: {values}")
    return values[0]


def without_n(value: Any, n: int) -> Any:
    """What all networks returned, with every tensor [N, ...]."""
    leaves, structure = pytree.tree_flatten(value)
    _check_outputs(leaves)
    return pytree.tree_unflatten(
        [each(leaf, n) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
    )


def aligned(value: Any, rank: int) -> Any:
    """A stacked tensor with `rank` axes behind N, so that it broadcasts as without N."""
    if isinstance(value, Stacked):
        t = value.tensor
        return t if t.ndim > rank else t.reshape(len(t), *(1,) * (rank + 1 - t.ndim), *t.shape[1:])
    return value


def rank_of(value: Any) -> int:
    """The number of axes that one network sees."""
    if isinstance(value, Stacked) and value.waiting is None:
        return value._tensor.ndim - 1
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value.ndim
    return 0


def call(
    module: nn.Module,
    *,
    attributes: Sequence[dict | list] | None = None,
    on_change: Callable[[], Any] | None = None,
) -> Callable:
    """The module as a function of (state, args, kwargs), which updates the buffers in state.

    As torch.func.functional_call, which looks its parameters up anew each time.

    Args:
        module: must be given its parameters under all names.
        attributes: what is put back afterwards (`held_by`); its own by default.
        on_change: called if there is anything to put back but buffers.
    """
    attributes = held_by(module.modules()) if attributes is None else attributes
    holders = {
        f"{name}.{key}".lstrip("."): (held, key)
        for name, layer in module.named_modules(remove_duplicate=False)
        for held in (layer._parameters, layer._buffers)
        for key in held
    }

    def function(state: Mapping[str, Tensor], args: tuple, kwargs: dict) -> Any:
        own = [(*holders[name], tensor) for name, tensor in state.items()]
        before = [held[key] for held, key, _ in own]
        try:
            for held, key, tensor in own:
                held[key] = tensor
            with unchanged(attributes) as changed:
                out = module(*args, **kwargs)
                now = [held.get(key) for held, key, _ in own]
                for held, key, tensor in own:
                    held[key] = tensor
                if on_change is not None and changed():
                    on_change()
        finally:
            for (held, key, _), tensor in zip(own, before, strict=True):
                held[key] = tensor
        for (_, _, tensor), assigned in zip(own, now, strict=True):
            if assigned is not tensor:
                with torch.no_grad():
                    tensor.copy_(assigned)
        return out

    return function


def on_copies(function: Callable) -> Callable:
    """What `call` gives, on copies of the inputs."""

    def copied(state: Mapping[str, Tensor], args: tuple, kwargs: dict) -> Any:
        return function(state, *pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

    return copied


def own_buffers(module: nn.Module, n: int) -> dict[str, Stacked]:
    """Of the module's own buffers, by name, a copy for each network to update."""
    named = module.named_buffers(remove_duplicate=False)
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
    before = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for tensor, version, value in before:
                if tensor._version != version:
                    tensor.copy_(value)
        raise


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

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
from fastgeo.forward.standin import PLAIN, StandIn, held_by, mapped, unchanged

_functorch: Any = torch._C._functorch  # whose stubs lack what is used here


class Stacked(StandIn):
    """A value of N networks, seen as that of one.

    Attributes:
        tensor: [N, ...].
        waiting: what will compute the tensor when it is asked for (`fusion`), or None.
        of: names of the parameters that it was computed of, None if of anything else as well.
        at: place in its pass's record of the call that gave it.
    """

    waiting: Any = None
    of: frozenset[str] | None = None
    at: int | None = None
    _tensor: Any
    _again: Tensor | None = None  # the tensor for a sum

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
            (self._tensor, self._again), self.waiting = self.waiting.value(), None
        return self._tensor

    @tensor.setter
    def tensor(self, tensor: Tensor) -> None:
        self._tensor, self._again, self.waiting = tensor, None, None

    @property
    def added(self) -> Tensor:
        """The tensor, to be added to something: where it came from, this use's gradient is added to
        that of the others without a pass of its own, if nothing has changed it since."""
        tensor, again = self.tensor, self._again
        return tensor if again is None or again.grad_fn is not tensor.grad_fn else again

    @classmethod
    def later(cls, waiting: Any) -> "Stacked":
        """One whose tensor, and what is `added`, `waiting.value()` gives."""
        one = Tensor._make_wrapper_subclass(
            cls,
            waiting.shape[1:],
            dtype=waiting.dtype,
            device=waiting.x.device,
            requires_grad=waiting.needs,
        )
        one._tensor, one.waiting = None, waiting
        return one

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # the stub has no names
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
    return any(isinstance(leaf, Stacked) for leaf in pytree.tree_leaves(value))


def batched(function: Callable, n: int, *args: Any, **kwargs: Any) -> Any:
    """A function of one network's values, by torch's batching rules one operation of all; random
    numbers differ.

    Raises:
        NoForm: torch has no rule for it, or none for what depends on values.
    """
    for value in (*args, *kwargs.values()):
        mapped(_computed, value)
    try:
        with _Batching(n) as vmap:
            own = [arg if type(arg) in PLAIN else vmap.own(arg) for arg in args]
            if kwargs:
                kwargs = {name: vmap.own(value) for name, value in kwargs.items()}
            return vmap.joined(function(*own, **kwargs))
    except (RuntimeError, ValueError) as error:
        if "fallback" in str(error):
            raise NoForm("it has no stacked form") from error
        if "vmap" in str(error):
            raise NoForm(first_line(error)) from error
        raise


def _computed(value: Tensor) -> Tensor:
    """Its tensor, if it waits: inside of a level of vmap the kernel would not run."""
    return value.tensor if type(value) is Stacked else value


def by_vmap(function: Callable, args: tuple, n: int) -> Any:
    """A function of one network's values, such as a whole module, as torch.vmap has it: what lacks
    a batching rule runs one by one."""
    _functorch._set_vmap_fallback_warning_enabled(False)
    try:
        with NoGradientHooks(), _Batching(n, fallback=True) as vmap:
            out = function(*pytree.tree_map_only(Stacked, vmap.own, args))
            _check_outputs(pytree.tree_leaves(out))
            return pytree.tree_map_only(Tensor, vmap.joined, out)
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)


class _Batching:
    """A level of torch.vmap; without its wrapper, which would take most of a small call's time."""

    def __init__(self, n: int, fallback: bool = False):
        self.n, self.fallback = n, fallback

    def __enter__(self):
        self.before = _functorch._is_vmap_fallback_enabled()
        _functorch._set_vmap_fallback_enabled(self.fallback)
        self.level = _functorch._vmap_increment_nesting(self.n, "different")
        return self

    def __exit__(self, *error):
        _functorch._vmap_decrement_nesting()
        _functorch._set_vmap_fallback_enabled(self.before)

    def own(self, value: Any) -> Any:
        """A network's part of a value."""
        if type(value) is Stacked:
            return _functorch._add_batch_dim(value.tensor, 0, self.level)
        return value if issubclass(type(value), Tensor) else mapped(self.own, value)

    def joined(self, value: Any) -> Any:
        """The values of all networks, of what one gave."""
        if issubclass(type(value), Tensor):
            return Stacked(_functorch._remove_batch_dim(value, self.level, self.n, 0))
        return mapped(self.joined, value)


class NoGradientHooks(TorchFunctionMode):
    """RuntimeError where one is set, which vmap would never call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in SETS_HOOKS:
            raise RuntimeError("vmap has no gradient hooks")
        return func(*args, **kwargs or {})


SETS_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


def one_by_one(function: Callable, args: tuple, kwargs: Mapping[str, Any], n: int) -> Iterator[Any]:
    """What a function gives of the values of each network."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    stacked = {i: leaf.tensor for i, leaf in enumerate(leaves) if isinstance(leaf, Stacked)}
    for number in range(n):
        own = {i: tensor[number] for i, tensor in stacked.items()}
        places = {i: tensor.data_ptr() for i, tensor in own.items()}
        mine = [own.get(i, leaf) for i, leaf in enumerate(leaves)]
        own_args, own_kwargs = pytree.tree_unflatten(mine, structure)
        yield function(*own_args, **own_kwargs)
        for i, tensor in own.items():
            if tensor.data_ptr() != places[i]:  # its .data was assigned
                stacked[i].data[number].copy_(tensor)


def by_loop(function: Callable, args: tuple, kwargs: Mapping[str, Any], n: int) -> Any:
    """A function of one network's values, called N times."""
    with no_fast_path():
        return pytree.tree_map(_joined, *one_by_one(function, args, kwargs, n))


class NoForm(Exception):
    """A stacked form does not cover what it was given, and why."""


def part(values: Any) -> None:
    """Note that these do not share the memory that they may share in a network."""
    for value in pytree.tree_leaves(values):
        if isinstance(value, Stacked):
            setattr(value.tensor.untyped_storage(), "parted", True)  # noqa: B010 - of our own


def is_parted(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "parted", False)


def _check_outputs(leaves: Iterable[Any]) -> None:
    """TypeError for tensors inside of what pytree does not look into, as a dataclass or a subclass
    of dict."""
    for leaf in leaves:
        items = list(leaf.values()) if isinstance(leaf, dict) else []
        inside = pytree.tree_leaves((items, getattr(leaf, "__dict__", {})))
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

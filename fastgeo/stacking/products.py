"""The large product that a network ends with, which waits: logits of a vocabulary, row by row.

Where a caller wants outputs by rows (`StackedModule.by_rows`), a linear layer whose result is large
is not computed when the forward calls it. Functions of every number by itself join it, such as a
bound on logits or a change of their type. If it is what the module returns, the caller gets the
`Product`; whatever else looks at it has it computed, as it would have been.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_linear
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgeo.forward.standin import Unfollowed, call_of, mapped, operation_of
from fastgeo.stacking.precision import matmul_precision
from fastgeo.stacking.stacked import Stacked, rank_of

_MOST: ContextVar[int | None] = ContextVar("most", default=None)


@contextlib.contextmanager
def waiting_beyond(most: int | None) -> Iterator[None]:
    """Linear layers of more than so many numbers a network wait for a while; None: none does."""
    token = _MOST.set(most)
    try:
        yield
    finally:
        _MOST.reset(token)


class Product(NamedTuple):
    """[N, ..., C] of the linear layers of N networks, and what joined them, yet to be computed.

    Attributes:
        x, weight, bias: [N, ..., I], [N, C, I], [N, C].
        versions: of these, which may not be changed in place before the product is computed.
        grad: whether gradients were enabled.
        then: functions of the product, one after the other.
        before: gives the value that the last of them is of; None if that was changed in place.
        precision: of the product (`matmul_precision`).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int, ...]
    grad: bool
    then: tuple[Callable[[Tensor], Tensor], ...] = ()
    before: Callable[[], Tensor | None] | None = None
    precision: str = "fp32"

    @property
    def parts(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        parts = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @property
    def needs(self) -> bool:
        """Whether it needs a gradient."""
        return self.grad and any(t.requires_grad for t in self.parts.values())

    @property
    def shape(self) -> torch.Size:
        """[N, ..., C]."""
        return torch.Size([*self.x.shape[:-1], self.weight.shape[1]])

    @property
    def dtype(self) -> torch.dtype:
        return self._joined(self.x.new_empty(0)).dtype

    @property
    def uses(self) -> tuple:
        """The `Stacked` values that it waits for."""
        return ()

    def value(self) -> tuple[Tensor, None]:
        """[N, ..., C], and nothing for a sum, as `Stacked.added` would have it."""
        with torch.set_grad_enabled(self.grad):
            before = None if self.before is None else self.before()
            if before is None:
                return self._joined(self._linear(self.x)), None
            return self.then[-1](before), None

    def rows(self, rows: slice) -> Tensor:
        """[N, R, C] of some rows, those of all axes between the first and the last; detached."""
        with torch.no_grad(), matmul_precision(self.precision):
            return self._joined(self._linear(self.x.flatten(1, -2)[:, rows]))

    def points(self, points: slice) -> "Product":
        """That of some of the networks, detached."""
        own: dict[str, Any] = {name: t.detach()[points] for name, t in self.parts.items()}
        return self._replace(**own)

    def pulled_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient to the linear layers of x [N, R, I], given that to what joined them."""
        if self.then:
            linear = self._linear(x).requires_grad_()
            with torch.enable_grad():
                joined = self._joined(linear)
            (gradient,) = torch.autograd.grad(joined, linear, gradient.to(joined.dtype))
        return gradient.to(x.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        if self.versions != _versions(self.parts.values()):
            raise Unfollowed("its forward changes in place what its last layer was given")
        return stacked_linear(x, self.weight, self.bias)

    def _joined(self, value: Tensor) -> Tensor:
        for function in self.then:
            value = function(value)
        return value


class Products(list[Product]):
    """Outputs of networks that end with them: one product of all networks, or one of each."""


class PulledBack:
    """The gradient to what a product is made of, gathered over its rows."""

    def __init__(self, product: Product):
        self._product = product
        self._found = {
            name: t.new_zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32))
            for name, t in product.parts.items()
            if t.requires_grad
        }

    def add(self, rows: slice, gradient: Tensor) -> None:
        """gradient: [N, R, C], to these rows of the product."""
        own, found = self._product, self._found
        with torch.no_grad(), matmul_precision(own.precision):
            x = own.x.flatten(1, -2)[:, rows]
            gradient = own.pulled_back(x, gradient)
            if "x" in found:
                found["x"].flatten(1, -2)[:, rows] = gradient @ own.weight
            if "weight" in found:
                weight = found["weight"]
                weight.baddbmm_(gradient.mT.to(weight.dtype), x.to(weight.dtype))
            if "bias" in found:
                found["bias"] += gradient.sum(1)

    def gathered(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors, and the gradient to each of them."""
        parts = self._product.parts
        return [(parts[name], total.to(parts[name].dtype)) for name, total in self._found.items()]


class AsItIs:
    """The same of outputs as they are, [N, ..., C], which come all at once or only some of them."""

    def __init__(self, outputs: Tensor):
        self._outputs = outputs

    def add(self, rows: slice, gradient: Tensor) -> None:
        outputs = self._outputs
        if gradient.numel() < outputs.numel():
            some, gradient = gradient, outputs.new_zeros(outputs.shape)
            gradient.flatten(1, -2)[:, rows] = some
        self._gradient = gradient.reshape(outputs.shape).to(outputs.dtype)

    def gathered(self) -> list[tuple[Tensor, Tensor]]:
        return [(self._outputs, self._gradient)]


def sources(value: Tensor) -> list[Tensor]:
    """A tensor of one network, or what it is a product of, if it waits."""
    if not _waits(value):
        return [value]
    return [tensor for product in value.products for tensor in product.parts.values()]


def products_in(outputs: Any, precision: str) -> Products:
    """What an output waits for; empty if it does not wait."""
    found: Iterable[Product] = ()
    if isinstance(outputs, Stacked):
        if isinstance(outputs.waiting, Product):
            found = [outputs.waiting]
        elif outputs.waiting is None and _waits(outputs.tensor):
            found = outputs.tensor.products
    return Products(one._replace(precision=precision, before=None) for one in found)


# --- Of N networks at once ------------------------------------------------------------------------


def waiting(input: Any, weight: Any, bias: Any = None) -> Stacked | None:
    """The linear layers of N networks, to be computed later; None if they are not to wait.

    What all networks share may be changed in place in the meantime, which nobody would see.
    """
    if _MOST.get() is None or rank_of(input) < 2:
        return None
    given = [t for t in (input, weight, bias) if t is not None]
    if not all(isinstance(t, Stacked) for t in given):
        return None
    bias = None if bias is None else bias.tensor
    made = _product(input.tensor, weight.tensor, bias)
    return None if made is None else Stacked.later(made)


def with_function(function: Callable, args: tuple, kwargs: dict) -> Stacked | None:
    """A function of every number of its first argument, if that waits and it joins it."""
    value: Any = args[0] if args else None
    own = value.waiting if isinstance(value, Stacked) else None
    if not isinstance(own, Product):
        return None
    joined = _followed(own, lambda: value.tensor, function, args[1:], kwargs)
    return None if joined is None else Stacked.later(joined)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Product | None:
    """x [N, ..., I], weight [N, C, I]: None unless it is large, and may wait."""
    most, numbers = _MOST.get(), x.shape[1:-1].numel() * weight.shape[1]
    if most is None or numbers <= most or weight.ndim != 3:
        return None
    given = [t for t in (x, weight, bias) if t is not None]
    if torch.is_autocast_enabled(x.device.type) or any(t.is_inference() for t in given):
        return None
    return Product(x, weight, bias, _versions(given), torch.is_grad_enabled())


def _followed(
    own: Product,
    value: Callable[[], Tensor | None],
    function: Callable,
    args: tuple,
    kwargs: dict,
) -> Product | None:
    """What a function of every number gives of a product, whose value is given by another."""
    constant = CONSTANT if function is not Tensor.to else {bool, torch.dtype}
    others = {*map(type, args), *map(type, kwargs.values())}
    if own.grad != torch.is_grad_enabled() or not others <= constant:
        return None
    then = (*own.then, lambda t: function(t, *args, **kwargs))
    return own._replace(then=then, before=value)


CONSTANT = {bool, int, float, type(None)}


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


# --- Of one network after the other ---------------------------------------------------------------


class Later(Tensor):
    """A tensor that is computed when it is looked at.

    Attributes:
        products: what it is of: one network's, or those of all networks, one after the other.
        value: once it is computed.
        version: of the value, before anything changes it in place.
    """

    products: tuple[Product, ...]
    value: Tensor | None
    version: int
    _of_one: bool

    @staticmethod
    def __new__(cls, products: tuple[Product, ...], *, of_one: bool) -> "Later":
        first = products[0]
        one = Tensor._make_wrapper_subclass(
            cls,
            first.shape[1:] if of_one else (len(products), *first.shape[1:]),
            dtype=first.dtype,
            device=first.x.device,
            requires_grad=first.needs,
        )
        one.products, one.value, one._of_one = products, None, of_one
        return one

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, call = kwargs or {}, call_of(func)
        if call.kind == "shape" or call.name == "requires_grad":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.stack and not kwargs and len(args) == 1 and all(map(_waits, args[0])):
            return cls(tuple(own.products[0] for own in args[0]), of_one=False)
        own = args[0] if args else None
        if _waits(own) and own._of_one and not call.kind and _by_number(func):
            joined = _followed(own.products[0], own._unchanged, func, args[1:], kwargs)
            if joined is not None:
                return cls((joined,), of_one=True)
        args, kwargs = mapped(_computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise Unfollowed(f"{func} is reached without a call of torch's that could be answered")

    def computed(self) -> Tensor:
        if self.value is None:
            values = [product.value()[0] for product in self.products]
            self.value = values[0][0] if self._of_one else torch.cat(values)
            self.version = self.value._version
        return self.value

    def _unchanged(self) -> Tensor | None:
        """The value of one network as [1, ...], unless something has changed it in place."""
        value = self.computed()
        return value[None] if value._version == self.version else None


def _computed(tensor: Tensor) -> Tensor:
    return tensor.computed() if isinstance(tensor, Later) else tensor


def _by_number(function: Callable) -> bool:
    """Whether what a function gives of some rows is that of all, or only lies elsewhere."""
    return operation_of(function).elementwise or function in (Tensor.to, Tensor.contiguous)


def _waits(value: Any) -> TypeGuard[Later]:
    return isinstance(value, Later) and value.value is None


def waits_in_loops() -> contextlib.AbstractContextManager:
    """Linear layers of a network by itself wait as well, where any do."""
    return contextlib.nullcontext() if _MOST.get() is None else _OfOne()


class _OfOne(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            args, kwargs = mapped(_computed, (args, kwargs))
            if (made := _of_one(*args, **kwargs)) is not None:
                return Later((made,), of_one=True)
        return func(*args, **kwargs)


def _of_one(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product | None:
    if input.ndim < 2:
        return None
    return _product(input[None], weight[None], None if bias is None else bias[None])

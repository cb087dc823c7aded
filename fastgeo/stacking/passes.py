"""One pass of a module over N networks, and the record of its calls.

Each call that the forward makes runs in its stacked form (`fastgeo.operations`), which may be a
batching rule of torch's; what has none runs in a loop over this one call. What none of them can
answer, because it depends on the values of a network, is refused: `Unfollowed`.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgeo.forward.standin import (
    Call,
    Operation,
    Pass,
    Unsupported,
    layers_around,
    layers_of,
    line_that_asks,
    operation_of,
    recomputes,
)
from fastgeo.stacking import fusion
from fastgeo.stacking.forms.arithmetic import elementwise, set_item
from fastgeo.stacking.precision import Casts
from fastgeo.stacking.stacked import (
    Differs,
    NoForm,
    Stacked,
    batched,
    by_loop,
    each,
    first_line,
    is_parted,
    one_by_one,
    part,
    tensors_in,
)
from fastgeo.stacking.stacked import call as as_function

ANSWERED = set(  # where all networks agree
    "item tolist __bool__ __int__ __float__ __complex__ __index__ __contains__ __format__ equal "
    "is_nonzero allclose".split()
)
REFUSED = set(
    """backward grad as_subclass register_hook register_post_accumulate_grad_hook retain_grad
    requires_grad_ detach_ squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_ resize_ resize_as_
    set_ as_strided as_strided_ share_memory_ rename_""".split()
)
CHANGES_A_COPY = "its forward changes in place a view that is a copy here"


class Entry(NamedTuple):
    """A call in the record of a pass.

    Attributes:
        layer: the module that made it, None outside of any.
        name: of the function.
        way: "stacked", "once for all networks", "read by (LINE)" of numbers, or "loop: WHY".
        given: (of, at) of each tensor that it takes, as in `Stacked`.
    """

    layer: nn.Module | None
    name: str
    way: str
    given: list[tuple[frozenset[str] | None, int | None]]


class Known:
    """What passes over inputs of one kind have found out, for later ones.

    Attributes:
        one_by_one: (place of a call, function) -> why it runs in a loop.
        looped: modules that run in a loop over the networks, and why.
        record: the calls of the first pass; None before it.
        casts: which of them run in which precision; None where all run in one.
    """

    def __init__(self):
        self.one_by_one: dict[tuple, str] = {}
        self.looped: dict[nn.Module, str] = {}
        self.record: list[Entry] | None = None
        self.casts: Casts | None = None


class StackedPass(Pass):
    """One call of a module on `Stacked` values of n networks.

    Attributes:
        attributes: of the module's layers (`held_by`).
        record: its calls, None if they are not recorded.
        failed: why stacked forms raised, where that was not known.
    """

    stand_in = Stacked

    def __init__(
        self,
        n: int,
        known: Known,
        attributes: list[dict | list],
        *,
        records: bool = False,
        casts: Casts | None = None,
    ):
        super().__init__()
        self.n, self.known, self.attributes, self.casts = n, known, attributes, casts
        if casts is not None:
            casts.count = 0
        self.record: list[Entry] | None = [] if records else None
        self.failed: list[str] = []
        self._waiting: list[weakref.ref[Stacked]] = []

    def shared(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        if self.record is not None and any(map(torch.is_tensor, pytree.tree_leaves(args))):
            read = call.kind == "value"
            self._note(call, f"read by{line_that_asks()}" if read else "once for all networks", [])
        return function(*args, **kwargs)

    def always(self, function: Callable) -> bool:
        return operation_of(function).random

    def answer(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        if call.name in REFUSED:
            self.refuse(f"its forward calls {call.name}")
        operation, known = operation_of(function), self.known.one_by_one
        own = operation.form is not None or operation.elementwise
        if not own and self.follows(function, call):
            return self.follow(function, call, args, kwargs)
        if self.casts is not None:
            args, kwargs = self.casts.given(call.name, args, kwargs)
        place = (*self.place, function)
        why = known.get(place, "")
        if not why:
            try:
                out = self._stacked(function, operation, args, kwargs)
                self._made(call, "stacked", (args, kwargs), out)
                return out
            except (torch.OutOfMemoryError, IndexError):  # a row of another network, for one
                raise
            except NoForm as error:
                why = str(error)
            except Exception as error:  # noqa: BLE001 - whatever torch raises
                why = f"its stacked form failed: {first_line(error)}"
            if self.follows(function, call):
                return self.follow(function, call, args, kwargs)
            if why.startswith("its stacked form failed"):
                self.failed.append(f"{call.name} runs in a loop: {why}")
        try:
            out = by_loop(function, args, kwargs, self.n)
        except Differs as error:
            self.refuse(f"its forward calls {call.name}: {error}")
        part((args, kwargs, out))  # a loop's results are no views
        known[place] = why
        self._made(call, f"loop: {why}", (args, kwargs), out)
        return out

    def _stacked(self, function: Callable, operation: Operation, args: tuple, kwargs: dict) -> Any:
        """What a function gives of all networks, by its own form or a batching rule."""
        try:
            if operation.form is not None:
                return operation.form(self.n, *args, **kwargs)
            if operation.elementwise:
                return elementwise(function, self.n, *args, **kwargs)
        except (torch.OutOfMemoryError, IndexError, NoForm):
            raise
        except Exception as error:  # noqa: BLE001 - whatever torch raises
            try:
                return batched(function, self.n, *args, **kwargs)
            except NoForm:
                raise error from None
        return batched(function, self.n, *args, **kwargs)

    def storage_of(self, tensor: Tensor) -> Tensor:
        whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
        return each(whole, self.n).clone()

    def part_of(self, storage: Tensor, tensor: Tensor) -> Stacked:
        if tensor.dtype != storage.dtype:
            self.refuse("its forward writes into memory that it reads as another dtype")
        strides = (storage.stride(0), *tensor.stride())
        sizes = (self.n, *tensor.shape)
        return Stacked(storage.as_strided(sizes, strides, tensor.storage_offset()))

    def change(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        if call.name in REFUSED:
            self.refuse(f"its forward calls {call.name}")
        target, *rest = args
        joined = self._joined(call, target, rest, kwargs)
        self._compute_waiting(target, joined)
        if joined is not None:
            target.waiting = joined.waiting
            self._made(call, "stacked", (args, kwargs), target)
            return target
        if is_parted(target.tensor):
            self.refuse(CHANGES_A_COPY)
        operation = operation_of(call.base or function)
        changes: Callable = partial(batched, function)
        if call.name == "__setitem__":
            changes = set_item
        elif operation.elementwise:
            changes = partial(elementwise, function)
        elif call.base is not None and operation.form is not None:
            return self._copy(self.answer(call.base, call, (target, *rest), kwargs), target)
        elif call.python is not None:  # F.dropout(x, inplace=True)
            kwargs.pop("inplace", None)
            with self:
                return self._copy(call.python(target, *rest, **kwargs), target)
        way = "stacked"
        try:
            changes(self.n, target, *rest, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (NoForm, RuntimeError):
            if call.base is not None and not operation.random:
                return self._copy(self.answer(call.base, call, (target, *rest), kwargs), target)
            way = "loop: it changes its input in place"
            for _ in one_by_one(function, args, kwargs, self.n):
                pass
        self._made(call, way, (args, kwargs), target)
        return target

    def _copy(self, value: Any, target: Stacked) -> Stacked:
        if value is not target:
            elementwise(Tensor.copy_, self.n, target, value)
        return target

    def _compute_waiting(self, target: Any = None, joined: Any = None) -> None:
        """Compute what waits for something that is about to change: all but the target, or, if that
        waits as well and only joins something, what was made of it."""
        left: list[weakref.ref[Stacked]] = []
        for reference in self._waiting:
            other = reference()
            if other is None or other.waiting is None:
                continue
            uses = any(value is target for value in other.waiting.uses)
            if other is target or (joined is not None and not uses):
                left.append(reference)
            else:
                other.tensor  # noqa: B018 - computes it
        self._waiting = left

    def _joined(self, call: Call, target: Stacked, rest: list, kwargs: dict) -> Stacked | None:
        """The sum or ReLU in place of something that waits, if it joins it."""
        if call.name == "add_" and len(rest) == 1 and kwargs.get("alpha", 1) == 1:
            return fusion.with_sum(target, rest[0]) if fusion.joins(target) else None
        return fusion.with_relu(target) if call.name in ("relu_", "relu") else None

    def assign(self, tensor: Any, data: Any) -> None:
        self._compute_waiting()
        with torch._C.DisableTorchFunctionSubclass():
            if data.shape != tensor.shape or data.dtype != tensor.dtype:
                self.refuse("its forward assigns other shapes or types to .data")
        own = data.tensor if isinstance(data, Stacked) else each(data, self.n).clone()
        tensor.tensor.data = own.data

    def value(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        if call.name in ANSWERED:
            answers = list(one_by_one(function, args, kwargs, self.n))
            if all(answer == answers[0] for answer in answers):
                if self.record is not None:
                    self._note(call, f"read by{line_that_asks()}", [])
                return answers[0]
        self.refuse(f"its forward asks for {call.name}() of a value that differs between networks")

    def _made(self, call: Call, way: str, given: Any, out: Any) -> None:
        """Keep account of what a call gave."""
        if type(out) is Stacked and out.waiting is not None:
            self._waiting.append(weakref.ref(out))
        if self.record is None and self.casts is None:
            return
        given = [t for t in pytree.tree_leaves(given) if torch.is_tensor(t)]
        if self.record is not None:
            self._note(call, way, given)
        names = [getattr(tensor, "of", None) for tensor in given]
        known = [of for of in names if of is not None]
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Stacked):
                tensor.of = frozenset().union(*known) if len(known) == len(names) else None
                tensor.at = len(self.record or ()) - 1

    def _note(self, call: Call, way: str, given: list[Tensor]) -> None:
        layer = next(layers_around(), None)
        if recomputes():
            raise Unsupported(
                "its forward calls torch.utils.checkpoint, which runs it again in the backward "
                "pass, with other parameters; turn gradient checkpointing off"
            )
        sources = [(getattr(t, "of", None), getattr(t, "at", None)) for t in given]
        if self.record is not None:
            self.record.append(Entry(layer, call.name, way, sources))

    def finish(self, out: Any) -> Any:
        """What the forward gave, by now."""
        if self.refused is not None:  # and the forward caught it
            raise self.refused
        self._check(out)
        if self.casts is not None and self.casts.count != self.casts.total:
            self.refuse("the layers of its forward are not those of its first pass")
        return pytree.tree_map_only(Tensor, self.current, out) if self.written else out

    def _check(self, *values: Any) -> None:
        self.check_history(t for t in pytree.tree_leaves(values) if isinstance(t, Stacked))

    def loop(self, layer: nn.Module, forward: Callable) -> Callable:
        """The forward of a layer, to run in a loop over the networks."""

        def one_after_the_other(*args: Any, **kwargs: Any) -> Any:
            if self.paused:  # inside of another one
                return forward(*args, **kwargs)
            self._compute_waiting()
            self._check(args, kwargs)
            with self.pause():
                named = (layer.named_parameters, layer.named_buffers)
                state = {
                    f"layer.{name}": tensor
                    for own in named
                    for name, tensor in own(remove_duplicate=False)
                }
                if self.casts is not None:
                    args, kwargs = self.casts.given("", (state, args), kwargs)
                    state, args = args
                # What the networks share may be changed by one of them, or be what the layer gives.
                own = pytree.tree_map_only(Tensor, self.target, (args, kwargs))
                of_one = as_function(
                    _Forward(layer, forward),
                    attributes=self.attributes,
                    on_change=lambda: self.refuse("it keeps what it computes in an attribute"),
                )
                copies = [t for t in tensors_in(own) if is_parted(t)]
                versions = [tensor._version for tensor in copies]
                out = by_loop(of_one, (state, *own), {}, self.n)
                if versions != [tensor._version for tensor in copies]:
                    self.refuse(CHANGES_A_COPY)
                part((own, out))  # its results are no views
                way = f"loop: {self.known.looped[layer]}"
                self._made(Call(type(layer).__name__), way, (state, own), out)
            return out

        return one_after_the_other


class _Forward(nn.Module):
    """A layer's forward without the layer's hooks."""

    def __init__(self, layer: nn.Module, forward: Callable):
        super().__init__()
        self.layer, self.run = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@contextlib.contextmanager
def in_loops(run: StackedPass) -> Iterator[None]:
    """Some layers in loops over the networks, for a while."""
    before = {layer: vars(layer).get("forward") for layer in run.known.looped}
    for layer in before:
        vars(layer)["forward"] = run.loop(layer, layer.forward)
    try:
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = own


def to_loop(error: Exception, module: nn.Module, known: Known) -> nn.Module:
    """The module that is to run in a loop after an error: the innermost one around it, or the one
    around that if it was in a loop already."""
    outer = itertools.takewhile(lambda layer: layer not in known.looped, layers_of(error))
    return [module, *outer][-1]

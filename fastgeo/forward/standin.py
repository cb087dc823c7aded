"""Stand-ins: a module's own forward is called on tensors that look like those of one network.

A `StandIn` has the shape, dtype and device of a tensor of one network and holds something else: the
values of N networks (`fastgeo.stacking.stacked`), or a value with its axes
(`fastgeo.symmetry.derive`). While a `Pass` is on, every call of torch's that the forward makes
comes to it, at the level of F.conv2d, and is answered for the stand-ins among its arguments. Python
in the forward is what it is, since nothing is traced: shapes, branches on them, hooks, autocast and
views that are changed in place.
"""

import contextlib
import functools
import linecache
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any, NamedTuple, NoReturn

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Unfollowed(RuntimeError):
    """A stand-in cannot answer what a forward asks; says what that is, and which line asks it."""


class StandIn(Tensor):
    """Looks like a tensor of one network."""

    tensor: Any

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        why = f"{func} is reached without a call of torch's that could be answered"
        if RUNNING:  # whose forward may catch this
            RUNNING[-1].refuse(why)
        raise Unfollowed(why)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if call_of(func).kind == "shape":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        raise Unfollowed(f"{call_of(func).name} is called on a value whose pass is over")


def mapped(change: Callable, value: Any) -> Any:
    """A value with the tensors in it changed, also those in tuples, lists, dicts and slices."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if issubclass(kind, Tensor):
        return change(value)
    if kind is tuple or kind is list:
        return kind([mapped(change, one) for one in value])
    if kind is dict:
        return {name: mapped(change, one) for name, one in value.items()}
    if kind is slice:
        return slice(*mapped(change, (value.start, value.stop, value.step)))
    if issubclass(kind, tuple):  # with names
        made = [mapped(change, one) for one in value]
        return kind(*made) if hasattr(value, "_fields") else kind(made)
    return value


PLAIN = {int, float, bool, str, type(None)}


class Call(NamedTuple):
    """What is known of a function that a forward calls.

    Attributes:
        name: for people.
        kind: "shape" for what all networks have in common, "inner" for attributes of the tensor
            within, "value" for numbers that leave torch's hands, "in place", "data" and "attribute"
            for assignments to these, else "".
        base: what an operation in place computes.
        python: the function as it runs where nobody answers it: of one that is written in Python
            the calls that it makes, in turn, can be answered.
    """

    name: str
    kind: str = ""
    base: Callable | None = None
    python: Callable | None = None


class Operation(NamedTuple):
    """What is known of a function.

    Attributes:
        form: takes N and what the function takes, with `Stacked` values; None if there is none.
        rule: takes the output and what the function takes, with axes; None if there is none.
        linear: the same where linear maps act on axes, True if its rule holds for them; None where
            no more than permutations may act on what it meets.
        random: whether every network has random numbers of its own, whatever it is given.
        elementwise: whether it treats every number alike.
    """

    form: Callable | None = None
    rule: Callable | None = None
    linear: Callable | bool | None = None
    random: bool = False
    elementwise: bool = False


TABLE: dict[Callable, Operation] = {}  # filled by `fastgeo.operations`, and by torch's own tags


def operation_of(function: Callable) -> Operation:
    if not TABLE:
        import fastgeo.operations  # noqa: F401 - which is made of forms and rules that use this
    found = TABLE.get(function)
    if found is None:
        found = TABLE[function] = tagged(getattr(function, "__name__", ""))
    return found


def tagged(name: str) -> Operation:
    """What torch says of its function of a name."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return Operation()
    tags = {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
    random = torch.Tag.nondeterministic_seeded in tags
    return Operation(random=random, elementwise=torch.Tag.pointwise in tags and not random)


OF_ONE = set(
    """shape ndim dtype device layout is_cuda is_cpu is_meta is_mps is_xla is_sparse is_sparse_csr
    is_nested is_quantized is_mkldnn is_xpu is_ipu is_maia is_vulkan is_mtia names itemsize nbytes
    """.split()
)
INNER = set("requires_grad is_leaf grad_fn grad _grad output_nr _base _version".split())
SHAPES = set(
    """size dim numel nelement stride __len__ ndimension is_floating_point is_complex is_signed
    is_contiguous get_device element_size storage_offset is_inference is_conj is_neg __hash__
    is_same_size can_cast result_type dim_order""".split()
)
VALUES = set(
    """item tolist __bool__ __int__ __float__ __complex__ __index__ __contains__ __format__
    is_nonzero equal allclose numpy __array__ data_ptr __dlpack__ untyped_storage storage
    __reduce_ex__ __deepcopy__""".split()
)


@functools.cache
def call_of(function: Callable) -> Call:
    """What is known of a function."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__", "__delete__"):
        name = getattr(function, "__self__").__name__  # noqa: B009 - of a slot wrapper
        if function.__name__ == "__get__":
            return Call(name, "shape" if name in OF_ONE else "inner" if name in INNER else "")
        return Call(name, "data" if name == "data" else "attribute")
    if name in SHAPES:
        return Call(name, "shape")
    if name in VALUES:
        return Call(name, "value")
    if name == "__setitem__" or getattr(getattr(function, "_schema", None), "is_mutable", False):
        return Call(name, "in place")
    if name in IN_PLACE:  # x &= y; that of x += y comes as add_
        return Call(name, "in place", getattr(Tensor, f"__{name[3:]}"))
    if name.endswith("_") and not name.endswith("__"):
        base = getattr(Tensor, name[:-1], None) or getattr(torch, name[:-1], None)
        return Call(name, "in place", base, _python(function))
    return Call(name, "", None, _python(function))


IN_PLACE = {f"__i{name}__" for name in "and or xor lshift rshift".split()}
NOT_ASKED = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
    lambda *_: False,
)


def _python(function: Callable) -> Callable | None:
    """A function of torch's own Python without its question whether somebody answers it."""
    code = getattr(function, "__code__", None)
    if code is None or not (function.__globals__.get("__name__") or "").startswith("torch."):
        return None
    known = function.__globals__ | NOT_ASKED
    plain = types.FunctionType(
        code, known, function.__name__, function.__defaults__, function.__closure__
    )
    plain.__kwdefaults__ = function.__kwdefaults__
    return plain


class Pass(TorchFunctionMode):
    """One call of a module on stand-ins of one class.

    Attributes:
        stand_in: the class.
        place: of the call under way: its number among all calls that the forward makes, then that
            among the calls of a function of torch's own Python, which may or may not be followed.
        written: storage of tensors that were no stand-ins when one was written into them -> such a
            tensor, and what stands for the storage since.
    """

    stand_in: type[StandIn]

    def __init__(self):
        super().__init__()
        self.paused = False
        self.place: list[int] = []
        self.written: dict[int, tuple[Tensor, Any]] = {}
        self.refused: Unfollowed | None = None
        self._followed: set[Callable] = set()

    def answer(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        """What a function gives of stand-ins."""
        raise NotImplementedError

    def change(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        """What it gives, where it changes its first argument in place."""
        raise NotImplementedError

    def value(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        """Numbers that a forward asks for."""
        raise NotImplementedError

    def operate(self, operation: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
        """What one of the operations gives that a function is made of, if it gets that far."""
        raise NotImplementedError

    def storage_of(self, tensor: Tensor) -> Any:
        """What is to stand for the storage of a tensor, into which a stand-in will be written."""
        raise NotImplementedError

    def part_of(self, storage: Any, tensor: Tensor) -> Tensor:
        """What of that stands for a tensor."""
        raise NotImplementedError

    def shared(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        """What it gives of other values."""
        return function(*args, **kwargs)

    def always(self, function: Callable) -> bool:
        """Whether a function is to be answered without any stand-in."""
        return False

    def follows(self, function: Callable, call: Call) -> bool:
        """Whether a function is written in Python whose own calls can be answered."""
        return call.python is not None and function not in self._followed

    def follow(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        """Run its own Python; where a helper of it has the whole function answered, as torch's for
        meshgrid does, that is not followed again."""
        self._followed.add(function)
        try:
            with self:
                return (call.python or function)(*args, **kwargs)
        finally:
            self._followed.discard(function)

    def __enter__(self):
        RUNNING.append(self)
        self.place.append(0)
        return super().__enter__()

    def __exit__(self, *error):
        RUNNING.pop()
        self.place.pop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        call = call_of(func)
        if call.kind == "shape":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if self.refused is not None:  # also where the forward caught it
            raise self.refused
        self.place[-1] += 1
        if self.written:
            args, kwargs = pytree.tree_map_only(Tensor, self.current, (args, kwargs))
        found: list[StandIn] = []
        self._find(args, found)
        if kwargs:
            self._find(kwargs.values(), found)
        if call.kind == "inner" and found:
            return getattr(found[0].tensor, call.name)
        if not found and not self.always(func):
            return self.shared(func, call, args, kwargs)
        if torch.is_grad_enabled():
            self.check_history(found)
        if kwargs.get("out", self) is None:
            del kwargs["out"]
        if call.kind == "value":
            return self.value(func, call, args, kwargs)
        if call.kind in ("data", "attribute"):
            if call.kind == "attribute" or not isinstance(args[0], StandIn):
                self.refuse(f"its forward assigns to .{call.name}")
            return self.assign(args[0], args[1])
        out = kwargs.pop("out", None)
        if call.kind == "in place" or kwargs.get("inplace"):
            return self.change(func, call, (self.target(args[0]), *args[1:]), kwargs)
        if out is None:
            return self.answer(func, call, args, kwargs)
        if not isinstance(out, Tensor):
            self.refuse(f"{call.name} is given several tensors to write to")
        result = self.answer(func, call, args, kwargs)
        if result.shape != out.shape:
            self.refuse(f"{call.name} is given a tensor of another shape to write to")
        return self.change(Tensor.copy_, call_of(Tensor.copy_), (self.target(out), result), {})

    def assign(self, tensor: StandIn, data: Tensor) -> None:
        """What `tensor.data = data` does."""
        self.refuse("its forward assigns to .data")

    def refuse(self, why: str) -> NoReturn:
        """Leave this pass: Unfollowed, with the line of the forward that asked."""
        self.refused = Unfollowed(f"{why}{line_that_asks()}")
        raise self.refused

    def check_history(self, values: Iterable[StandIn]) -> None:
        """Refuse what torch.autograd.Function gave of stand-ins: gradients end at these."""
        with torch._C.DisableTorchFunction():
            for value in values:
                if value.grad_fn is not None:
                    self.refuse(f"its forward has a backward of its own, {value.grad_fn.name()}")

    def _find(self, values: Iterable, found: list[StandIn]) -> None:
        """Add the stand-ins among arguments."""
        for value in values:
            kind = type(value)
            if kind is self.stand_in:
                found.append(value)
            elif kind is slice:
                self._find((value.start, value.stop, value.step), found)
            elif kind not in PLAIN and issubclass(kind, (tuple, list)):
                self._find(value, found)

    def current(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor, if a stand-in was written into it or into a view of it."""
        if isinstance(tensor, StandIn):
            return tensor
        found = self.written.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        if torch.is_grad_enabled() and _base(found[0]) is not _base(tensor):
            self.refuse("its forward shares memory between values with gradients and without")
        return self.part_of(found[1], tensor)

    def target(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor into which a stand-in is about to be written."""
        tensor = self.current(tensor)
        if isinstance(tensor, StandIn):
            return tensor
        self.written[tensor.untyped_storage()._cdata] = tensor, self.storage_of(tensor)
        return self.current(tensor)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is answered for a while."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


RUNNING: list[Pass] = []


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


CALL = nn.Module._call_impl.__code__
OWN = tuple(
    f"{folder}{os.sep}"
    for folder in (FilePath(torch.__file__).parent, FilePath(__file__).parents[1])
)


def layers_around() -> Iterator[nn.Module]:
    """The modules whose forwards are under way, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


class Unsupported(TypeError):
    """A forward that no engine can evaluate for several networks; says why."""


def recomputes() -> bool:
    """Whether torch.utils.checkpoint calls."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


def line_that_asks() -> str:
    """' (FILE:LINE: its text)' of the innermost line that is neither torch's nor ours."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(OWN):
        frame = frame.f_back
    if frame is None:
        return ""
    file, number = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, number).strip()
    return f" ({FilePath(file).name}:{number}{f': {text}' if text else ''})"


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """torch.compile is off for a while, for layers that it compiles."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def layers_of(error: BaseException) -> list[nn.Module]:
    """The modules whose forwards an exception has left, the outermost first."""
    found, at = [], error.__traceback__
    while at is not None:
        if at.tb_frame.f_code is CALL:
            found.append(at.tb_frame.f_locals["self"])
        at = at.tb_next
    return found


def held_by(layers: Iterable[nn.Module]) -> list[dict | list]:
    """The attributes of layers, and the dicts and lists among them that forwards may change."""
    return [
        held
        for layer in layers
        for own in [vars(layer)]
        for name, held in [("", own), *own.items()]
        if isinstance(held, dict | list) and name not in KEPT_BY_FORWARDS
    ]


KEPT_BY_FORWARDS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


@contextlib.contextmanager
def unchanged(attributes: Iterable[dict | list]) -> Iterator[Callable[[], bool]]:
    """Undo what a forward assigns to attributes (`held_by`), or keeps in them: values of other
    networks, or no values at all. Gives what tells whether it has done so."""
    kept = [(held, held.copy()) for held in attributes]
    try:
        yield lambda: not all(_same(held, before) for held, before in kept)
    finally:
        for held, before in kept:
            if not _same(held, before):
                held.clear()
                held.update(before) if isinstance(held, dict) else held.extend(before)


def _same(held: dict | list, before: dict | list) -> bool:
    if len(held) != len(before):
        return False
    if isinstance(held, dict) and isinstance(before, dict):
        return all(map(operator.is_, held.values(), before.values()))
    return all(map(operator.is_, held, before))

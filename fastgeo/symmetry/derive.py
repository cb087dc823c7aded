"""The permutation symmetries of a network, read off one pass.

The module is called once on an example input, with values that carry an `Axis`
(`fastgeo.symmetry.axes`) for each of their dimensions, those of parameters free to begin with; each
of the operations that torch's functions are made of says which of them are permuted alike and which
are not (`fastgeo.operations`). What is left free in the end may be permuted.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastgeo.data.inputs import Inputs, arguments, each_tensor, is_inputs, tensors_within
from fastgeo.forward.modes import batch_norms, looked_at
from fastgeo.forward.standin import Call, Operation, Pass, layers_around, mapped, operation_of
from fastgeo.path import uncompiled
from fastgeo.symmetry import rules
from fastgeo.symmetry.axes import Axis, fix, fixed
from fastgeo.symmetry.carried import NoRule, Value, unify_all, values_in
from fastgeo.symmetry.spec import Block, Channels, PermutationSpec
from fastgeo.symmetry.terms import settle, terms_of

EMPTY = ("empty", "empty_like", "empty_strided", "new_empty")  # hold what was there before
INPUT = "it is the network's input"
OUTPUT = "it is the network's output"


def permutation_spec(module: nn.Module, example_input: Inputs | None = None) -> PermutationSpec:
    """The permutations of a network's channels that leave its function as it is.

    Args:
        module: any nn.Module, compiled or not; it is not changed. Its forward may look at shapes
            as it likes, and at what it computes of integers alone, masks or lengths, for which the
            symmetries are those on inputs with such answers. If it decides by any other numbers
            that it computes, nothing is permuted, and the spec names the line.
        example_input: [B, ...] as its forward takes it, or a mapping of such tensors, the keyword
            arguments of its forward, of which labels are left out; by default the module's
            attribute `example_input_array`.

    Raises:
        TypeError: no module, one of TorchScript, or no such input.
        ValueError: an input that the module cannot be evaluated on, or none, or a module that
            returns no tensor or is on the meta device.

    Example:
        >>> print(permutation_spec(nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)), x))
        Sequential: 1 permutations
          0.weight[0]: 5 positions
        fixed:
          0.weight[1]: it is the network's input
          2.weight[0], 2.bias[0]: it is the network's output
    """
    module = uncompiled(module)
    return Symmetries(module, example(module, example_input)).spec


def example(module: nn.Module, given: Inputs | None) -> Inputs:
    """The example input of a module, on its device."""
    if given is None:
        given = getattr(module, "example_input_array", None)
    if given is None:
        raise ValueError(
            f"what {type(module).__name__} takes is not known; give example_input, one batch of "
            "its inputs"
        )
    if not is_inputs(given):
        raise TypeError(
            "example_input must be a tensor [B, ...] or a mapping of them, got "
            f"{type(given).__name__}"
        )
    own = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in own):
        raise ValueError(
            f"{type(module).__name__} is on the meta device, without numbers; load its state first"
        )
    tensor = next(iter(own), torch.empty(0))

    def fitted(t: Tensor) -> Tensor:
        return t.to(tensor.device, tensor.dtype if t.is_floating_point() else None)

    return each_tensor(fitted, given)


class Symmetries:
    """A module with the axes of all values that it computes.

    Attributes:
        module, inputs: what was called.
        spec: its permutations.
        values: place of each call in a pass -> the axes of what it gave, if that is a tensor.
    """

    def __init__(self, module: nn.Module, inputs: Inputs):
        self.module, self.inputs = module, inputs
        self.values: Mapping[tuple[int, ...], tuple[Axis, ...]] = {}
        state: Mapping[str, Sequence[Axis]]
        args, kwargs = arguments(module, inputs)
        with looked_at(module):
            try:
                own = {name: t.clone() for name, t in module.named_buffers(remove_duplicate=False)}
                out = functional_call(module, own, *_copied(args, kwargs), tie_weights=False)
            except Exception as error:
                raise ValueError(
                    f"{type(module).__name__} cannot be evaluated on example_input: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if next(tensors_within(out), None) is None:
                raise ValueError(f"{type(module).__name__} returns no tensor")
            run = AxesPass(module)
            try:
                state, self.values = run.settled(args, kwargs)
            except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
                why = f"the network cannot be followed: {error}"
                state = {
                    name: [fixed(size, why) for size in tensor.shape]
                    for name, tensor, _ in _tensors(module)
                }
        self._names: dict[Axis, str] = {}
        self.spec = self._spec(state)

    def blocks(self, name: str, axes: Sequence[Axis]) -> list[Block]:
        """The parts of a tensor with such axes that are permuted."""
        blocks = []
        for term in terms_of(axes):
            names = tuple(map(self._names.get, term.atoms))
            if any(names):
                sizes = tuple(atom.size for atom in term.atoms)
                within = tuple(term.outer(i) if own else () for i, own in enumerate(names))
                blocks.append(Block(name, term.offset, sizes, term.strides, names, within))
        return blocks

    def _spec(self, state: Mapping[str, Sequence[Axis]]) -> PermutationSpec:
        first: dict[Tensor, str] = {}
        tied = {
            name: first[tensor]
            for name, tensor, _ in _tensors(self.module)
            if first.setdefault(tensor, name) != name
        }
        atoms: dict[str, list[list[Axis]]] = {}  # of each axis, the free ones
        for name, axes in state.items():
            atoms[name] = [[] for _ in axes]
            for term in terms_of(axes) if all(axis.size for axis in axes) else ():
                for atom, of in zip(term.atoms, term.of, strict=True):
                    if atom.why is None and atom not in atoms[name][of]:
                        atoms[name][of].append(atom)
            for i, own in enumerate(atoms[name]):
                for k, atom in enumerate(own):
                    number = f".{k}" if len(own) > 1 else ""
                    self._names.setdefault(atom, f"{name}[{i}]{number}")
        channels = {}
        for atom, name in self._names.items():
            outer = sorted(atom.depends_on(), key=lambda p: len(p.depends_on()))
            channels[name] = Channels(atom.size, tuple(self._names[p] for p in outer))
        fixed_axes: dict[str, dict[int, str]] = {}
        for name, axes in state.items():
            reasons = ([a.why for a in axis.atoms() if a.why and a.size > 1] for axis in axes)
            fixed_axes[name] = {i: whys[0] for i, whys in enumerate(reasons) if whys}
        return PermutationSpec(
            channels=channels,
            blocks=tuple(
                block
                for name, axes in state.items()
                if all(axis.size for axis in axes)
                for block in self.blocks(name, axes)
            ),
            axes={
                name: tuple(tuple(self._names[atom] for atom in own) for own in axes)
                for name, axes in atoms.items()
            },
            fixed={name: axes for name, axes in fixed_axes.items() if axes},
            tied=tied,
            buffers=frozenset(name for name, _, kind in _tensors(self.module) if kind == "buffer"),
            module=type(self.module).__name__,
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, kind) of all parameters and buffers, under all of their names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter, "parameter"
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield name, buffer, "buffer"


class AxesPass(Pass):
    """One pass on `Value`s."""

    stand_in = Value

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.state: dict[str, Value] = {}  # by the first name of each
        self.names: dict[str, str] = {}  # name -> the first one of the same tensor
        first: dict[Tensor, str] = {}
        statistics = set(_statistics(module))
        for name, tensor, kind in _tensors(module):
            self.names[name] = first.setdefault(tensor, name)
            if self.names[name] == name:
                own = tensor if kind == "parameter" else tensor.clone()
                self.state[name] = Value(own, map(Axis, tensor.shape))
                if kind == "buffer" and name not in statistics:
                    self.state[name] = _constant(own, f"{name} is a buffer")
        self.layers = {layer: name for name, layer in module.named_modules()}
        self.values: dict[tuple[int, ...], tuple[Axis, ...]] = {}
        self.all: list[Sequence[Axis]] = []
        self.met: list[Value] = []  # by the call under way
        self.used: set[Axis] = set()
        self.placed = {INPUT, OUTPUT}  # reasons of which it is known where they came up

    def settled(
        self, args: tuple, kwargs: dict
    ) -> tuple[dict[str, tuple[Axis, ...]], dict[tuple[int, ...], tuple[Axis, ...]]]:
        """The axes of parameters and buffers by their first names, and of what calls gave."""
        args, kwargs = pytree.tree_map_only(Tensor, _given, (args, kwargs))
        state: dict[str, Tensor] = {name: self.state[own] for name, own in self.names.items()}
        # Attention and recurrent layers as what they are made of, the latter in torch's Python.
        with sdpa_kernel(SDPBackend.MATH), enable_python_dispatcher(), self:
            out = functional_call(self.module, state, args, kwargs, tie_weights=False)
        if self.refused is not None:
            raise self.refused
        _fix_all((t for t in tensors_within(out) if isinstance(t, Value)), OUTPUT)
        for value in self.state.values():
            if value.axes and value.axes[0] not in self.used:
                _fix_all([value], "the network does not use it")
        self.conclude()
        axes = {name: value.axes for name, value in self.state.items()}
        settle([*self.all, *axes.values()])
        return axes, self.values

    def conclude(self) -> None:
        """What is to be said of axes once everything has met them."""

    def constant(self, tensor: Tensor) -> Value:
        """What depends on no input and no parameter."""
        return _constant(tensor)

    def answer(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        place, self.met = tuple(self.place), []
        if self.follows(function, call):
            out = self.follow(function, call, args, kwargs)
        else:
            try:
                with torch._C.DisableTorchFunctionSubclass():
                    out = function(*args, **kwargs)
            except NoRule as error:
                out = function(*_plain(args), **_plain(kwargs))
                if any(t.tensor.shape != t.shape for t in values_in((args, kwargs))):
                    self.refuse(f"its forward calls {call.name}, which changes a shape in place")
                if next(tensors_within(out), None) is None:
                    self.refuse(f"its forward asks for {call.name} of what it computes")
                out = self._with_axes(_without_rule(str(error)), out, args, kwargs)
            self._say_where(call, self.met)
        if isinstance(out, Value):
            self.values[place] = out.axes
        return out

    change = answer

    def operate(self, operation: OpOverload, args: tuple, kwargs: dict) -> Any:
        """What one of the operations gives that torch's functions are made of."""
        packet = operation.overloadpacket
        if operation._schema.is_mutable:
            return self._operate_in_place(operation, args, kwargs)
        known = operation_of(packet)
        rule = self.rule_of(known)
        if rule is None and not known.random:
            made_of = decomposition_table.get(operation, operation.decompose)
            if (out := made_of(*args, **kwargs)) is not NotImplemented:
                return out
        out = operation(*_plain(args), **_plain(kwargs))
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            if packet.__name__ in EMPTY:
                out.zero_()
            why = "it draws random numbers" if known.random else "it has no rule"
            return self._with_axes(rule or _without_rule(why), out, args, kwargs)
        if out is not None and any(value.asked for value in values_in((args, kwargs))):
            raise NoRule("it depends on the numbers that it is given")
        return out

    def rule_of(self, known: Operation) -> Callable | None:
        return known.rule or (rules.elementwise if known.elementwise else None)

    def _operate_in_place(self, operation: OpOverload, args: tuple, kwargs: dict) -> Any:
        """As out of place, whose axes are those of what is changed."""
        target, name = args[0], operation.overloadpacket.__name__
        if not isinstance(target, Value):
            raise NoRule(f"{name} writes into a tensor that torch makes for it")
        base = getattr(getattr(torch.ops.aten, name[:-1], None), operation._overloadname, None)
        if base is None:
            made = self._with_axes(_without_rule("it has no rule"), target.tensor, args, kwargs)
        else:
            made = base(*args, **kwargs)
        if made.shape != target.shape:
            raise NoRule(f"{name} changes a shape in place")
        operation(*_plain(args), **_plain(kwargs))
        unify_all(target.axes, made.axes)
        target.write([made])
        return target

    def shared(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        out = function(*args, **kwargs)
        return out.zero_() if call.name in EMPTY else out

    def value(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> Any:
        if any(value.asked for value in values_in((args, kwargs))):
            self.refuse(f"its forward asks for {call.name}() of what it computes")
        return function(*_plain(args), **_plain(kwargs))

    def storage_of(self, tensor: Tensor) -> Value:
        return self.constant(tensor)

    def part_of(self, storage: Value, tensor: Tensor) -> Tensor:
        if storage.tensor is not tensor:
            self.refuse("its forward writes into a tensor of which it has another view")
        return storage

    def _with_axes(self, rule: Callable, out: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation gave of values, with its axes by a rule."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t if isinstance(t, Value) else self.constant(t), (args, kwargs)
        )
        given = values_in((args, kwargs))
        if rule is rules.alike:  # of its first argument only the shape
            given = given[1:]
        self.used.update(value.axes[0] for value in given if value.axes)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        try:
            given_by_rule = _flat(rule(out, *args, **kwargs))
            axes = given_by_rule[: len(leaves)]
            if [tuple(a.size for a in own) for own in axes] != [tuple(t.shape) for t in leaves]:
                raise NoRule("its rule does not cover this form of it")
            self.all += given_by_rule[len(leaves) :]
        except Exception as error:  # noqa: BLE001 - then nothing is known of the operation
            known = isinstance(error, NoRule)
            why = str(error) if known else f"its rule does not cover this form of it: {error}"
            _fix_all(given, why)
            axes = [[fixed(size, why) for size in leaf.shape] for leaf in leaves]
        found, asked = iter(axes), any(value.asked for value in given)
        made = pytree.tree_map_only(Tensor, lambda leaf: Value(leaf, next(found), asked), out)
        self.all += [value.axes for value in values_in(made)]
        self.met += [*values_in(made), *given]
        return made

    def _say_where(self, call: Call, values: list[Value]) -> None:
        """Name the layer and operation in the reasons that have come up in it."""
        where = None
        for axis in {axis for value in values for axis in value.axes}:
            for atom, reason in itertools.product(axis.atoms(), ("why", "only")):
                why = getattr(atom, reason)
                if why is None or why in self.placed:
                    continue
                if where is None:
                    layer = self.layers.get(next(layers_around(), None), "")
                    where = f"{call.name} in {layer}" if layer else call.name
                setattr(atom, reason, f"{where}: {why}")
                self.placed.add(f"{where}: {why}")


def _copied(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))


def _plain(tree: Any) -> Any:
    return mapped(lambda t: t.tensor if isinstance(t, Value) else t, tree)


def _without_rule(why: str) -> Callable:
    def rule(*args: Any, **kwargs: Any) -> NoReturn:
        raise NoRule(why)

    return rule


def _given(tensor: Tensor) -> Value:
    axes = (fixed(size, INPUT) for size in tensor.shape)
    return Value(tensor.clone(), axes, tensor.is_floating_point() or tensor.is_complex())


def _statistics(module: nn.Module) -> Iterator[str]:
    """Names of running statistics, which are of the channels."""
    for name, layer in batch_norms(module).items():
        for own, _ in layer.named_buffers(recurse=False):
            yield f"{name}.{own}".lstrip(".")


def _fix_all(values: Iterable[Value], why: str) -> None:
    for value in values:
        for axis in value.axes:
            fix(axis, why)


def _constant(tensor: Tensor, why: str = "it meets numbers that are always the same") -> Value:
    """What depends on no input and no parameter; any permutation leaves equal numbers alike."""
    axes = []
    for i, size in enumerate(tensor.shape):
        equal = bool((tensor == tensor.narrow(i, 0, 1)).all()) if size else False
        axes.append(Axis(size, None if equal else why))
    return Value(tensor, axes, asked=False)


def _flat(axes: Any) -> list[list[Axis]]:
    """The axes of each tensor in what a rule returned."""
    if axes is None:
        return []
    if all(isinstance(axis, Axis) for axis in axes):
        return [axes]
    return [own for part in axes for own in _flat(part)]

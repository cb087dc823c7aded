"""The permutation symmetries of a network, read off its graph.

The graph that stacking runs (`fastgeo.tracing`) is run once on an example input. Every axis of
every value has an `Axis` (`fastgeo.axes`), those of parameters free to begin with; each operation
says which of them are permuted alike and which are not (`fastgeo.axis_rules`,
`fastgeo.axis_shapes`, `fastgeo.axis_layers`). What is left free in the end may be permuted.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastgeo import axis_layers, axis_rules, axis_shapes
from fastgeo.axes import Axis, fix, fixed
from fastgeo.axis_terms import settle, terms_of
from fastgeo.axis_values import NoRule, Value, values_in
from fastgeo.inputs import Inputs, each_tensor, is_inputs
from fastgeo.modes import batch_norms, evaluation_mode
from fastgeo.permutation import Block, Channels, PermutationSpec
from fastgeo.tracing import Trace, TraceFailed, trace
from fastgeo.values import no_fast_path

FUNCTIONS = axis_rules.FUNCTIONS | axis_shapes.FUNCTIONS | axis_layers.FUNCTIONS
INPUT = "it is the network's input"
OUTPUT = "it is the network's output"
SHAPES = set("dim getattr is_floating_point ndimension nelement numel size stride".split())


def permutation_spec(module: nn.Module, example_input: Inputs | None = None) -> PermutationSpec:
    """The permutations of a network's channels that leave its function as it is.

    Args:
        module: any nn.Module; it is not changed. One that cannot be traced has no known
            permutations, and its spec says why.
        example_input: [B, ...] as its forward takes it, or a mapping of such tensors, the keyword
            arguments of its forward; by default the module's attribute `example_input_array`.

    Raises:
        TypeError: no module, or no such input.
        ValueError: an input that the module cannot be evaluated on, or none.

    Example:
        >>> print(permutation_spec(nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)), x))
        Sequential: 1 permutations
          0.weight[0]: 5 positions
        fixed:
          0.weight[1]: it is the network's input
          2.weight[0], 2.bias[0]: it is the network's output
    """
    return Symmetries(module, example(module, example_input)).spec


def example(module: nn.Module, given: Inputs | None) -> Inputs:
    """The example input of a module, on its device."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
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
    tensor = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0))

    def fitted(t: Tensor) -> Tensor:
        return t.to(tensor.device, tensor.dtype if t.is_floating_point() else None)

    return each_tensor(fitted, given)


class Symmetries:
    """A module with the axes of all values of its graph.

    Attributes:
        spec: its permutations.
        traced: its graph, None if it has none.
        values: node -> the axes of its value, if that is a tensor.
    """

    def __init__(self, module: nn.Module, inputs: Inputs):
        self.module, self.traced, self.values = module, None, {}
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
        with evaluation_mode(module), torch.no_grad(), no_fast_path():
            try:
                module(*args, **kwargs)
            except Exception as error:
                raise ValueError(
                    f"{type(module).__name__} cannot be evaluated on example_input: "
                    f"{type(error).__name__}: {error}"
                ) from error
            try:
                self.traced = trace(module, sorted(kwargs) or None)
            except TraceFailed as error:
                why = f"the network cannot be traced: {error}"
                state = {
                    name: [fixed(size, why) for size in tensor.shape]
                    for name, tensor, _ in _tensors(module)
                }
            else:
                run = _Run(module, self.traced)
                run.run(*in_order(self.traced, inputs))
                state, self.values = run.settled()
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
            for term in terms_of(axes):
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
                block for name, axes in state.items() for block in self.blocks(name, axes)
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


def in_order(traced: Trace, inputs: Inputs) -> list[Tensor]:
    """Inputs in the order of a graph's placeholders."""
    if not isinstance(inputs, Mapping):
        return [inputs]
    return [inputs[node.target] for node in traced.graph.nodes if node.op == "placeholder"]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, kind) of all parameters and buffers, under all of their names."""
    for name, tensor in module.named_parameters(remove_duplicate=False):
        yield name, tensor, "parameter"
    for name, tensor in module.named_buffers(remove_duplicate=False):
        yield name, tensor, "buffer"


class _Run(fx.Interpreter):
    """One pass of the graph on `Value`s."""

    def __init__(self, module: nn.Module, traced: Trace):
        super().__init__(module, graph=traced.graph)
        self.constants, self.extra_traceback = traced.constants, False
        self.state: dict[str, Value] = {}
        self.first: dict[Tensor, str] = {}
        for name, tensor, kind in _tensors(module):
            why = None if kind == "parameter" else f"{name} is a buffer"
            self.first.setdefault(tensor, name)
            self.state[name] = Value(tensor, tuple(Axis(size, why) for size in tensor.shape))
        for name, layer in batch_norms(module).items():  # running statistics are of the channels
            for own, tensor in layer.named_buffers(recurse=False):
                own = f"{name}.{own}".lstrip(".")
                self.state[own] = Value(tensor, tuple(map(Axis, tensor.shape)))
        self.values: dict[fx.Node, tuple[Axis, ...]] = {}
        self.all: list[tuple[Axis, ...]] = []
        self.used: set[str] = set()
        self.placed: set[Axis] = set()  # fixed, and it is known where

    def settled(self) -> tuple[dict[str, tuple[Axis, ...]], dict[fx.Node, tuple[Axis, ...]]]:
        """The axes of parameters and buffers by their first names, and of nodes."""
        state = {name: self.state[name] for name in self.first.values()}
        for name, value in state.items():
            if name not in self.used:
                _fix_all([value], "the network does not use it")
        settle([*self.all, *(value.axes for value in state.values())])
        return {name: value.axes for name, value in state.items()}, self.values

    def placeholder(self, target: str, args: tuple, kwargs: dict) -> Value:
        tensor = super().placeholder(target, args, kwargs)
        return Value(tensor, tuple(fixed(size, INPUT) for size in tensor.shape))

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        if target in self.constants:
            return _constant(self.constants[target])
        found = super().get_attr(target, args, kwargs)
        return self._own(target) if isinstance(found, Tensor) else found

    def output(self, target: str, args: tuple, kwargs: dict) -> None:
        _fix_all(values_in(args), OUTPUT)

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        if isinstance(out, Value):
            self.values[node] = out.axes
        self.all += [value.axes for value in values_in(out)]
        self._say_where(node, [*values_in(out), *values_in(self.fetch_args_kwargs_from_env(node))])
        return out

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in (getattr, operator.getitem) and not isinstance(args[0], Value):
            return target(*args)  # of a tuple
        rule = FUNCTIONS.get(target)
        return self._by_rule(rule, target, args, kwargs, args, kwargs)

    def call_method(self, target: str, args: tuple, kwargs: dict) -> Any:
        def method(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            return getattr(input, target)(*args, **kwargs)

        method.__name__ = target
        return self._by_rule(FUNCTIONS.get(target), method, args, kwargs, args, kwargs)

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        layer = self.fetch_attr(target)
        own = {
            name: self._own(f"{target}.{name}")
            for named in (layer.named_parameters, layer.named_buffers)
            for name, _ in named(remove_duplicate=False)
        }
        rule = axis_layers.MODULES.get(type(layer))
        return self._by_rule(rule, layer, args, kwargs, (layer, own, *args), kwargs)

    def _own(self, name: str) -> Value:
        first = self.first[self.state[name].tensor]
        self.used.add(first)
        return self.state[first]

    def _by_rule(
        self,
        rule: Callable | None,
        function: Callable,
        args: tuple,
        kwargs: dict,
        of_rule: tuple,
        named: dict,
    ) -> Any:
        """What a function gives of values, with its axes by a rule of what the rule takes."""
        given = values_in((of_rule, named))
        out = function(*_tensors_of(args), **_tensors_of(kwargs))
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if not given:
            return pytree.tree_map_only(Tensor, _constant, out)
        if not leaves:  # a number or a shape
            if getattr(function, "__name__", "") not in SHAPES:
                _fix_all(given, "its numbers leave the graph")
            return out
        try:
            if rule is None:
                raise NoRule("it has no rule")
            axes = _flat(rule(out, *of_rule, **named))
            shapes = [tuple(axis.size for axis in own) for own in axes]
            if shapes != [tuple(leaf.shape) for leaf in leaves]:
                raise NoRule("its rule does not cover this form of it")
        except Exception as error:  # noqa: BLE001 - then nothing is known of the operation
            known = isinstance(error, NoRule)
            why = str(error) if known else f"its rule does not cover this form of it: {error}"
            _fix_all(given, why)
            axes = [[fixed(size, why) for size in leaf.shape] for leaf in leaves]
        found = iter(axes)
        return pytree.tree_map_only(Tensor, lambda leaf: Value(leaf, tuple(next(found))), out)

    def _say_where(self, node: fx.Node, values: list[Value]) -> None:
        """Name the layer and operation in the reasons that have come up in it."""
        layers = list(node.meta.get("nn_module_stack", {}))
        where = f"{node.name} in {layers[-1]}" if layers and layers[-1] else node.name
        own = [v for name, v in self.state.items() if name.startswith(f"{node.target}.")]
        for axis in {axis for value in [*values, *own] for axis in value.axes}:
            for atom in axis.atoms():
                if atom.why is not None and atom not in self.placed:
                    self.placed.add(atom)
                    if atom.why not in (INPUT, OUTPUT) and node.op.startswith("call"):
                        atom.why = f"{where}: {atom.why}"


def _fix_all(values: Iterable[Value], why: str) -> None:
    for value in values:
        for axis in value.axes:
            fix(axis, why)


def _constant(tensor: Tensor) -> Value:
    """What depends on no input and no parameter; any permutation leaves equal numbers alike."""
    axes = []
    for i, size in enumerate(tensor.shape):
        equal = bool((tensor == tensor.narrow(i, 0, 1)).all()) if size else False
        axes.append(Axis(size, None if equal else "it meets numbers that are always the same"))
    return Value(tensor, tuple(axes))


def _tensors_of(tree: Any) -> Any:
    return fx.node.map_aggregate(
        tree, lambda leaf: leaf.tensor if isinstance(leaf, Value) else leaf
    )


def _flat(axes: Any) -> list[list[Axis]]:
    """The axes of each tensor in what a rule returned."""
    if axes is None:
        return []
    if all(isinstance(axis, Axis) for axis in axes):
        return [axes]
    return [own for part in axes for own in _flat(part)]

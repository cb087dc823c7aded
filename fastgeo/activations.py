"""How alike the features of two networks are: correlations of their activations on a batch.

Y. Li, J. Yosinski, J. Clune, H. Lipson, J. Hopcroft, "Convergent Learning: Do different neural
networks learn the same representations?" (ICLR 2016), and Ainsworth et al., "Git Re-Basin" (2022),
section 3.1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from fastgeo.assignment import leaves
from fastgeo.inputs import Inputs
from fastgeo.modes import evaluation_mode
from fastgeo.path import StateDict
from fastgeo.permutation import Block
from fastgeo.symmetry import Symmetries, in_order
from fastgeo.values import no_fast_path


@torch.no_grad()
def correlations(
    symmetries: Symmetries, a: StateDict, b: StateDict, inputs: Inputs
) -> dict[str, Tensor]:
    """For each permutation the correlation of every feature of a with every feature of b.

    Args:
        symmetries: of the network of both.
        a, b: states of it.
        inputs: [B, ...], the batch.

    Returns:
        Name -> [size, size], or [sizes of what it is within, size, sizes of what it is within,
        size]: a's features, then b's; summed over all values of the graph with these features.
        Permutations that no value shows by themselves are left out.
    """
    if symmetries.traced is None:
        return {}
    with evaluation_mode(symmetries.module), no_fast_path():
        run = _Run(symmetries, a, b)
        run.run(*in_order(symmetries.traced, inputs))
    return run.found


@dataclass(frozen=True, eq=False, slots=True)
class _Both:
    """A value of both networks."""

    a: Any
    b: Any


class _Run(fx.Interpreter):
    """One pass of the graph through both networks, which keeps no value longer than it is used."""

    def __init__(self, symmetries: Symmetries, a: StateDict, b: StateDict):
        super().__init__(symmetries.module, graph=symmetries.traced.graph)
        self.symmetries, self.extra_traceback = symmetries, False
        self.states = {"a": a, "b": b}
        self.found: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            tensor = super().run_node(node)
            return _Both(tensor, tensor)
        a, b = (self._one(node, i) for i in ("a", "b"))
        axes = self.symmetries.values.get(node)
        if axes is not None and node.op.startswith("call") and a.is_floating_point():
            for block in self.symmetries.blocks(node.name, axes):
                self._add(block, *(block.of(value.contiguous()) for value in (a, b)))
        return _Both(a, b)

    def _one(self, node: fx.Node, network: str) -> Any:
        """The value of a node in network a or b."""
        args, kwargs = fx.node.map_aggregate(
            self.fetch_args_kwargs_from_env(node),
            lambda value: getattr(value, network) if isinstance(value, _Both) else value,
        )
        state = self.states[network]
        if node.op == "get_attr" and node.target in state:
            return state[node.target]
        if node.op == "get_attr" and node.target in self.symmetries.traced.constants:
            return self.symmetries.traced.constants[node.target]
        if node.op == "call_module":
            prefix = f"{node.target}."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            return functional_call(self.fetch_attr(node.target), own, args, kwargs)
        return getattr(super(), node.op)(node.target, args, kwargs)

    def _add(self, block: Block, a: Tensor, b: Tensor) -> None:
        names = {name for name in block.axes if name is not None}
        for axis in leaves(block, names):
            places = (*block.within[axis], axis)
            if len(names) > len(places):
                continue  # the other axes would have to be matched already
            sizes = [block.sizes[place] for place in places]
            rows = []
            for value in (a, b):
                own = value.double().nan_to_num(0.0, 0.0, 0.0)  # masks hold infinities
                own = own.movedim(places, tuple(range(len(places))))
                own = own.flatten(0, len(places) - 1).flatten(1) if own.ndim > 1 else own[:, None]
                own = own - own.mean(1, keepdim=True)
                norm = own.norm(dim=1, keepdim=True)
                rows.append(own / norm.clamp(min=1e-12 * norm.max().clamp(min=1e-300)))
            gain = (rows[0] @ rows[1].T).view(*sizes, *sizes)
            name = block.axes[axis]
            self.found[name] = self.found[name] + gain if name in self.found else gain

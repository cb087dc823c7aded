"""How alike the features of two networks are: correlations of their activations on a batch.

Y. Li, J. Yosinski, J. Clune, H. Lipson, J. Hopcroft, "Convergent Learning: Do different neural
networks learn the same representations?" (ICLR 2016), and Ainsworth et al., "Git Re-Basin" (2022),
section 3.1.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgeo.data.inputs import Inputs, arguments, tensors_by_name
from fastgeo.forward.modes import looked_at
from fastgeo.forward.standin import Call, held_by
from fastgeo.matching.assignment import leaves
from fastgeo.path import StateDict
from fastgeo.stacking.passes import Known, StackedPass
from fastgeo.stacking.stacked import Stacked, call
from fastgeo.symmetry.derive import Symmetries
from fastgeo.symmetry.spec import Block


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
        size]: a's features, then b's; summed over all values that have these features.
        Permutations that no value shows by themselves are left out.
    """
    args, kwargs = arguments(symmetries.module, inputs)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: Stacked(torch.stack([t, t])), (args, kwargs)
    )
    own = tensors_by_name(symmetries.module)
    state = {
        name: Stacked(torch.stack([of.get(name, t).to(t) for of in (a, b)]))
        for name, t in own.items()
    }
    run = _Correlations(symmetries)
    with looked_at(symmetries.module), run:
        call(symmetries.module)(state, args, kwargs)
    return run.found


class _Correlations(StackedPass):
    """A pass through both networks, which keeps no value longer than it is used."""

    def __init__(self, symmetries: Symmetries):
        super().__init__(2, Known(), held_by(symmetries.module.modules()))
        self.symmetries = symmetries
        self.found: dict[str, Tensor] = {}

    def _made(self, of: Call, way: str, given: Any, out: Any) -> None:
        super()._made(of, way, given, out)
        axes = self.symmetries.values.get(tuple(self.place))
        if axes is None or not isinstance(out, Stacked) or not out.tensor.is_floating_point():
            return
        if [axis.size for axis in axes] == list(out.tensor.shape[1:]):
            for block in self.symmetries.blocks(of.name, axes):
                self._add(block, *(block.of(value.contiguous()) for value in out.tensor))

    def _add(self, block: Block, a: Tensor, b: Tensor) -> None:
        names = {name for name in block.axes if name is not None}
        for axis, name in leaves(block, names):
            places = (*block.within[axis], axis)
            if len(names) > len(places):
                continue  # the other axes would have to be matched already
            sizes = [block.sizes[place] for place in places]
            rows = []
            for value in (a, b):
                most = torch.finfo(value.dtype).max / 2  # masks hold the lowest number, or infinity
                own = value.masked_fill(~(value.abs() < most), 0).double()
                own = own.movedim(places, tuple(range(len(places)))).reshape(prod(sizes), -1)
                own = own - own.mean(1, keepdim=True)
                norm = own.norm(dim=1, keepdim=True)
                rows.append(own / norm.clamp(min=1e-12 * norm.max().clamp(min=1e-300)))
            if name not in self.found:
                self.found[name] = rows[0].new_zeros(*sizes, *sizes)
            self.found[name].view(prod(sizes), -1).addmm_(rows[0], rows[1].T)

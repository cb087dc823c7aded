"""Logits of the points beside a block: those of other ranks, or of an end.

Each side of a boundary gets the other's logits and takes the gradient of the edge between them to
its own, so no gradients are sent. Ranks walk along their blocks in turn upwards and downwards, so
that both sides of a boundary come to it at the same time.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from fastgeo.ranks.axis import Axis, Kind, like, wait
from fastgeo.ranks.blocks import Blocks

LEFT, RIGHT = 0, 1


class Boundary:
    """What is beside the block of this rank in one step.

    Args:
        ends: logits [1, R, C] of the ends that this rank evaluated: LEFT the start, RIGHT the end.
        ready: called before anything is sent, once the block's first logits are known.
    """

    def __init__(
        self, blocks: Blocks, axis: Axis, ends: dict[int, Tensor], ready: Callable[[], None]
    ):
        self._blocks, self._axis, self._ready, self._ends = blocks, axis, ready, ends
        self._block = blocks.of[axis.rank]
        holding = blocks.holding
        self._users = holding[0], holding[-1]  # of the start and of the end
        self._sides: tuple[int, ...] = ()
        self._beside: tuple[int | None, int | None] = (None, None)
        if self._block.size:
            self._beside = blocks.beside(axis.rank)
            self.upwards = holding.index(axis.rank) % 2 == 0
            self._sides = (LEFT, RIGHT) if self.upwards else (RIGHT, LEFT)  # as they are met
        self._rows: dict[int, Tensor] = {}
        self._works: dict[int, list[dist.Work]] = {LEFT: [], RIGHT: []}
        self._sent: list[dist.Work] = []
        self._like: Tensor | None = None
        self._begun = False

    def evaluated(self, part: slice, logits: Tensor) -> None:
        """The logits [K, R, C] of these points of the block are known."""
        if self._like is None:
            self._like = logits[:1]
            self._begin()
        for side in self._sides:
            at = 0 if side == LEFT else self._block.size - 1
            if part.start <= at < part.stop:
                self._meet(side, logits[at - part.start : at - part.start + 1].contiguous())

    def left(self) -> Tensor:
        """[1, R, C] of the point before the block."""
        return self._known(LEFT)

    def right(self) -> Tensor:
        return self._known(RIGHT)

    def finish(self) -> None:
        """Wait until all is sent."""
        if not self._begun:
            self._begin()
        wait(self._sent)
        for works in self._works.values():
            wait(works)

    def give_up(self) -> None:
        """Let others have NaN, so that nobody waits for what this rank cannot give."""
        if self._like is None:
            return
        for side in self._sides:
            if side not in self._rows:
                self._meet(side, like(self._like, float("nan")))
        self.finish()

    def _begin(self) -> None:
        self._begun = True
        self._ready()
        for side, row in self._ends.items():
            if self._users[side] != self._axis.rank:
                self._sent += self._axis.exchange(Kind.ends, [(self._users[side], row)], [])
        for side in self._sides:
            if self._beside[side] is not None:
                continue
            if side in self._ends:
                self._rows[side] = self._ends[side]
            else:
                assert self._like is not None
                row = self._rows[side] = like(self._like, 0.0)
                self._works[side] = self._axis.exchange(
                    Kind.ends, [], [(self._blocks.ends[side], row)]
                )

    def _meet(self, side: int, own: Tensor) -> None:
        peer = self._beside[side]
        if peer is not None:
            other = self._rows[side] = like(own, 0.0)
            self._works[side] = self._axis.exchange(Kind.logits, [(peer, own)], [(peer, other)])

    def _known(self, side: int) -> Tensor:
        wait(self._works[side])
        self._works[side] = []
        return self._rows[side]

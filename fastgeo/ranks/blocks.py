"""How points are dealt to the ranks along a path: consecutive ones, and as many to each."""

from typing import NamedTuple

POINT, END = 3, 1  # what a point costs, whose gradient takes two passes more, and an end


class Block(NamedTuple):
    """The points first, ..., last - 1 of those between the ends; none if they are equal."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first


class Blocks(NamedTuple):
    """The points of all ranks along a path.

    Attributes:
        points: between the ends.
        of: the block of each rank.
        ends: the ranks that evaluate the start and the end.
    """

    points: int
    of: tuple[Block, ...]
    ends: tuple[int, int]

    @classmethod
    def deal(cls, points: int, ranks: int) -> "Blocks":
        """Where blocks differ, by one point, the larger ones are in the middle: those outside need
        an end, which the least loaded rank evaluates."""
        sizes = [points // ranks] * ranks
        from_outside = [min(rank, ranks - 1 - rank) for rank in range(ranks)]
        for rank in sorted(range(ranks), key=lambda rank: -from_outside[rank])[: points % ranks]:
            sizes[rank] += 1
        firsts = [sum(sizes[:rank]) for rank in range(ranks + 1)]
        of = tuple(Block(*both) for both in zip(firsts, firsts[1:], strict=False))
        load = [POINT * block.size for block in of]
        holding = [rank for rank, block in enumerate(of) if block.size]
        ends = []
        for user in (holding[0], holding[-1]):
            least = min(range(ranks), key=lambda rank: (load[rank], abs(rank - user)))  # noqa: B023
            load[least] += END
            ends.append(least)
        return cls(points, of, (ends[0], ends[1]))

    @property
    def holding(self) -> list[int]:
        """The ranks that hold points."""
        return [rank for rank, block in enumerate(self.of) if block.size]

    def beside(self, rank: int) -> tuple[int | None, int | None]:
        """The ranks that hold the points to the left and to the right of a rank's; None where an
        end is."""
        holding = self.holding
        at = holding.index(rank)
        left = holding[at - 1] if at else None
        return left, holding[at + 1] if at + 1 < len(holding) else None

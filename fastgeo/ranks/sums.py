"""The inverse path Laplacian on rows that many ranks hold: two sums that run along the path.

With M points, L = tridiag(-1, 2, -1) and rows g_1, ..., g_M,

    (inv(L) g)_i = ((M + 1 - i) sum_{j <= i} j g_j + i sum_{j > i} (M + 1 - j) g_j) / (M + 1)

The first sum goes from rank to rank to the right and the second to the left, in buckets of columns:
at tick t rank r adds its rows to bucket t - r of the first and to bucket t - (R - 1 - r) of the
second. All are done after R - 1 + buckets ticks, a rank sends as many numbers each way as a row
has, the least that is possible, and the order of additions is the same for any number of ranks.
"""

import torch
from torch import Tensor

from fastgeo.ranks.axis import Axis, Kind, wait
from fastgeo.ranks.blocks import Blocks

BUCKETS = 8


def inverse_laplacian(rows: Tensor, blocks: Blocks, axis: Axis) -> Tensor:
    """This rank's rows [K, S] of inv(L) g, of its rows [K, S] of g, K > 0, in fp32 or fp64."""
    holding, block, whole = blocks.holding, blocks.of[axis.rank], blocks.points + 1
    last = len(holding) - 1
    place = holding.index(axis.rank)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    i = torch.arange(block.first + 1, block.last + 1, dtype=rows.dtype, device=rows.device)[:, None]
    up_to, beyond = i * rows, (whole - i) * rows
    left, right = rows.new_zeros(2, rows.shape[1])  # the sums that come from there
    buckets = _buckets(rows.shape[1], BUCKETS if last else 1)

    def bucket(number: int) -> slice | None:
        return buckets[number] if 0 <= number < len(buckets) else None

    for tick in range(len(buckets) + last):
        sends, receives = [], []
        part = bucket(tick - place)
        if part is not None:
            total = left[part]
            for row in up_to[:, part]:  # becomes the sum up to its own row
                total = row.add_(total)
            if place < last:
                sends.append((holding[place + 1], total))
        part = bucket(tick - (last - place))
        if part is not None:
            total = right[part].clone()
            for row in reversed(beyond[:, part].unbind()):
                before = total
                total = total + row
                row.copy_(before)  # becomes the sum beyond its own row
            if place:
                sends.append((holding[place - 1], total))
        part = bucket(tick + 1 - place)
        if part is not None and place:
            receives.append((holding[place - 1], left[part]))
        part = bucket(tick + 1 - (last - place))
        if part is not None and place < last:
            receives.append((holding[place + 1], right[part]))
        wait(axis.exchange(Kind.sums, sends, receives))
    return up_to.mul_(whole - i).add_(beyond.mul_(i)).div_(whole)


def _buckets(columns: int, count: int) -> list[slice]:
    size = max(1, -(-columns // count))
    return [slice(low, min(low + size, columns)) for low in range(0, columns, size)]

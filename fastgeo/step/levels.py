"""From few points to many: nested iteration along the path.

The long waves of a path, which take the most steps, can be had on few points, where a step costs
little; the points in between then start near to where they end. Each level inserts midpoints.
"""

COARSEST = 5  # points


def levels(points: int, steps: int) -> dict[int, int]:
    """First step -> the number of points from it on, as in {0: 5, 40: 9, 70: 17, 90: 25}.

    The k levels have k, ..., 2, 1 parts of the steps; so, of 25 points, the whole is 0.37 times
    the work of that many steps on all points.

    Args:
        points: N at the end.
        steps: of all levels together; with fewer than levels, the coarsest ones are left out.
    """
    sizes = [COARSEST]
    while sizes[-1] < points:
        sizes.append(2 * sizes[-1] - 1)
    sizes = [*sizes[:-1], points][-steps:]
    parts = len(sizes) * (len(sizes) + 1) // 2
    found, first = {}, 0
    for i, size in enumerate(sizes):
        found[first] = size
        left = len(sizes) - 1 - i  # levels behind this one, which have a step each at least
        share = max(1, round(steps * (left + 1) / parts))
        first = min(first + share, steps - left)
    return found

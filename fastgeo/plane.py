"""The loss over the plane through three networks, and where a path runs above or below it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo import figures
from fastgeo.evaluate import Data, evaluate
from fastgeo.forward.options import Forward
from fastgeo.path import Path, StateDict, check_path_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ON_THE_LINE = 1e-4  # of the distance of the ends: a third network nearer to their line is on it
CHOSEN = ("engine", "channels_last", "chunk")  # of `Forward`, by a measurement


@dataclass(frozen=True)
class Plane:
    """What `plane` returns. Lengths are Euclidean, over all floating point entries.

    Attributes:
        x, y: [G] coordinates of the grid; x along the line from end a to end b, y across it.
        loss: [G][G] mean cross-entropy in nats, a row for each y.
        corners: (x, y) of a, b and c; a is at (0, 0) and b at (its distance from a, 0).
        path: (x, y) of the path's N points, projected on the plane.
        distance: [N] of those points from it.
        path_loss: [N] their own loss, nats, which is not that of the plane below them.
    """

    x: list[float]
    y: list[float]
    loss: list[list[float]]
    corners: list[tuple[float, float]]
    path: list[tuple[float, float]]
    distance: list[float]
    path_loss: list[float]

    def to_json(self) -> dict:
        """A plain dictionary."""
        return asdict(self)

    def plot(self, *, title: str = "") -> "Figure":
        """Contours of the loss with the path on them, and the loss along the path beneath."""
        return figures.plane(self.to_json(), title=title)

    def __repr__(self) -> str:
        values = [loss for row in self.loss for loss in row]
        return (
            f"Plane({len(self.y)} x {len(self.x)} networks: loss {min(values):.3g} to "
            f"{max(values):.3g} nats; the path's {len(self.path)} points are at most "
            f"{max(self.distance):.3g} off it, of {self.corners[1][0]:.3g} between the ends)"
        )


def plane(
    path: Path,
    module: nn.Module,
    data: Data,
    *,
    c: StateDict | nn.Module | None = None,
    size: int = 21,
    margin: float = 0.2,
    batch_size: int = 256,
    forward: Forward = Forward(),
    progress: bool = False,
) -> Plane:
    """The loss over the plane through the ends of a path and a third network.

    Equivalent to a loop over y and x, with across the part of c - a that is orthogonal to b - a::

        state = a + x * (b - a) / norm(b - a) + y * across / norm(across)
        loss[y][x] = F.cross_entropy(functional_call(module, state, inputs), labels)

    A row of the grid is evaluated at once, as a path is. A figure like it is Figure 1 of Garipov et
    al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018), whose quadratic
    Bezier curve lies in its plane; other paths leave theirs, and there the loss is another.

    Args:
        path: its ends are a and b.
        module: the network of all points, run in eval mode; its parameter values are not used.
        data: (inputs, labels) or an iterable of such batches, as a split of `fastgeo.evaluate`.
        c: the third network; by default the middle of the path, which must be off the line then.
        size: G; the grid has G x G networks, at least 3 x 3.
        margin: around what is to be seen, as a share of the distance of the ends.
        batch_size, forward: as in `fastgeo.evaluate`.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: as in `fastgeo.evaluate`; size < 3, a negative margin, or a third
            network on the line through the ends.

    Example:
        >>> path = fastgeo.optimize(fastgeo.Path.bezier(a, b, 25), module, batches)
        >>> fastgeo.plane(path, module, (images, labels)).plot()
    """
    check_path_of(path, module)
    if size < 3:
        raise ValueError(f"size must be at least 3, got {size}")
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    middle = path.at(0.5) if c is None else c
    third = Path.linear(path.start, middle, 3, batchnorm=forward.batchnorm).end
    between = {name: third[name][None] for name in path.interior}
    corners = Path(path.start, between, path.end, path.interpolated)  # a, c, b
    base, (x_c, y_c), places, distance = _projected(corners, path)
    around = margin * base
    x = _grid([0.0, base, x_c, *(x for x, _ in places)], around, size)
    y = _grid([0.0, y_c, *(y for _, y in places)], around, size)
    if isinstance(data, Iterator):
        data = list(data)

    def losses(networks: Path, how: Forward, found: dict) -> list[float]:
        given = networks, module, {"data": data}
        result = evaluate(*given, batch_size=batch_size, forward=how, on_choice=found.update)
        return result.splits["data"].loss

    choice: dict[str, Any] = {}
    path_loss, rows = losses(path, forward, {}), []
    for height in tqdm(y, desc="plane", unit="row", disable=not progress):
        of_c = height / y_c
        shares = [(place - of_c * x_c) / base for place in x]  # of b
        weights = torch.tensor(
            [[1 - of_b - of_c, of_c, of_b] for of_b in shares], dtype=torch.float64
        )
        rows.append(losses(_row(corners, weights), forward, choice))
        # The engine that the first row has found is that of the others.
        forward = replace(forward, memory_budget=None, **{k: choice[k] for k in CHOSEN})
    points = [(0.0, 0.0), (base, 0.0), (x_c, y_c)]
    return Plane(x, y, rows, points, places, distance, path_loss)


def _projected(
    corners: Path, path: Path
) -> tuple[float, tuple[float, float], list[tuple[float, float]], list[float]]:
    """‖b - a‖, (x, y) of c, (x, y) of each point of a path, and its distance from the plane.

    All follow from the products of b - a, c - a and the points less a, which float64 adds up.
    """
    count = 2 + len(path)
    products = torch.zeros(count, count, dtype=torch.float64, device=path.device)
    stacked = path.stacked()
    for name, c in corners.interior.items():
        networks = torch.cat([path.end[name][None], c, stacked[name]]) - path.start[name]
        flat = networks.reshape(count, -1).double()
        products += flat @ flat.T
    products = products.cpu()
    base = products[0, 0].sqrt().item()
    x = products[0] / (base or 1.0)
    height = (products[1, 1] - x[1] ** 2).clamp(min=0).sqrt().item()
    if not (base > 0 and height > ON_THE_LINE * base):
        raise ValueError(
            "the third network is on the line through the ends, so there is no plane through the "
            "three; give c, another one"
        )
    y = (products[1] - x[1] * x) / height
    distance = (products.diagonal() - x**2 - y**2).clamp(min=0).sqrt()
    places = list(zip(x[2:].tolist(), y[2:].tolist(), strict=True))
    return base, (x[1].item(), height), places, distance[2:].tolist()


def _grid(seen: list[float], margin: float, size: int) -> list[float]:
    low, high = min(seen) - margin, max(seen) + margin
    return torch.linspace(low, high, size, dtype=torch.float64).tolist()


def _row(corners: Path, weights: Tensor) -> Path:
    """Networks that are weights [G, 3] times the corners, in a row."""
    mixed = corners.mixed(weights)
    first, last = ({name: t[i] for name, t in mixed.items()} for i in (0, -1))
    between = {name: tensor[1:-1] for name, tensor in mixed.items()}
    own = corners.start | first, between, corners.end | last, corners.interpolated
    return Path(*own)

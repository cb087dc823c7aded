"""The plane through three networks: its loss by a loop, the path's place, and the figure."""

import pytest
import torch
import torch.nn.functional as F
from conftest import images, tiny_resnet
from torch import nn
from torch.func import functional_call

from fastgeo import Forward, Path, Plane, evaluate, plane, recalibrate

LABELS = torch.arange(12) % 5


def bent(kind: str, n: int = 5) -> Path:
    """A path between two small networks that is off their line."""
    path = getattr(Path, kind)(tiny_resnet(1), tiny_resnet(2), n)
    torch.manual_seed(4)
    return path.with_interior({k: t + torch.randn_like(t) / 9 for k, t in path.interior.items()})


def flat(state: dict) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def axes(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal, by Gram and Schmidt."""
    along = (b - a) / (b - a).norm()
    across = (c - a) - ((c - a) @ along) * along
    return along, across / across.norm()


def of(numbers: torch.Tensor, like: dict) -> dict:
    parts = numbers.split([tensor.numel() for tensor in like.values()])
    return {k: part.view_as(t) for (k, t), part in zip(like.items(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("own", [False, True], ids=["through the middle", "through another one"])
def test_the_plane_is_that_of_the_loop(own, dtype):
    path = bent("bezier")
    path = Path._of(
        {k: {n: _cast(t, dtype) for n, t in p.items()} for k, p in path._parts().items()}
    )
    module, x = tiny_resnet().to(dtype), images().to(dtype)
    c = tiny_resnet(3).to(dtype) if own else None
    found = plane(path, module, (x, LABELS), c=c, size=4, forward=Forward(engine="stacked"))
    third = flat((c or module).state_dict()) if own else flat(path.at(0.5))
    a, b, third = (t.double() for t in (flat(path.start), flat(path.end), third))
    along, across = axes(a, b, third)
    assert found.corners[1] == pytest.approx(((b - a).norm().item(), 0))
    corner = ((third - a) @ along).item(), ((third - a) @ across).item()
    assert found.corners[2] == pytest.approx(corner) and corner[1] > 0
    for height, row in zip(found.y, found.loss, strict=True):
        for place, loss in zip(found.x, row, strict=True):
            state = of(a + place * along + height * across, path.start)
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
            expected = F.cross_entropy(functional_call(module, state, (x,)), LABELS)
            assert loss == pytest.approx(expected.item(), abs=1e-6)
    for (x_i, y_i), off, point in zip(found.path, found.distance, path, strict=True):
        offset = flat(point).double() - a
        inside = (offset @ along) * along + (offset @ across) * across
        expected = (offset @ along).item(), (offset @ across).item()
        assert (x_i, y_i) == pytest.approx(expected, abs=1e-5)
        assert off == pytest.approx((offset - inside).norm().item(), abs=1e-4)
    losses = evaluate(path, module, {"": (x, LABELS)}).splits[""].loss
    assert found.path_loss == pytest.approx(losses)
    for seen, grid in ((found.path, found.x), ([p[::-1] for p in found.path], found.y)):
        assert grid[0] < min(p[0] for p in seen) and max(p[0] for p in seen) < grid[-1]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def test_a_quadratic_curve_lies_in_its_plane_and_other_paths_leave_theirs(module):
    data = images(), LABELS
    curve, free = (plane(bent(kind), module, data, size=3) for kind in ("bezier", "linear"))
    assert max(curve.distance) < 1e-6 < 0.1 < max(free.distance)
    assert free.distance[2] < 1e-6  # the middle, through which it goes


def test_any_engine_and_any_data_give_the_same(module):
    x, path = images(), bent("linear")
    expected = plane(path, module, (x, LABELS), size=3)
    parts = [(x[:5], LABELS[:5]), (x[5:], LABELS[5:])]
    ways = [Forward(engine="loop"), Forward(memory_budget="1GiB"), Forward(engine="vmap", chunk=2)]
    for data, forward in zip((parts, iter(parts), (x, LABELS)), ways, strict=True):
        got = plane(path, module, data, size=3, forward=forward, batch_size=7)
        assert torch.tensor(got.loss).allclose(torch.tensor(expected.loss))


def test_networks_with_batch_norm_are_recalibrated():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))

    path = Path.linear(network(1), network(2), 3, batchnorm="recalibrate")
    how, x = Forward(batchnorm="recalibrate"), images().float()
    found = plane(path, network(0), (x, LABELS), c=network(3), size=3, margin=0, forward=how)
    module = network(0).eval()
    state = recalibrate(path, module, [x])[1]
    expected = F.cross_entropy(functional_call(module, state, (x,)), LABELS).item()
    assert found.path_loss[1] == pytest.approx(expected)
    assert found.loss[0][0] == pytest.approx(found.path_loss[0])  # a is a corner of the grid


def test_the_figure_shows_the_plane_and_the_path(module):
    found = plane(bent("linear"), module, (images(), LABELS), size=5)
    figure = found.plot(title="a plane")
    over, beneath, *_ = figure.axes
    assert over.get_title() == "a plane" and {t.get_text() for t in over.texts} == set("abc")
    line, projected = over.get_lines()
    assert line.get_linestyle() == "--"
    assert list(line.get_xdata()) == [0, found.corners[1][0]]
    assert list(zip(*projected.get_data(), strict=True)) == found.path
    assert list(over.collections[-1].get_array()) == found.distance
    assert list(beneath.get_lines()[0].get_ydata()) == found.path_loss
    assert "log" in type(over.collections[0].norm).__name__.lower()
    assert repr(found).startswith("Plane(5 x 5 networks: loss ")
    assert Plane(**found.to_json()) == found


def test_what_makes_no_plane_is_named(module):
    line, data = Path.linear(tiny_resnet(1), tiny_resnet(2), 5), (images(), LABELS)
    with pytest.raises(ValueError, match="the third network is on the line through the ends"):
        plane(line, module, data)
    with pytest.raises(ValueError, match="the third network is on the line through the ends"):
        plane(Path.linear(tiny_resnet(1), tiny_resnet(1), 5), module, data, c=tiny_resnet(2))
    with pytest.raises(ValueError, match="the two ends differ: conv1.weight is in a"):
        plane(line, module, data, c=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="size must be at least 3, got 2"):
        plane(line, module, data, c=tiny_resnet(3), size=2)
    with pytest.raises(ValueError, match="margin must not be negative, got -1"):
        plane(line, module, data, c=tiny_resnet(3), margin=-1)
    with pytest.raises(TypeError, match="path must be a fastgeo.Path"):
        plane(line.start, module, data)

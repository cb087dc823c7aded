"""Curves of few control points: what they are, their files, their refinements, their lengths."""

import math

import pytest
import torch
from conftest import images, plain, tiny_resnet
from torch import nn

from fastgeo import Forward, Path, evaluate, optimize, plane, recalibrate
from fastgeo.basis import Basis

CURVES = [("bezier", 1), ("bezier", 3), ("polychain", 1), ("polychain", 4)]
T = torch.arange(13, dtype=torch.float64) / 12


def bent(kind: str, inner: int, n: int = 7) -> Path:
    """A curve between two small networks whose control points are anywhere."""
    name = {"bezier": "controls", "polychain": "bends"}[kind]
    line = getattr(Path, kind)(tiny_resnet(1), tiny_resnet(2), n, **{name: inner})
    torch.manual_seed(5)
    moved = {name: t + torch.randn_like(t) for name, t in line.interior.items()}
    return line.with_interior(moved)


def de_casteljau(controls: torch.Tensor, t: float) -> torch.Tensor:
    while len(controls) > 1:
        controls = (1 - t) * controls[:-1] + t * controls[1:]
    return controls[0]


def between_neighbours(controls: torch.Tensor, t: float) -> torch.Tensor:
    low = min(int(t * (len(controls) - 1)), len(controls) - 2)
    weight = t * (len(controls) - 1) - low
    return (1 - weight) * controls[low] + weight * controls[low + 1]


BY_DEFINITION = {"bezier": de_casteljau, "polychain": between_neighbours}


@pytest.mark.parametrize("kind, inner", CURVES)
def test_a_curve_is_what_its_control_points_say(kind, inner):
    path = bent(kind, inner)
    controls = path.controls
    assert {len(t) for t in controls.values()} == {inner + 2} and len(path) == 7
    for t in (0, 0.1, 1 / 3, 0.5, 0.77, 1):
        for name, tensor in path.at(t).items():
            torch.testing.assert_close(tensor, BY_DEFINITION[kind](controls[name], t))
    for i, point in enumerate(path.points()):
        torch.testing.assert_close(point, path.at(i / 6))
        for name, tensor in path.stacked().items():
            torch.testing.assert_close(tensor[i], point[name])
    assert torch.equal(path[0]["conv1.weight"], path.start["conv1.weight"])
    assert torch.equal(path[-1]["conv1.weight"], path.end["conv1.weight"])


@pytest.mark.parametrize("kind, inner", CURVES)
def test_a_curve_begins_as_the_line(kind, inner):
    name = {"bezier": "controls", "polychain": "bends"}[kind]
    ends = tiny_resnet(1), tiny_resnet(2)
    curve, line = getattr(Path, kind)(*ends, 9, **{name: inner}), Path.linear(*ends, 9)
    torch.testing.assert_close(curve.stacked(), line.stacked())
    torch.testing.assert_close(curve.euclidean(), line.euclidean())


@pytest.mark.parametrize("kind, inner", CURVES)
def test_another_number_of_points_is_the_same_curve(kind, inner):
    path = bent(kind, inner)
    finer = path.resample(13)
    assert len(finer) == 13 and finer.basis == path.basis
    for i, point in enumerate(finer):
        torch.testing.assert_close(point, path.at(i / 12))
    flat = [torch.cat([t.flatten() for t in point.values()]) for point in path]
    expected = [(q - p).norm().item() for p, q in zip(flat[:-1], flat[1:], strict=True)]
    assert path.euclidean().tolist() == pytest.approx(expected)
    freed = path.freed()
    assert freed.free and freed.basis.size == len(freed) == 7
    torch.testing.assert_close(freed.stacked(), path.stacked())


@pytest.mark.parametrize(
    "kind, inner, size", [("bezier", 1, 4), ("bezier", 3, 9), ("polychain", 3, 9)]
)
def test_a_refinement_is_the_same_curve(kind, inner, size):
    path = bent(kind, inner)
    finer = path.refined(size)
    assert finer.basis.size == size and len(finer) == len(path)
    for t in (0, 0.2, 0.5, 0.9, 1):
        torch.testing.assert_close(finer.at(t), path.at(t))
    back = finer.refined(inner + 2)
    torch.testing.assert_close(back.interior, path.interior, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind, inner", [*CURVES, (None, 5)])
def test_files_keep_the_curve_bit_for_bit(kind, inner, tmp_path):
    path = bent(kind, inner) if kind else bent("polychain", 3).freed()
    path.save(tmp_path / "path.safetensors")
    loaded = Path.load(tmp_path / "path.safetensors")
    assert (loaded.basis, loaded.free, len(loaded)) == (path.basis, path.free, 7)
    torch.testing.assert_close(loaded.interior, path.interior, rtol=0, atol=0)
    torch.testing.assert_close(loaded.stacked(), path.stacked(), rtol=0, atol=0)
    moved = path.to("cpu")
    assert (moved.basis, moved.free, len(moved)) == (path.basis, path.free, 7)


@pytest.mark.parametrize(
    "basis", [Basis(k, size) for k in ("bezier", "polychain") for size in (3, 6)]
)
def test_a_basis_sums_to_one_and_its_stiffness_is_the_integral(basis):
    """Derivatives by autograd, the integral by Gauss's rule on 30 pieces."""
    torch.testing.assert_close(basis.weights(T).sum(1), torch.ones(13).double())
    x = torch.tensor([-1, 0, 1]).double() * math.sqrt(0.6)
    pieces = 30  # a multiple of those of the hats
    places = ((torch.arange(pieces)[:, None] + (x + 1) / 2) / pieces).flatten().requires_grad_()
    rule = (torch.tensor([5, 8, 5]).double() / 18 / pieces).repeat(pieces)
    columns = basis.weights(places)[:, 1:-1].unbind(1)
    slopes = torch.stack(
        [torch.autograd.grad(c.sum(), places, retain_graph=True)[0] for c in columns]
    )
    torch.testing.assert_close(basis.stiffness(), (slopes * rule) @ slopes.T, rtol=1e-6, atol=1e-8)


def test_levels_refine_one_another():
    assert Basis("polychain", 25).levels() == [5, 9, 17, 25]
    assert Basis("polychain", 3).levels() == [3]
    assert Basis("bezier", 5).levels() == [3, 4, 5]


def test_entries_that_do_not_move_stay():
    def network(scale):
        module = nn.Linear(2, 2)
        module.register_buffer("index", torch.arange(3))
        module.register_buffer("table", torch.full((), scale))
        return module.state_dict()

    path = Path.bezier(network(0.0), network(1.0), 5)
    assert "index" not in path.controls
    assert torch.equal(path.at(0.25)["index"], torch.arange(3))
    assert path[1]["table"].item() == pytest.approx(0.25)
    assert path.stacked()["index"].shape == (5, 3)


def test_half_precision_curves_are_mixed_in_fp32():
    a, b = {"w": torch.full((9,), 1.0).bfloat16()}, {"w": torch.full((9,), 3.0).bfloat16()}
    path = Path.bezier(a, b, 11, controls=2)
    assert path.at(0.3)["w"].dtype == torch.bfloat16
    assert path.at(0.3)["w"][0].item() == pytest.approx(1.6, rel=2**-8)


def test_a_curve_says_what_it_is_and_what_it_cannot_be():
    ends = {"w": torch.zeros(2**20)}, {"w": torch.ones(2**20)}
    said = repr(Path.bezier(*ends, 25))
    assert said.startswith("Path(25 points of 1,048,576 numbers (float32) each on a bezier of 3")
    with pytest.raises(ValueError, match="controls must be at least 1, got 0"):
        Path.bezier(*ends, 25, controls=0)
    with pytest.raises(ValueError, match="bends must be at least 1, got 0"):
        Path.polychain(*ends, 25, bends=0)
    with pytest.raises(ValueError, match="points must be at least 3 .* got 2"):
        Path.bezier(*ends, 2)


def test_statistics_of_a_curve_are_those_of_its_points():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))

    how, x, y = Forward(batchnorm="recalibrate"), images().float(), torch.arange(12) % 5
    path = Path.bezier(network(1), network(2), 5, batchnorm="recalibrate")
    path = optimize(path, network(0), [x], steps=2, descent=plain(nodes=2), forward=how)
    assert path.basis == Basis("bezier", 3)
    got = recalibrate(path, network(0), [x])
    expected = recalibrate(path.freed(), network(0), [x])
    assert got.free and len(got) == 5
    torch.testing.assert_close(got.stacked(), expected.stacked(), rtol=0, atol=0)
    for i, point in enumerate(path):
        module = network(0)
        module.load_state_dict(point)
        module[2].reset_running_stats()
        module[2].momentum = None
        module.train()(x)
        torch.testing.assert_close(got[i]["2.running_mean"], module[2].running_mean)
    assert evaluate(path, network(0), (x, y), forward=how).energy > 0


def test_what_a_spectral_norm_computes_is_settled_at_the_control_points():
    def network(seed):
        torch.manual_seed(seed)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 5))
        return nn.Sequential(nn.Flatten(), layer)

    how, ends = Forward(batchnorm="recalibrate"), (network(1), network(2))
    path = Path.bezier(*ends, 6, controls=2, batchnorm="recalibrate")
    got = optimize(path, network(0), [images().float()], descent=plain(), forward=how)
    assert got.basis == Basis("bezier", 4) and len(got) == 6


def test_buffers_that_are_to_be_interpolated_are_so_on_curves_and_planes():
    def network(scale):
        torch.manual_seed(int(scale))
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        module.register_buffer("table", torch.full((2,), scale))
        return module

    a, b, data = network(2.0), network(4.0), (images().float(), torch.arange(12) % 5)
    with pytest.raises(ValueError, match="table is a buffer"):
        Path.bezier(a, b, 5)
    for make in (Path.bezier, Path.polychain):
        path = make(a, b, 5, interpolate_buffers=["table"])
        path = path.to("cpu").resample(7)
        assert path.interpolated == path.freed().interpolated == {"table"}
        assert path[3]["table"].tolist() == pytest.approx([3, 3])
        moved = optimize(path, a, [data], steps=2, descent=plain(nodes=2))
        assert moved.interpolated == {"table"}
        assert len(plane(path, a, data, c=network(5.0).state_dict(), size=3).loss) == 3

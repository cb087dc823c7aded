"""The layers' kernels on a device, at real sizes: `pytest -m gpu`."""

import layer_claims as claims
import pytest
import torch
from fastgeo_kernels import (
    path_update,
    stacked_channel_norm,
    stacked_conv,
    stacked_group_norm,
)
from fastgeo_kernels.stacked import conv_table
from fastgeo_kernels.stacked.conv_table import TABLE, Ways

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["group", "channel"]
# N, B, C, H, W: the paper's layers, odd sizes, groups that are read in tiles, many channels
NORM_SHAPES = [
    (25, 16, 64, 32, 32),
    (25, 16, 128, 16, 16),
    (25, 16, 256, 8, 8),
    (3, 7, 17, 5, 9),
    (2, 3, 1, 1, 1),
    (2, 2, 24, 61, 67),
    (2, 3, 2050, 3, 3),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("behind", claims.BEHIND, ids=str)
def test_norm_is_the_float64_definition(kind, shape, dtype, behind):
    claims.check_norm(kind, shape, *behind, dtype=dtype, device="cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_norm_has_its_digits_saves_little_and_keeps_a_nan(kind):
    claims.check_variance_is_no_difference_of_squares(kind, "cuda")
    claims.check_norm_saves_its_input_and_statistics(kind, "cuda")
    claims.check_norm_keeps_a_nan(kind, "cuda")


def test_norm_of_very_many_images():
    """More than the 65,535 programs that all axes of a grid but the first take."""
    claims.check_norm("group", (2, 70_000, 8, 2, 2), True, True, device="cuda")
    claims.check_norm("channel", (2, 2049, 64, 32, 32), True, True, torch.bfloat16, "cuda")


def test_norm_is_one_launch_without_a_copy(monkeypatch):
    monkeypatch.undo()  # poisoning is a launch, too
    x = claims.channels_last(torch.randn(25, 8, 64, 32, 32, device="cuda", dtype=torch.bfloat16))
    ones, zeros = x.new_ones(25, 64), x.new_zeros(25, 64)

    def both():
        stacked_group_norm(x, 1, ones, zeros, residual=x, relu=True)
        stacked_channel_norm(x, ones, zeros, residual=x, relu=True)

    both()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    launched = sorted(e.key for e in profile.key_averages() if e.device_type.name == "CUDA")
    assert len(launched) == 2 and all("forward_kernel" in name for name in launched), launched


# --- The update of a path -------------------------------------------------------------------------


@pytest.mark.parametrize("points, size", [(1, 3), (23, 1_000_003), (126, 50_000)])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_path_update_is_the_float64_definition(
    points, size, precondition, momentum, nesterov, dtype
):
    claims.check_update(
        *(points, size),
        precondition=precondition,
        momentum=momentum,
        nesterov=nesterov,
        dtype=dtype,
        copy=torch.bfloat16,
        device="cuda",
    )


def test_path_update_beyond_32_bits():
    """Weights of 2^31 numbers and more: the last rows begin beyond a 32-bit offset."""
    weight = torch.zeros(3, 3 << 28, device="cuda")
    grad = torch.ones_like(weight, dtype=torch.bfloat16)
    path_update(weight, grad, 2.0, impl="triton")
    expected = torch.tensor([-3.0, -4.0, -3.0], device="cuda")
    assert torch.equal(weight[:, -1], expected) and torch.equal(weight[:, 0], expected)


# --- Convolutions ---------------------------------------------------------------------------------

CONVOLUTIONS = [  # [N, B, C, H, W], O, size, stride; then odd ones
    *(((5, 8, s.channels, s.pixels, s.pixels), s.out, s.size, s.stride) for s in TABLE),
    ((3, 3, 17, 9, 9), 33, 3, 1),
    ((2, 5, 130, 7, 7), 65, 3, 2),
    ((25, 2, 3, 32, 32), 64, 3, 1),
]


@pytest.mark.parametrize("way", ["grouped", "dense", "triton"])
@pytest.mark.parametrize("shape, out, size, stride", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lay_out", [claims.channels_last, claims.networks_around])
def test_every_way_of_a_convolution_is_the_float64_definition(
    way, shape, out, size, stride, dtype, lay_out
):
    """fp32 without TF32; every block that `conv_kernels` chooses, since some have been miscompiled
    on one chip and not on another."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        options = dict(dtype=dtype, device="cuda", lay_out=lay_out)
        claims.check_conv(Ways(way, way, way), shape, out, size, stride, **options)


def test_convolutions_spread_over_streams_are_the_same_in_a_graph_too(monkeypatch):
    x = torch.randn(7, 8, 64, 16, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(7, 64, 64, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def products():
        y = stacked_conv(x, weight, padding=1)
        return y, *torch.autograd.grad(y, (x, weight), y.detach())

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    expected = products()
    monkeypatch.setattr(conv_table, "STREAMS", 3)
    apart = products()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        products()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = products()
    graph.replay()
    torch.cuda.synchronize()
    for one, two, three in zip(expected, apart, captured, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("way", ["grouped", "dense", "triton"])
def test_tf32_is_tf32(way):
    options = dict(device="cuda", tolerance=2e-3)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        claims.check_conv(Ways(way, way, way), (5, 8, 64, 16, 16), 64, 3, 1, **options)

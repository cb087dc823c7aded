"""The layers' kernels without a GPU: interpreted, and what they say where they cannot run."""

import doctest
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import layer_claims as claims
import pytest
import torch
from fastgeo_kernels import (
    launching,
    path_update,
    stacked_channel_norm,
    stacked_conv,
    stacked_group_norm,
)
from fastgeo_kernels.stacked import channel_norm, conv, conv_kernels, group_norm, plain
from fastgeo_kernels.stacked.conv import conv_by
from fastgeo_kernels.stacked.conv_table import DENSE, TABLE, Shape, Ways
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[2]
X = torch.zeros(2, 3, 4, 5, 5)


def test_layer_kernels_under_the_interpreter():
    """The variable must be set before triton is imported, for a whole process."""
    file = ROOT / "tests" / "kernels" / "layers_interpreted.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


NORMS = [lambda *a, **k: stacked_group_norm(a[0], 1, *a[1:], **k), stacked_channel_norm]


@pytest.mark.parametrize("norm", NORMS)
def test_norms_name_what_does_not_fit(norm):
    with pytest.raises(ValueError, match=r"weight must be \[2, 4\] for x .* got \[4\]"):
        norm(X, torch.ones(4))
    with pytest.raises(ValueError, match=r"residual must be \[2, 3, 4, 5, 5\] .* got \[1, 3, 4"):
        norm(X, residual=X[:1])
    with pytest.raises(ValueError, match=r"x must be \[N, B, C, ...\], got \[2, 3\]"):
        norm(X[..., 0, 0, 0])
    with pytest.raises(ValueError, match="'auto', 'triton' or 'torch', got 'cuda'"):
        norm(X, impl="cuda")


@pytest.mark.parametrize("norm", NORMS)
def test_norms_say_why_they_cannot_run_in_triton(norm, monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    words = "cannot run: (the input is on cpu|the package triton is not installed)"
    with pytest.raises(RuntimeError, match=words):
        norm(X, impl="triton")
    if launching.triton is not None:
        monkeypatch.setattr(launching, "INTERPRETED", True)
        with pytest.raises(RuntimeError, match="float32, bfloat16, float16, got float64"):
            norm(X.double(), impl="triton")
        with pytest.raises(RuntimeError, match="the residual is bfloat16, the input float32"):
            norm(X, residual=X.bfloat16(), impl="triton")
        with pytest.raises(RuntimeError, match="up to 4096 channels, got 5000"):
            norm(torch.zeros(2, 1, 5000), impl="triton")


class Launches:
    """In place of a kernel: the grids that it is launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("batch, channels, size", [(70_000, 8, 4), (2049, 64, 32), (256, 512, 32)])
def test_norms_launch_no_more_than_a_gpu_takes(batch, channels, size, monkeypatch):
    """65,535 programs at most on all axes of a grid but the first."""
    launches = Launches()
    x = torch.empty(batch, size**2, 2, channels, dtype=torch.bfloat16, device="meta")
    ones = x.new_ones(2, channels)
    for module, kernels in ((group_norm, "group"), (channel_norm, "channel")):
        for direction in ("forward", "backward"):
            monkeypatch.setattr(module, f"{kernels}_{direction}_kernel", launches)
    _, mean, rstd = group_norm.group_forward(x, None, ones, ones, 1e-5, True)
    group_norm.group_backward(x, None, x, None, ones, ones, mean, rstd, True)
    channel_norm.channel_forward(x, None, ones, ones, 1e-5, True)
    channel_norm.channel_backward(x, None, x, None, ones, ones, 1e-5, True)
    assert len(launches.grids) == 4 and launches.grids[0][0] == 2
    for grid, blocks in zip(launches.grids, (batch, batch, 0, 0), strict=True):
        assert all(n <= 65_535 for n in grid[1:]) and math.prod(grid[1:]) >= blocks


def test_convolutions_beyond_32_bits_are_refused(monkeypatch):
    monkeypatch.setattr(conv_kernels, "conv_kernel", launches := Launches())

    def conv(batch, pixels, points=25, channels=64):
        x = torch.empty(batch, pixels, pixels, points, channels, dtype=torch.int8, device="meta")
        weight = torch.empty(points, channels, 3, 3, channels, dtype=torch.int8, device="meta")
        conv_kernels.conv(x, weight, torch.empty_like(x), 1, 1, False, False)

    conv(256, 32), conv(1, 1100), conv(512, 1, 1024, 4096)
    assert len(launches.grids) == 3
    for shape in ((1, 1160), (2, 825)):
        with pytest.raises(ValueError, match="offsets of 32 bits: .* impl='torch' takes them"):
            conv(*shape)


@pytest.mark.parametrize("points, size", [(1, 3), (23, 300), (126, 9)])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_path_update_in_pytorch_is_the_float64_definition(points, size, momentum, nesterov):
    claims.check_update(points, size, impl="torch", momentum=momentum, nesterov=nesterov)
    claims.check_update(points, size, impl="torch", precondition=False, copy=torch.bfloat16)


@pytest.mark.parametrize("nesterov", [False, True])
def test_path_update_is_sgd(nesterov):
    """Without the Laplacian: torch.optim.SGD, over several steps."""
    weight, velocity = claims.random(3, 7), torch.zeros(3, 7)
    leaf = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], 0.1, momentum=0.9, nesterov=nesterov)
    for seed in range(3):
        leaf.grad = claims.random(3, 7, seed=seed)
        optimizer.step()
        options = dict(momentum=0.9, nesterov=nesterov, velocity=velocity, impl="torch")
        path_update(weight, leaf.grad, 0.1, precondition=False, **options)
    torch.testing.assert_close(weight, leaf.detach())


def test_path_update_names_what_does_not_fit():
    weight = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"grad must be \[3, 4\] and contiguous.* got \[4, 3\]"):
        path_update(weight, torch.zeros(4, 3), 0.1)
    with pytest.raises(ValueError, match=r"got \[3, 4\], not contiguous"):
        path_update(weight, torch.zeros(4, 3).T, 0.1)
    with pytest.raises(ValueError, match="momentum 0.9 needs a velocity"):
        path_update(weight, weight, 0.1, momentum=0.9)
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        path_update(weight, weight, 0.1, nesterov=True)
    with pytest.raises(ValueError, match="momentum 0.0 needs no velocity"):
        path_update(weight, weight, 0.1, velocity=weight)
    for ends in (weight, weight[:2].double(), torch.zeros(4, 2).T):
        with pytest.raises(ValueError, match=r"ends must be \[2, 4\] and contiguous, float32 as"):
            path_update(weight, weight, 0.1, ends=ends)
    with pytest.raises(ValueError, match=r"weight must be \[M, P\] and contiguous, got \[3\]"):
        path_update(weight[:, 0], weight, 0.1)


@pytest.mark.parametrize("way", ["grouped", "dense"])
@pytest.mark.parametrize("lay_out", [claims.channels_last, claims.networks_around, torch.clone])
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 2)])
def test_every_way_of_pytorch_is_the_float64_definition(way, lay_out, size, stride):
    # With fewer channels a strided 1x1 convolution in channels-last corrupts the memory of a CPU
    # (uxlfoundation/oneDNN#6035), which `stacked_conv` avoids and `conv_by` does not.
    ways, shape = Ways(way, way, way), (3, 2, 16 if size == 1 else 4, 6, 6)
    claims.check_conv(ways, shape, 5, size, stride, lay_out=lay_out)
    claims.check_conv(ways, shape, 5, size, stride, shared=True)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_convolution_a_network_writes_into_one_tensor(padding):
    """(N, B, H, W, O) and (N, O, KH, KW, C) in memory, of inputs that lie in any way."""
    x = claims.random(3, 2, 4, 6, 6).requires_grad_()
    weight = claims.random(3, 5, 4, 3, 3).requires_grad_()
    y = conv_by(DENSE, x, weight, 1, padding)
    for tensor in (y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))):
        assert tensor.movedim(2, -1).is_contiguous()


def test_networks_that_lie_apart_are_not_copied(monkeypatch):
    """As weights do, which are columns of rows with all parameters; and what is computed of shared
    images on a GPU lies as what follows reads it, unless a measured way wants something else."""
    rows = claims.random(3, 200)
    weight = rows[:, 5:185].view(3, 5, 3, 3, 4).movedim(-1, 2)
    assert conv._each(weight) is weight
    x = claims.random(3, 2, 4, 6, 6)
    got, expected = (conv_by(DENSE, x, w, 1, 1) for w in (weight, weight.clone()))
    assert torch.equal(got, expected)

    def lies_around():
        with FakeTensorMode():
            x = torch.empty((2, 3, 8, 8), device="cuda")
            y = stacked_conv(x, torch.empty((5, 6, 3, 3, 3), device="cuda"))
        return y.movedim(2, -1).is_contiguous()

    assert lies_around()
    monkeypatch.setitem(TABLE, next(iter(TABLE)), Ways("grouped", "dense", "dense"))
    assert not lies_around()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_has_second_derivatives(stride):
    x, weight = claims.random(2, 2, 3, 5, 5), claims.random(2, 2, 3, 3, 3)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    assert torch.autograd.gradgradcheck(lambda x, w: conv_by(DENSE, x, w, stride, 1), leaves)
    (only,) = torch.autograd.grad(conv_by(DENSE, x, leaves[1].float(), stride, 1).sum(), leaves[1:])
    assert only.shape == weight.shape


def test_what_runs_on_a_gpu_until_it_is_measured():
    """Tensors without data stand in for a device's. No way of the table makes a tensor of all
    networks with more elements than 32 bits count."""

    def ways(batch, channels=64, points=25, dtype=torch.bfloat16, shared=False, square=(1, 1)):
        options = dict(device="cuda", dtype=dtype)
        x = torch.empty((batch, channels, 32, 32), **options).expand(points, -1, -1, -1, -1)
        weight = torch.empty((points, 64, channels, 3, 3), **options)
        return conv._measured(x if shared else x.clone(), weight, square)

    grouped = Ways("grouped", "dense", "grouped")
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setitem(TABLE, Shape(3, 1, 64, 64, 32), grouped)
        assert ways(256) == grouped
        assert ways(2000) == ways(256, 63) == ways(256, square=(1, 0)) == DENSE
        assert ways(256, shared=True) is ways(256, square=None) is None
        assert ways(256, dtype=torch.float64) is None
        large = torch.empty((25, 1400, 64, 32, 32), device="cuda", dtype=torch.bfloat16)
        weight = torch.empty((25, 64, 64, 3, 3), device="cuda", dtype=torch.bfloat16)
        assert plain._alone(large, weight) and not plain._alone(large[:, :1000], weight)


def test_conv_says_why_it_cannot_run_in_triton(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", True)
    weight = torch.zeros(2, 5, 4, 3, 1)
    with pytest.raises(RuntimeError, match="square kernels, one stride and padding, no dilation"):
        stacked_conv(X, weight, impl="triton")
    with pytest.raises(ValueError, match="'auto', 'triton' or 'torch', got 'cudnn'"):
        stacked_conv(X, weight, impl="cudnn")


def test_every_line_of_the_table_names_ways_that_exist():
    for shape, ways in TABLE.items():
        assert set(ways) <= {"grouped", "dense", "triton"}, shape


def test_doc_examples_run():
    for name in ("path_update", "stacked.norm", "stacked.conv"):
        module = importlib.import_module(f"fastgeo_kernels.{name}")
        results = doctest.testmod(module)
        assert results.failed == 0 and results.attempted >= 1, name

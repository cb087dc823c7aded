"""Every kernel of the paper's step by itself, against what memory and matrix units allow.

`python -m benchmarks.step` prints it where there is a GPU. A kernel has to move its bytes and do
its products; the larger of the two times, at the copy bandwidth and the bf16 matrix rate that are
measured beside it, is its floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from fastgeo_kernels import (
    path_js_div_value_and_grad,
    path_update,
    stacked_conv,
    stacked_group_norm,
)

from benchmarks.step_gpu import Setting
from fastgeo import models
from fastgeo.profiling.measure import copy_bandwidth, quantiles, time_alternating


class Kernel(NamedTuple):
    """One kernel of a step: what it moves, in bytes, and multiplies, in FLOP, and how often."""

    name: str
    count: int
    bytes: float
    flop: float
    make: Callable[[], Callable[[], object]]


def kernels(setting: Setting, device: str) -> Iterator[Kernel]:
    """Of a step in bf16: three products of every convolution, the norms behind them both ways, the
    divergence and the update. The two ends, what reads the shared images, and the shortcuts' norms
    are left out."""
    points, batch = setting.points - 2, setting.batch
    base = [round(setting.width * c) for c in (16, 32, 64)]
    blocks = (setting.depth - 2) // 6
    for i, channels in enumerate(base):
        pixels = setting.pixels >> i
        layers = [(3, 1, channels, pixels, 2 * blocks - (i > 0))]
        if i:
            layers += [(3, 2, base[i - 1], 2 * pixels, 1), (1, 2, base[i - 1], 2 * pixels, 1)]
        for size, stride, into, source, count in layers:
            yield from convolution(
                points, batch, size, stride, into, channels, source, pixels, count, device
            )
        numbers = points * batch * pixels**2 * channels
        for behind, count, forward, backward in (
            ("ReLU", blocks + (i == 0), 2, 3),
            ("sum, ReLU", blocks, 3, 5),
        ):
            shape = (batch, pixels, pixels, points, channels)
            words = f"GroupNorm, {behind}, C = {channels}, {pixels}x{pixels}"
            residual = behind != "ReLU"
            yield Kernel(
                f"{words}, forward", count, 2 * numbers * forward, 0, norm(shape, residual, device)
            )
            yield Kernel(
                f"{words}, backward",
                count,
                2 * numbers * backward,
                0,
                norm(shape, residual, device, backward=True),
            )
    size = sum(p.numel() for p in models.resnet(setting.depth, setting.width).parameters())
    yield Kernel("path update", 1, points * size * (4 + 4 + 4 + 2), 0, update(points, size, device))
    logits = setting.points * batch * 10
    yield Kernel("path divergence", 1, 8 * logits, 0, divergence(setting, device))


def convolution(
    points, batch, size, stride, into, out, source, target, count, device
) -> Iterator[Kernel]:
    def tensors():
        x = half(device, batch, source, source, points, into).permute(3, 0, 4, 1, 2)
        weight = half(device, points, out, size, size, into).movedim(-1, 2)
        return x, weight

    def forward():
        x, weight = tensors()
        return lambda: stacked_conv(x, weight, None, stride, size // 2)

    def backward(which):
        def make():
            leaves = [t.requires_grad_(i == which) for i, t in enumerate(tensors())]
            y = stacked_conv(*leaves, None, stride, size // 2)
            dy = torch.empty_like(y).normal_()
            return lambda: torch.autograd.grad(y, leaves[which], dy, retain_graph=True)

        return make

    seen = target if size == 1 else source  # a 1x1 convolution reads what its strides hit
    read = 2 * points * batch * (seen**2 * into + target**2 * out)
    written = 2 * points * batch * (source**2 * into + target**2 * out)
    flop = 2 * points * batch * target**2 * into * out * size**2
    words = f"conv {size}x{size}, stride {stride}, {into} to {out}, {source}x{source}"
    weights = 2 * points * out * into * size**2
    yield Kernel(f"{words}, output", count, read + weights, flop, forward)
    yield Kernel(f"{words}, input gradient", count, written + weights, flop, backward(0))
    yield Kernel(f"{words}, weight gradient", count, read + weights, flop, backward(1))


def norm(shape, residual: bool, device: str, backward: bool = False):
    def make():
        x, r = (half(device, *shape).permute(3, 0, 4, 1, 2) for _ in range(2))
        points, _, channels, *_ = x.shape
        weight, bias = half(device, points, channels), half(device, points, channels)
        leaves = [t.requires_grad_(backward) for t in ((x, r) if residual else (x,))]

        def forward():
            return stacked_group_norm(
                x, 1, weight, bias, residual=r if residual else None, relu=True
            )

        if not backward:
            return forward
        y = forward()
        dy = torch.empty_like(y).normal_()
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return make


def update(points: int, size: int, device: str):
    def make():
        aligned = size + -size % 16  # as a step has its parameters on a GPU
        weight, grad = (torch.randn(points, aligned, device=device) for _ in range(2))
        copy, rate = weight.bfloat16(), torch.full((), 1e-3, device=device)
        return lambda: path_update(weight, grad, rate, copy=copy)

    return make


def divergence(setting: Setting, device: str):
    def make():
        logits = torch.randn(setting.points, setting.batch, 10, device=device)
        return lambda: path_js_div_value_and_grad(logits)

    return make


def half(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def measure(setting: Setting, device: str, rate: float, repeats: int) -> list[dict]:
    """A row for each kernel, and one for all of them as often as a step runs them.

    Args:
        rate: of bf16 products, FLOP/s.
    """
    clock = "device" if device == "cuda" else "wall"
    bandwidth = copy_bandwidth(2**28 if device == "cuda" else 2**20, device)
    rows, floors, times = [], 0.0, 0.0
    for kernel in kernels(setting, device):
        seconds = time_alternating({"": kernel.make()}, repeats, clock)[""]
        took = quantiles(seconds)["p50"]
        floor = max(kernel.bytes / bandwidth, kernel.flop / rate)
        floors, times = floors + kernel.count * floor, times + kernel.count * took
        rows.append(row(kernel.name, kernel.count, kernel.bytes, kernel.flop, floor, took))
    rows.append(row("all, as often as in a step", "", 0, 0, floors, times))
    rate_words = f"{bandwidth / 1e9:.0f} GB/s copied, {rate / 1e12:.3g} TFLOP/s in bf16"
    rows[-1]["MB"], rows[-1]["GFLOP"] = rate_words, ""
    return rows


def row(name: str, count, moved: float, flop: float, floor: float, took: float) -> dict:
    return {
        "kernel": name,
        "a step": count,
        "MB": f"{moved / 1e6:.4g}",
        "GFLOP": f"{flop / 1e9:.4g}",
        "floor, ms": f"{1e3 * floor:.3g}",
        "measured, ms": f"{1e3 * took:.3g}",
        "times the floor": f"{took / floor:.2f}",
    }

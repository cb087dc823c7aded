"""Kernels by themselves: are they right, and how fast are divergence and convolutions?"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastgeo_kernels import path_js_div_value_and_grad, stacked_group_norm
from fastgeo_kernels.stacked.conv import forward, input_gradient, weight_gradient
from fastgeo_kernels.stacked.conv_table import TABLE, Shape, Ways
from torch import Tensor

from benchmarks.conv import CLEARLY, LAYOUTS, WAYS
from benchmarks.device_parts.given import Given, in_ms, relative
from benchmarks.path_jsd import loop, with_autograd

CLAIMS = Path(__file__).parents[2] / "tests" / "kernels"  # what tests hold kernels to
Row = dict[str, Any]


def random(device: str, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size, device=device, dtype=dtype)


# --- Are they right? ------------------------------------------------------------------------------


def right(given: Given) -> Iterator[Row]:
    """Every case against float64, with outputs full of NaN before the launch."""
    for name, case in cases(given).items():
        row: Row = {"case": name}
        try:
            with poisoned():
                case()
        except Exception as error:  # noqa: BLE001 - one that does not run is a row, too
            row["failed"] = failure(error)
        yield row
        if given.gpu:
            torch.cuda.empty_cache()


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def cases(given: Given) -> dict[str, Callable[[], None]]:
    """The paper's layers on a small batch, the divergence, the update; then layers at full size."""
    sys.path.insert(0, str(CLAIMS))
    import layer_claims as layers
    import path_js_div_claims as paths

    sizes, device = given.sizes, given.device
    points, batch = sizes.short
    found: dict[str, Callable[[], None]] = {}
    runs = [(sizes.dtype, list(sizes.convolutions), sizes.norms, WAYS)]
    if sizes.dtype != torch.float32:
        runs.append((torch.float32, list(sizes.convolutions)[:1], sizes.norms[:1], ("triton",)))
    for dtype, shapes, norms, ways in runs:
        rest, word = dict(dtype=dtype, device=device), str(dtype)[6:]
        for shape, way in itertools.product(shapes, ways):
            size, stride, channels, out, pixels = shape
            images = (points, batch, channels, pixels, pixels)
            layer = (Ways(way, way, way), images, out, size, stride)
            check = partial(layers.check_conv, *layer, **rest)
            found[f"conv {', '.join(map(str, shape))}, {way}, {word}"] = partial(in_fp32, check)
        for (channels, pixels), kind in itertools.product(norms, ("group", "channel")):
            images = (points, batch, channels, pixels, pixels)
            check = partial(layers.check_norm, kind, images, True, True, **rest)
            found[f"{kind} norm, C = {channels}, {pixels}x{pixels}, {word}"] = check
    for shape in sizes.divergences:
        name = f"divergence, {', '.join(map(str, shape))}"
        found[name] = partial(check_divergence, paths, shape, device)
    found["update"] = partial(
        *(layers.check_update, sizes.inner, 1003), copy=torch.bfloat16, device=device
    )
    for way in WAYS:
        found[f"conv at full size, {way}"] = partial(check_whole_conv, layers, way, given)
    found["group norm at full size"] = partial(check_whole_norm, layers, given)
    return found


def in_fp32(check: Callable[[], None]) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check()


def check_divergence(paths, shape: tuple[int, int, int], device: str) -> None:
    """On the first rows of a shape whose float64 would take gigabytes."""
    points, batch, classes = shape
    batch = min(batch, max(1, (1 << 24) // (points * classes)))
    paths.check_against_the_definition(paths.path(points, batch, classes, 1.0).to(device), "triton")


def check_whole_conv(layers, way: str, given: Given) -> None:
    """Outputs and gradients of the largest convolution, network by network."""
    shape, dtype = next(iter(given.sizes.convolutions)), given.sizes.dtype
    x, dy, weight = images_of(shape, way, given)
    options = (shape.stride, shape.size // 2)
    got = (
        forward(way, x, weight, *options),
        input_gradient(way, dy, x, weight, *options),
        weight_gradient(way, dy, x, weight, *options),
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for i in range(len(weight)):
        leaves = [t[i].double().requires_grad_() for t in (x, weight)]
        y = torch.nn.functional.conv2d(*leaves, None, *options)
        expected = (y, *torch.autograd.grad(y, leaves, dy[i].double()))
        for name, one, definition in zip(("y", "dx", "dweight"), got, expected, strict=True):
            layers.assert_close(one[i], definition, tolerance, f"network {i}, {name}")


def check_whole_norm(layers, given: Given) -> None:
    """The largest norm with a residual sum and a ReLU, both ways, network by network."""
    dtype, device = given.sizes.dtype, given.device
    channels, pixels = given.sizes.norms[0]
    points, batch = given.sizes.inner, given.sizes.setting.batch
    shape = (batch, pixels, pixels, points, channels)
    x, residual, dy = (random(device, dtype, *shape).permute(3, 0, 4, 1, 2) for _ in range(3))
    weight, bias = (random(device, dtype, points, channels) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = stacked_group_norm(
        *(x, 1, weight, bias, layers.EPS), residual=residual, relu=True, impl="triton"
    )
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for i in range(points):
        own = [t[i : i + 1].detach().double().requires_grad_() for t in leaves]
        plain = layers.norm_by_definition("group", *own, False)
        passed = (y[i] > 0).double()  # ReLU's gradient jumps at 0: the sign that rounding gave
        expected = [plain.clamp(min=0), *torch.autograd.grad(plain, own, (dy[i] * passed)[None])]
        for name, one, definition in zip(
            ("y", "dx", "dweight", "dbias", "dresidual"), got, expected, strict=True
        ):
            layers.assert_close(one[i], definition[0], tolerance, f"network {i}, {name}")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Outputs hold NaN before the launch that is to write them."""
    new_empty = Tensor.new_empty

    def full_of_nan(self, *args, **kwargs):
        result = new_empty(self, *args, **kwargs)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    with mock.patch.object(Tensor, "new_empty", full_of_nan):
        yield


# --- The divergence -------------------------------------------------------------------------------


def divergence(given: Given) -> Iterator[Row]:
    """Value and gradient beside a copy of as many bytes, with logits in the caches and not."""
    for shape in given.sizes.divergences:
        start, steps = (torch.randn(shape, device=given.device) for _ in range(2))
        logits = 3 * start[:1] + steps.cumsum(0)
        del start, steps
        target = torch.empty_like(logits)
        ways = {
            "Triton": lambda logits=logits: path_js_div_value_and_grad(logits, impl="triton"),
            "copy": lambda logits=logits, target=target: target.copy_(logits),
            "paper's loop": with_autograd(loop, logits),
        }
        expected = path_js_div_value_and_grad(logits.double(), impl="torch")
        for way, function in ways.items():
            row: Row = {"N, B, C": shape, "way": way, "bytes": 2 * logits.nbytes}
            if way != "copy":
                row["error"] = max(map(relative, function(), expected))
                if not row["error"] < 1e-3:
                    yield row | {"failed": "wrong"}
                    continue
            for cold in (False, True):
                share = given.seconds / len(given.sizes.divergences) / 12
                yield row | {"cold": cold, "ms": in_ms(given.times(function, share, cold=cold))}
        del ways, expected


# --- Convolutions ---------------------------------------------------------------------------------


def images_of(shape: Shape, way: str, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Images, gradients of the outputs and weights of all networks between the ends, the same in
    every way, lying as the way likes them."""
    size, stride, channels, out, pixels = shape
    points, batch = given.sizes.inner, given.sizes.setting.batch
    after = (pixels + 2 * (size // 2) - size) // stride + 1
    like = (given.device, given.sizes.dtype)
    torch.manual_seed(0)

    def images(pixels: int, channels: int) -> Tensor:
        within = random(*like, batch, pixels, pixels, points, channels)
        around = within.movedim(-2, 0)  # [N, B, H, W, C]
        return (around.contiguous() if way == "dense" else around).movedim(-1, 2)

    weight = random(*like, points, out, size, size, channels).movedim(-1, 2)
    return images(pixels, channels), images(after, out), weight / (size * channels**0.5)


def convolutions(given: Given) -> Iterator[Row]:
    """Every product of every shape in every way, first as cuDNN chooses its plans by itself and
    then with a search for the fastest.

    A way is compared with the dense one, cuDNN's most common path.
    """
    sizes = given.sizes
    share = given.seconds / (4 * len(sizes.convolutions) * len(WAYS) * len(Ways._fields))
    for search, (shape, count) in itertools.product((False, True), sizes.convolutions.items()):
        expected: dict[str, Tensor] = {}
        for way in sorted(WAYS, key="dense".__ne__):
            x, dy, weight = images_of(shape, way, given)
            rest = (shape.stride, shape.size // 2)
            functions = {
                "forward": partial(forward, way, x, weight, *rest),
                "input": partial(input_gradient, way, dy, x, weight, *rest),
                "weight": partial(weight_gradient, way, dy, x, weight, *rest),
            }
            for product, function in functions.items():
                row: Row = {"shape": shape, "product": product, "way": way, "search": search}
                row |= {"count": count, "flop": flop(shape, given)}
                try:
                    with torch.backends.cudnn.flags(enabled=True, benchmark=search):
                        got = function()
                        row["error"] = relative(got, expected.setdefault(product, got))
                        del got
                        if not row["error"] < 3e-2:
                            raise ArithmeticError("wrong")
                        row["ms"] = in_ms(given.times(function, share))
                except Exception as error:  # noqa: BLE001 - what does not run is a row
                    row["failed"] = failure(error)
                yield row


def flop(shape: Shape, given: Given) -> float:
    """Of one product."""
    pixels = (shape.pixels + shape.stride - 1) // shape.stride
    each = 2 * shape.channels * shape.out * shape.size**2 * pixels**2
    return each * given.sizes.inner * given.sizes.setting.batch


def best_table(rows: Iterable[Row]) -> Row | None:
    """What the table of ways should hold, of the rows of `convolutions`.

    Images lie as one of the two usual ways likes them, in all layers, or they would be copied. So
    for each layout, with a search for plans and without one, a product runs in the faster of the
    layout's two ways, in the own kernel only where it is clearly so; of these four tables the
    fastest step's is given. A shape for which both ways of a product failed is left out.
    """
    rows = [row | {"shape": tuple(row["shape"])} for row in rows if "ms" in row]
    medians = {(r["search"], r["shape"], r["product"], r["way"]): r["ms"]["p50"] for r in rows}
    counts = {row["shape"]: row["count"] for row in rows}
    tables = []
    for search, (layout, (usual, own)) in itertools.product((False, True), LAYOUTS.items()):
        table, total = [], 0.0
        for shape, count in counts.items():
            times = [
                [medians.get((search, shape, product, way), math.inf) for way in (usual, own)]
                for product in Ways._fields
            ]
            took = sum(map(min, times))
            if took < math.inf:
                total += count * took
                ways = [own if mine < CLEARLY * theirs else usual for theirs, mine in times]
                table.append([shape, ways])
        tables.append({"layout": layout, "search": search, "ms a step": total, "table": table})
    most = max(len(table["table"]) for table in tables)
    whole = [table for table in tables if len(table["table"]) == most]
    return min(whole, key=lambda table: table["ms a step"]) if most else None


@contextlib.contextmanager
def applied(table: Row | None) -> Iterator[None]:
    """With what `best_table` gave as the table of ways, for a while; None changes nothing."""
    if table is None:
        yield
        return
    lines = {Shape(*shape): Ways(*ways) for shape, ways in table["table"]}
    search = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = table["search"]
    try:
        with mock.patch.dict(TABLE, lines):
            yield
    finally:
        torch.backends.cudnn.benchmark = search

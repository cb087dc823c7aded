"""What is timed: each operation of fastgeo beside what it stands in for, with the same result.

A `Case` is one implementation in one setting. Cases of one group and setting compute the same
thing, and the first of them is what the others are compared with.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    path_js_div_value_and_grad,
    stacked_conv,
    stacked_group_norm,
    stacked_linear,
)
from torch import Tensor, nn

from benchmarks import path_jsd
from fastgeo import Descent, Forward, Path, evaluate, match, models, optimize
from fastgeo.data.images import load
from fastgeo.profiling import baselines

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An implementation in a setting.

    Attributes:
        group: divergence, layers, step, evaluation or matching.
        setting: sizes, in words.
        implementation: what computes it.
        run: does it; returns tensors in which all implementations agree.
        work: how much of `unit` one call does.
        unit: of the rate, a second.
        count: how often one call does what the setting names.
        tolerance: on the difference from the first implementation, over the largest entry.
    """

    group: str
    setting: str
    implementation: str
    run: Callable[[], Tensors]
    work: float
    unit: str
    count: int = 1
    tolerance: float = 1e-3

    def __str__(self) -> str:
        return f"{self.group}: {self.setting}: {self.implementation}"


def cases(device: torch.device, *, full: bool = False) -> Iterator[Case]:
    """All of them; in minutes on a CPU unless full."""
    yield from divergence(device, [(25, 256, 10), (25, 64, 1000)])
    yield from layers(device, 25, 128, 16, 8)
    yield from steps(device, 8, 0.5, pixels=8, points=25, batch=128)
    yield from evaluation(device, 8, 0.5, points=25)
    yield from matching(device, [(8, 0.5), (20, 1)])
    if full:
        yield from divergence(device, [(100, 256, 10), (2, 64, 32768), (25, 16384, 10)])
        yield from layers(device, 9, 64, 64, 16)
        yield from steps(device, 20, 1, pixels=32, points=9, batch=32)
        yield from evaluation(device, 20, 1, points=25)
        yield from matching(device, [(20, 4)])


def divergence(device: torch.device, shapes: list[tuple[int, int, int]]) -> Iterator[Case]:
    """Value and gradient of the path divergence."""
    for shape in shapes:
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(shape, device=device, generator=generator)
        logits = 3 * noise[:1] + noise.cumsum(0)
        implementations = {
            "softmax, log, kl_div a pair": path_jsd.with_autograd(path_jsd.loop, logits),
            "the same, stacked": path_jsd.with_autograd(path_jsd.stacked, logits),
            "path_js_div, torch": functools.partial(
                path_js_div_value_and_grad, logits, impl="torch"
            ),
        }
        if logits.is_cuda:
            implementations["path_js_div, Triton"] = functools.partial(
                path_js_div_value_and_grad, logits, impl="triton"
            )
        setting = "N, B, C = {}, {}, {}".format(*shape)
        gigabytes = 2 * logits.nbytes / 1e9
        for name, run in implementations.items():
            yield Case("divergence", setting, name, run, gigabytes, "GB")


def layers(
    device: torch.device, points: int, batch: int, channels: int, pixels: int
) -> Iterator[Case]:
    """Forward and backward of stacked layers."""
    torch.manual_seed(0)
    image = torch.randn(batch, points, channels, pixels, pixels, device=device).transpose(0, 1)
    rows = torch.randn(points, batch, channels, device=device)
    kernel = torch.randn(points, channels, channels, 3, 3, device=device) / (3 * channels**0.5)
    matrix = torch.randn(points, channels, channels, device=device) / channels**0.5
    factor, shift = torch.rand(points, channels, device=device), torch.rand(points, channels)
    norm = functools.partial(F.group_norm, num_groups=1)
    stacked_norm = functools.partial(stacked_group_norm, num_groups=1)
    of_each = {
        "3x3 convolution": (F.conv2d, stacked_conv, (image, kernel), dict(padding=1)),
        "linear": (F.linear, stacked_linear, (rows, matrix), {}),
        "GroupNorm(1, C)": (
            lambda x, w, b: norm(x, weight=w, bias=b),
            lambda x, w, b: stacked_norm(x, weight=w, bias=b),
            (image, factor, shift.to(device)),
            {},
        ),
    }
    size = f"N, B, C = {points}, {batch}, {channels}, {pixels}x{pixels}"
    for layer, (one, stacked, tensors, options) in of_each.items():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        looped = functools.partial(_looped, one)
        for name, forward in (("loop", looped), ("stacked", stacked)):
            forward = functools.partial(forward, **options)
            run = functools.partial(_forward_and_backward, forward, leaves)
            yield Case("layers", f"{layer}, {size}", name, run, points * batch, "images·points")


def _looped(one: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> Tensor:
    each = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
    return torch.stack([one(*own, **options) for own in each])


def _forward_and_backward(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Tensors:
    out = forward(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def steps(
    device: torch.device, depth: int, width: float, *, pixels: int, points: int, batch: int
) -> Iterator[Case]:
    """A step of plain SGD, in the mean of five with what is set up for them: how far they move the
    interior of a path (`benchmarks.step` has more)."""
    count = 5
    module, path = _path(device, depth, width, points)
    x = torch.randn(batch, 3, pixels, pixels, device=device)

    def moved(points: list[dict[str, Tensor]]) -> Tensors:
        pairs = list(zip(path.points(), points, strict=True))[1:-1]
        return tuple(
            torch.cat([(state[name] - start[name]).flatten() for name in start])
            for start, state in pairs
        )

    def by_loop() -> Tensors:
        baseline = baselines.loop(module, path)
        for _ in range(count):
            baseline.step(x)
        return moved(baseline.points())

    def by_fastgeo() -> Tensors:
        after = optimize(
            *(path, module, repeat(x)),
            steps=count,
            descent=Descent(
                momentum=0.0, lr_schedule="constant", precondition=False, coarse_to_fine=False
            ),
            forward=Forward(engine="stacked"),
        )
        return moved(list(after.points()))

    size = f"ResNet{depth} width {width:g}, {pixels}x{pixels}, N = {points}, B = {batch}"
    setting = f"one step (mean of {count}, with their set-up), {size}"
    for name, run in (("loop over modules", by_loop), ("fastgeo, stacked", by_fastgeo)):
        yield Case(
            *("step", setting, name, run, count * points * batch, "images·points"),
            count=count,
            tolerance=1e-2,  # the movement has few of the weights' digits
        )


def evaluation(device: torch.device, depth: int, width: float, *, points: int) -> Iterator[Case]:
    """Loss and accuracy of every point on the digits' test images, and the lengths of the path."""
    digits = load("digits").to(device)
    module, path = _path(device, depth, width, points, channels=1)

    @torch.no_grad()
    def by_loop() -> Tensors:
        logits = []
        for state in path.points():
            module.load_state_dict(state)
            logits.append(torch.cat([module(x) for x, _ in digits.in_order("test", 256)]))
        labels = digits.test.labels
        losses = torch.stack([F.cross_entropy(own, labels) for own in logits])
        accuracies = torch.stack([(own.argmax(-1) == labels).float().mean() for own in logits])
        js_div = torch.stack([path_jsd.pair(p, q) for p, q in pairwise(logits)]).clamp(min=0)
        fisher_rao = sum(fisher_rao_distance(p, q) for p, q in pairwise(logits))
        chord = fisher_rao_distance(logits[0], logits[-1])
        lengths = (js_div.sum(), js_div.sqrt().sum(), fisher_rao, chord, euclidean_length(path))
        return losses, accuracies, *lengths

    def by_fastgeo() -> Tensors:
        found = evaluate(path, module, {"test": digits.in_order("test", 256)})
        split = found.splits["test"]
        lengths = (found.energy, found.sqrt_jsd, found.fisher_rao, found.fisher_rao_lower_bound)
        values = (split.loss, split.accuracy, *lengths, found.euclidean)
        return tuple(torch.tensor(value) for value in values)

    images = len(digits.test.labels)
    setting = f"losses and lengths, ResNet{depth} width {width:g}, N = {points}, {images} digits"
    for name, run in (("loop over modules", by_loop), ("fastgeo", by_fastgeo)):
        yield Case("evaluation", setting, name, run, points * images, "images·points")


def fisher_rao_distance(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Of two networks on the rows of a data set, radians, as it is written down."""
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    return (2 * (p * q).sqrt().sum(-1).clamp(max=1).arccos()).square().mean().sqrt()


def euclidean_length(path: Path) -> Tensor:
    """Sum of the distances of neighbouring states."""
    points = [torch.cat([t.flatten() for t in state.values()]) for state in path.points()]
    return torch.stack([(b - a).norm() for a, b in pairwise(points)]).sum()


def matching(device: torch.device, networks: list[tuple[int, float]]) -> Iterator[Case]:
    """Weight matching of two networks as they are initialised."""
    for depth, width in networks:
        torch.manual_seed(0)
        a, b = (models.resnet(depth, width).to(device) for _ in range(2))

        def run(a: nn.Module = a, b: nn.Module = b) -> Tensors:
            return tuple(match(a, b, restarts=1).state_dict.values())

        yield Case("matching", f"ResNet{depth} width {width:g}", "fastgeo", run, 1, "matchings")


def _path(
    device: torch.device, depth: int, width: float, points: int, channels: int = 3
) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module, a, b = (models.resnet(depth, width, in_channels=channels).to(device) for _ in range(3))
    return module.eval(), Path.linear(a, b, points)


def error(got: Tensors, expected: Tensors) -> float:
    """The largest difference, over the largest entry of each tensor."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(got, expected, strict=True)
    )

"""Kernels compiled for a GPU on a machine without one: `python -m benchmarks.precompile`.

    python -m benchmarks.precompile --target cuda:90 --out CACHE    # here
    python -m benchmarks.device --cache CACHE --out FOLDER          # on the GPU

What `benchmarks.device` launches is launched on tensors without memory that say they are on a GPU,
and each launch ends where the kernel is compiled. Triton looks a kernel up by its source, its
arguments, the chip and a hash of its own files. The hash would differ between the builds of one
version for two Pythons, so here and there the version stands in its place: both sides need the same
version of Triton. The cache may lie in another folder there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = "TRITON_CACHE_DIR"
_OWN: list[Callable[[], str]] = []  # how Triton hashes its files, while the version stands for it


# --- On both sides --------------------------------------------------------------------------------


def take(cache: Path) -> None:
    """From now on this process, and what it forks, finds its kernels there and leaves new ones."""
    import triton
    from triton.runtime import cache as keys

    os.environ[FOLDER] = str(cache.absolute())
    for group in cache.glob("*/__grp__*"):  # which names files with their folders
        files = json.loads(group.read_text())["child_paths"]
        moved = {
            name: str(group.absolute().parent / Path(path).name) for name, path in files.items()
        }
        if moved != files:
            group.write_text(json.dumps({"child_paths": moved}))
    _OWN.append(keys.triton_key)
    keys.triton_key = lambda: triton.__version__


def leave() -> None:
    """Undoes `take`, for who starts processes that are not forked and have their own cache."""
    from triton.runtime import cache as keys

    if _OWN:
        keys.triton_key = _OWN.pop()
        del os.environ[FOLDER]


class Compilations:
    """Counts of kernels that were compiled, and that were found in the cache, from now on."""

    def __init__(self) -> None:
        from triton import knobs

        self.compiled, self.found = 0, 0
        knobs.compilation.listener = self

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        self.found += cache_hit
        self.compiled += not cache_hit


# --- On the side without a GPU --------------------------------------------------------------------


@contextlib.contextmanager
def without(target: Any, processors: int) -> Iterator[None]:
    """Tensors on "meta" say that they are on a GPU, of that target and so many multiprocessors; a
    launch compiles its kernel and runs nothing."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = importlib.import_module("fastgeo_kernels.path_js_div.launch")
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    class Driver:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(Driver())
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta)),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (launch, "_processors", lambda device: processors),
            (JITFunction, "run", compile_only),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def launches(sizes: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the parts of `benchmarks.device` launch, by name."""
    from benchmarks.device_parts import given, kernels

    on_meta = given.Given("meta", sizes, Path(), 0, 0)
    yield from kernels.cases(on_meta).items()
    yield from convolutions(on_meta)
    yield from norms(on_meta)
    yield from divergences(on_meta)
    yield from updates(on_meta)


def convolutions(given: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """The own kernel at full size, for images in either layout."""
    from fastgeo_kernels.stacked import conv

    from benchmarks.device_parts.kernels import images_of

    for shape, layout in itertools.product(given.sizes.convolutions, ("grouped", "dense")):
        x, dy, weight = images_of(shape, layout, given)
        rest = (weight, shape.stride, shape.size // 2)
        name = f"conv {', '.join(map(str, shape))}"
        yield name, partial(conv.forward, "triton", x, *rest)
        yield name, partial(conv.input_gradient, "triton", dy, x, *rest)
        yield name, partial(conv.weight_gradient, "triton", dy, x, *rest)


def norms(given: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Those of the step in bf16, of the fp32 networks one by one that it is checked against, and of
    either precision on the digits."""
    import torch

    from benchmarks.device_parts.kernels import random

    setting, half, whole = given.sizes.setting, given.sizes.dtype, torch.float32
    runs = [(1, half, given.sizes.inner), (1, whole, 1)]
    runs += [(4, half, given.sizes.inner), (4, whole, given.sizes.inner)]  # digits have 8x8 pixels
    for (channels, pixels), (part, dtype, points) in itertools.product(given.sizes.norms, runs):
        side = max(pixels // part, 1)
        name = f"norm, C = {channels}, {side}x{side}"
        for around, residual, relu in itertools.product((False, True), repeat=3):
            if around:
                x = random("meta", dtype, points, setting.batch, side, side, channels)
                x = x.movedim(-1, 2)
            else:
                x = random("meta", dtype, setting.batch, side, side, points, channels)
                x = x.permute(3, 0, 4, 1, 2)
            yield name, partial(norm, x, residual, relu)


def norm(x: Any, residual: bool, relu: bool) -> None:
    """Both ways, for one use and for two."""
    import torch
    from fastgeo_kernels.stacked.norm import group_norm_twice

    x = x.clone().requires_grad_()
    weight, bias = (x.new_empty(len(x), x.shape[2]) for _ in range(2))
    rest = dict(residual=x if residual else None, relu=relu, impl="triton")
    both = group_norm_twice(x, 1, weight, bias, **rest)
    for used in (both[:1], both):
        torch.autograd.grad(used, x, list(map(torch.empty_like, used)), retain_graph=True)


def divergences(given: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Rows, and value with gradient; the operators around the launches do nothing on "meta"."""
    import torch
    from fastgeo_kernels.path_js_div.launch import launch
    from fastgeo_kernels.path_js_div.options import How

    step = (given.sizes.setting.points, given.sizes.setting.batch, 10)
    for shape in dict.fromkeys((*given.sizes.divergences, step)):
        logits = torch.empty(shape, device="meta")
        name = f"divergence, {', '.join(map(str, shape))}"
        yield name, partial(launch, logits, None, How(1.0, 0.5), "rows")
        yield name, partial(launch, logits, None, How(1.0, 0.5), "mean", grad=True)


def updates(given: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of the networks for three channels and for one, whose sizes other numbers divide."""
    import torch
    from fastgeo_kernels import path_update

    from fastgeo import models
    from fastgeo.step.step import ALIGNED

    setting, points = given.sizes.setting, given.sizes.inner
    rate = torch.empty((), device="meta")
    for channels, half in itertools.product((3, 1), (True, False)):
        module = models.resnet(setting.depth, setting.width, in_channels=channels)
        size = sum(p.numel() + -p.numel() % ALIGNED for p in module.parameters())
        weight, ends = (torch.empty(rows, size, device="meta") for rows in (points, 2))
        for grad, conditioned, apart in itertools.product(
            (weight, weight.bfloat16()), (False, True), (False, True)
        ):
            yield (
                f"update, {size} parameters",
                partial(
                    *(path_update, weight, grad, rate),
                    precondition=conditioned,
                    copy=weight.bfloat16() if half else None,
                    ends=ends if apart else None,
                ),
            )


def compile_all(launched: Iterator[tuple[str, Callable[[], object]]]) -> Counter[str]:
    """Runs them as far as they come without numbers; name -> how many kernels it compiled anew."""
    found: Counter[str] = Counter()
    seen = Compilations()
    for name, function in launched:
        before = seen.compiled
        try:
            function()
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():  # a check looks at numbers that there are not
                raise
        found[name] += seen.compiled - before
    found["found"] = seen.found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precompile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90 or cuda:100")
    parser.add_argument("--out", type=Path, required=True, help="the cache, which may exist")
    arguments = parser.parse_args()
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # or what lies between source and binary is kept
    arguments.out.mkdir(parents=True, exist_ok=True)
    take(arguments.out)
    from benchmarks.device_parts.given import Sizes
    from benchmarks.resources import CHIPS

    chips = {f"cuda:{c.target.arch}": c for c in CHIPS.values() if c.target.backend == "cuda"}
    if arguments.target not in chips:
        parser.error(f"--target must be one of {', '.join(chips)}, got {arguments.target}")
    chip, started = chips[arguments.target], time.perf_counter()
    with without(chip.target, chip.processors):
        found = compile_all(launches(Sizes()))
    again = found.pop("found")
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(
        f"{found.total()} kernels compiled, {again} found, {time.perf_counter() - started:.0f} s, "
        f"{size / 2**20:.1f} MiB in {arguments.out}"
    )


if __name__ == "__main__":
    main()

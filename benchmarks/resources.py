"""Registers, spills, shared memory and occupancy of every kernel, compiled for GPUs without one.

Of paths on an H100 also instructions a class and edge: those of an edge between near rows, and
after a + what others take besides (`benchmarks.instructions` counts them).

python -m benchmarks.resources            # the table, and benchmarks/results/resources.json
python -m benchmarks.resources --check    # exit status 1 where one spills or does not fit; of the
                                          # layers those of the paper in bf16
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from fastgeo_kernels.path_js_div import launch
from fastgeo_kernels.path_js_div.options import FORWARD, HALF, REVERSE, SKEW
from fastgeo_kernels.stacked import channel_norm, conv_kernels, group_norm
from fastgeo_kernels.stacked.conv_table import TABLE
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import environment, write_result
from benchmarks.instructions import Count, count, dump
from fastgeo.profiling.measure import headline, table

path_update = importlib.import_module("fastgeo_kernels.path_update")


class Chip(NamedTuple):
    target: GPUTarget
    shared: int  # bytes a program may use
    threads: int  # resident on a multiprocessor, at most
    registers: int  # of a multiprocessor (AMD: of a lane of a SIMD), 32 bits each
    processors: int
    example: str


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10, 2048, 65536, 108, "A100"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10, 2048, 65536, 132, "H100"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10, 2048, 65536, 148, "B200"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10, 2048, 512, 304, "MI300X"),
}


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Variant(NamedTuple):
    """A kernel as a launcher would compile it.

    Attributes:
        kernel, shape, tile: for the table.
        function: the Triton kernel.
        pointers: name -> dtype, those that differ from the first argument's.
        constants: its constexpr arguments, and integers known to be 1.
        options: num_warps and the like.
        long: integer arguments of 64 bits; the others have 32.
        divided: integer arguments that 16 divides.
        may_spill: what has to run, but need not be fast.
        extra: left out of a check.
    """

    kernel: str
    shape: str
    tile: str
    function: Any
    dtype: str
    pointers: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]
    long: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()
    may_spill: bool = False
    extra: bool = False


# --- The path divergence --------------------------------------------------------------------------

# N, B, C: the paper's batch, a large one, ImageNet's classes, the longest whole rows, pairs and a
# path over a vocabulary
SHAPES = [
    *((25, 256, 10), (25, 65536, 10), (25, 1024, 1000), (25, 1024, 2000), (25, 1024, 4000)),
    *((2, 4096, 32768), (25, 64, 32768)),
]
MODES = {
    "value and gradient": dict(value="mean", grad=True),
    "value": dict(value="rows"),
    "gradient": dict(value="none", grad=True, upstream=True),
    "Fisher-Rao": dict(value="fisher"),
}


# What else a caller can bring, for one chip of each maker and every tiling.
BROUGHT = [
    dict(dtype="bf16", kept=True),
    dict(dtype="fp16"),
    dict(kind=SKEW),
    dict(kind=REVERSE),
    dict(class_stride=25),
    dict(class_stride=25, wide=True),
    dict(wide=True),
]


PATH_POINTERS = {
    "value_ptr": "fp32",
    "upstream_ptr": "fp32",
    "carry_ptr": "fp32",
    "kept_ptr": "i1",
}


def path_variants(chip: Chip) -> Iterator[Variant]:
    """What the launcher would compile for these shapes on this chip."""
    for shape, (mode, options) in itertools.product(SHAPES, MODES.items()):
        yield path_variant(chip, shape, mode, options)
    if chip.example in ("H100", "MI300X"):
        mode, options = next(iter(MODES.items()))
        for shape, brought in itertools.product(SHAPES[1:-1], BROUGHT):
            words = ", ".join([mode, *(f"{key}={value}" for key, value in brought.items())])
            yield path_variant(chip, shape, words, options, **brought)


def path_variant(
    chip: Chip,
    shape: tuple[int, int, int],
    name: str,
    mode: dict,
    dtype: str = "fp32",
    kind: int = HALF,
    kept: bool = False,
    class_stride: int = 1,
    wide: bool = False,
) -> Variant:
    points, batch, classes = shape
    blocks = launch.choose_blocks(points, batch, classes, chip.processors, kind)
    constants = launch.constants(
        points,
        classes,
        blocks,
        aligned=math.gcd(4 if dtype == "fp32" else 8, classes) if class_stride == 1 else 1,
        wide=wide,
        kind=kind,
        kept=kept,
        mean=mode["value"] == "mean",
        **{"grad": False, "upstream": False, **mode},
    )
    return Variant(
        kernel=name,
        shape="{}, {}, {}".format(*shape),
        tile=f"{blocks.rows} x {blocks.block}, {blocks.segment} points",
        function=launch.kernel_for(blocks),
        dtype=dtype,
        pointers=PATH_POINTERS,
        constants={**constants, "stride_c": 1} if class_stride == 1 else constants,
        options=launch.options(blocks, kind, chip.target.backend == "cuda", class_stride == 1),
        long=("stride_n", "stride_b") if wide else (),
        # Offsets of 64 bits, for classes gigabytes apart, have to run; they may spill.
        may_spill=wide,
    )


# B, C: ImageNet's classes, and the tokens of a distillation over vocabularies
PAIRS = [(4096, 10), (4096, 1000), (4096, 32768), (4096, 151_936)]


def pair_variants(chip: Chip) -> Iterator[Variant]:
    """Values, and the gradients to one argument and to both, of every formula."""
    kinds = {"JSD": HALF, "JSD, beta": SKEW, "KL": FORWARD}
    for (batch, classes), (words, kind), grads in itertools.product(PAIRS, kinds.items(), range(3)):
        blocks = launch.choose_blocks(2, batch, classes, 1, kind)
        yield Variant(
            kernel=f"pair, {words}, {('value', 'gradient', 'gradients')[grads]}",
            shape=f"{batch}, {classes}",
            tile=f"{blocks.rows} x {blocks.block}",
            function=launch.kernel_for(blocks, pair=True),
            dtype="bf16",
            pointers=PATH_POINTERS,
            constants=launch.pair_constants(
                classes,
                blocks,
                aligned=[math.gcd(8, classes)] * 2,
                kind=kind,
                kept=True,
                value=grads == 0,
                p_grad=grads == 2,
                q_grad=grads > 0,
            ),
            options=launch.options(blocks, kind, nvidia=chip.target.backend == "cuda"),
            extra=chip.example == "A100",
        )


# --- Layers ---------------------------------------------------------------------------------------

# C, pixels: the paper's ResNet20 of width 4; of other networks
LAYERS = [(64, 32 * 32), (128, 16 * 16), (256, 8 * 8)]
OTHERS = [(16, 4 * 4), (24, 7 * 7), (640, 8 * 8)]
BEHIND = {"norm": (False, False), "norm, ReLU": (False, True), "norm, sum, ReLU": (True, True)}


def norm_variants(chip: Chip) -> Iterator[Variant]:
    """GroupNorm with one group and LayerNorm over channels, both ways."""
    cases = itertools.product(("bf16", "fp32"), [*LAYERS, *OTHERS], BEHIND, (False, True))
    for dtype, (channels, pixels), behind, backward in cases:
        residual, relu = BEHIND[behind]
        residual = residual and (relu or not backward)
        layer = (channels, pixels)
        label = f"{behind}, {'backward' if backward else 'forward'}, {dtype}"
        common = dict(
            shape=f"C = {channels}, {pixels} pixels",
            dtype=dtype,
            pointers={name: "fp32" for name in ("mean_ptr", "rstd_ptr", "dparams_ptr")},
            extra=dtype == "fp32" or layer in OTHERS or behind != "norm, sum, ReLU",
        )
        tile = group_norm.group_tile(pixels, channels, backward, BYTES[dtype])
        functions = group_norm.group_forward_kernel, group_norm.group_backward_kernel
        eps = None if backward else 1e-5
        yield Variant(
            kernel=f"group {label}",
            tile=f"{tile.pixels} x {tile.channels}{'' if tile.whole else ', in tiles'}",
            function=functions[backward],
            constants=group_norm.group_constants(pixels, channels, tile, residual, relu, eps),
            options={"num_warps": tile.warps},
            **common,
        )
        tile = channel_norm.channel_tile(channels)
        functions = channel_norm.channel_forward_kernel, channel_norm.channel_backward_kernel
        constants = channel_norm.channel_constants(channels, tile, residual, relu, 1e-5)
        yield Variant(
            kernel=f"channel {label}",
            tile=f"{tile.pixels} x {tile.channels}",
            function=functions[backward],
            constants=constants,
            options={"num_warps": tile.warps},
            **common,
        )


def conv_variants(chip: Chip) -> Iterator[Variant]:
    """Every convolution of the table, its output and both gradients."""
    ways = ("bf16", False), ("fp32", False), ("fp32", True)
    functions = {"weight": conv_kernels.conv_weight_kernel}
    cases = itertools.product(ways, TABLE, ("forward", "input", "weight"))
    for (dtype, precise), shape, product in cases:
        size, stride, channels, out, pixels = shape
        if dtype == "fp32" and (channels, stride) != (64, 1):
            continue
        sides = (pixels, pixels), (pixels // stride,) * 2
        options = (size, stride, size // 2)
        if product == "weight":
            blocks = conv_kernels.weight_blocks(out, size**2 * channels, BYTES[dtype], precise)
            constants = conv_kernels.constants(*sides, channels, out, *options)
        else:
            ends = (channels, out) if product == "forward" else (out, channels)
            blocks = conv_kernels.conv_blocks(*ends[::-1], BYTES[dtype], precise)
            sides = sides if product == "forward" else sides[::-1]
            constants = conv_kernels.constants(*sides, *ends, *options)
            constants["MIRRORED"] = product == "input"
        constants["PRECISION"] = "ieee" if precise else "tf32"
        name = f"conv {product}, {dtype}{' exact' if precise else ''}"
        yield Variant(
            kernel=name,
            shape=f"{size} x {size}, stride {stride}, {channels} to {out}, {pixels} pixels",
            tile=f"{blocks.rows} x {blocks.columns} x {blocks.inner}",
            function=functions.get(product, conv_kernels.conv_kernel),
            dtype=dtype,
            pointers={"dweight_ptr": "fp32"},
            constants={**constants, **conv_kernels.tile(blocks)},
            options=conv_kernels.options(blocks, nvidia=chip.target.backend == "cuda"),
            extra=dtype == "fp32" or channels != 64 or (stride == 2 and size == 3),
        )


def update_variants(chip: Chip) -> Iterator[Variant]:
    """The update of a path of 25 and of 128 points."""
    for points, dtype, momentum in itertools.product((23, 126), ("bf16", "fp32"), (0.0, 0.9)):
        flags = dict(nesterov=momentum > 0, velocity=momentum > 0, copy=dtype == "bf16")
        yield Variant(
            kernel=f"path update{', momentum' if momentum else ''}, {dtype} gradient",
            shape=f"N = {points + 2}",
            tile=f"{path_update.BLOCK} columns",
            function=path_update.path_update_kernel,
            dtype="fp32",
            pointers={"grad_ptr": dtype, "copy_ptr": "bf16"},
            constants=path_update.constants(points, True, momentum, **flags, apart=True),
            options=path_update.OPTIONS,
            extra=points == 126,
            divided=("P",),
        )


# --- Compilation ----------------------------------------------------------------------------------


def compile_variant(variant: Variant, chip: Chip):
    """What Triton makes of it, with arguments that 16 divides where it would see so."""
    names = variant.function.arg_names
    signature = {
        name: "constexpr"
        if name in variant.constants
        else f"*{variant.pointers.get(name, variant.dtype)}"
        if name.endswith("_ptr")
        else "fp32"
        if name in ("inv_t", "a", "b", "p_limit", "q_limit")
        else "i64"
        if name in variant.long
        else "i32"
        for name in names
    }
    divided = [name for name in names if signature[name].startswith("*")] + list(variant.divided)
    source = ASTSource(
        fn=variant.function,
        signature=signature,
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divided},
    )
    return triton.compile(source, target=chip.target, options=variant.options)


def resources(compiled, chip: Chip, warps: int) -> dict[str, int | float]:
    """Registers a thread, bytes spilled, shared bytes, and the share of threads resident."""
    shared = compiled.metadata.shared
    if chip.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
        waves = 4 * min(8, chip.registers // (-(-registers // 8) * 8))  # of 4 SIMDs
        threads = waves // warps * warps * 64
    else:
        usage = dump(compiled.asm["cubin"], "--dump-resource-usage")
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        a_warp = -(-registers * 32 // 256) * 256
        programs = min(chip.registers // (a_warp * warps), chip.threads // (32 * warps), 32)
        threads = programs * warps * 32
    if shared:
        threads = min(threads, chip.shared // shared * warps * chip.target.warp_size)
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "occupancy": round(threads / chip.threads, 2),
    }


def path_instructions(compiled, variant: Variant) -> Count:
    """What the walk along a path takes, compiled for a GPU of NVIDIA."""
    constants = variant.constants
    return count(
        compiled.asm["cubin"],
        threads=32 * variant.options["num_warps"],
        rows=constants.get("ROWS", 1),
        classes=constants["C"],
        at_once=constants.get("AT_ONCE", 1),
    )


FAMILIES = (path_variants, pair_variants, norm_variants, conv_variants, update_variants)


def words(taken: Count) -> str:
    return f"{taken.always:.1f}" + (f" + {taken.again:.1f}" if taken.again else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a spill")
    parser.add_argument("--only", default="", help="kernels whose name holds this; writes nothing")
    arguments = parser.parse_args()
    rows, bad = [], []
    for target, chip in CHIPS.items():
        for variant in itertools.chain.from_iterable(family(chip) for family in FAMILIES):
            if arguments.only not in variant.kernel or (arguments.check and variant.extra):
                continue
            warps = variant.options["num_warps"]
            compiled = compile_variant(variant, chip)
            used = resources(compiled, chip, warps)
            counted = target == "sm_90" and variant.kernel in MODES
            row = {
                "kernel": variant.kernel,
                "shape": variant.shape,
                "target": target,
                "tile": variant.tile,
                "warps": warps,
                **used,
                "instructions": words(path_instructions(compiled, variant)) if counted else "-",
            }
            rows.append(row)
            if used["shared"] > chip.shared or (used["spilled"] and not variant.may_spill):
                bad.append(row)
    print(headline(environment()), end="\n\n")
    print(table(rows))
    print(f"\n{len(rows)} kernels: {len(bad) or 'none'} spills or is too large")
    if not (arguments.check or arguments.only):
        columns = " | ".join(rows[0])
        lines = [" | ".join(map(str, row.values())) for row in rows]
        write_result("resources", {"columns": columns, "kernels": lines})
    if bad:
        raise SystemExit(f"these spill or do not fit: {bad}")


if __name__ == "__main__":
    main()

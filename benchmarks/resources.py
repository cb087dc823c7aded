"""Registers, spills, shared memory and occupancy of every kernel, compiled for GPUs without one.

python -m benchmarks.resources            # the table, and benchmarks/results/resources.json
python -m benchmarks.resources --check    # exit status 1 where one spills or does not fit
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import environment, write_result
from fastgeo.measure import headline, table

kernels = importlib.import_module("fastgeo_kernels.path_js_div")


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
VARIANTS = [
    dict(dtype="bf16", temperature=2.0),
    dict(dtype="fp16"),
    dict(class_stride=25),
    dict(class_stride=25, wide=True),
    dict(wide=True),
]


def compile_kernel(
    chip: Chip,
    shape: tuple[int, int, int],
    mode: dict,
    dtype: str = "fp32",
    temperature: float = 1.0,
    class_stride: int = 1,
    wide: bool = False,
):
    """The kernel that the launcher would compile for this shape on this chip, and its blocks."""
    points, batch, classes = shape
    blocks = kernels.choose_blocks(points, batch, classes, chip.processors)
    kernel = kernels.kernel_for(blocks)
    constants = kernels.constants(
        points,
        classes,
        blocks,
        aligned=math.gcd(4 if dtype == "fp32" else 8, classes) if class_stride == 1 else 1,
        wide=wide,
        temperature=temperature,
        mean=mode["value"] == "mean",
        **{"grad": False, "upstream": False, **mode},
    )
    names = kernel.arg_names
    if class_stride == 1:
        constants["stride_c"] = 1
    pointers = [name for name in names if name.endswith("_ptr")]
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name in pointers else "i32"
        for name in names
    }
    signature["value_ptr"] = signature["upstream_ptr"] = "*fp32"
    if wide:
        signature["stride_n"] = signature["stride_b"] = "i64"
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = kernels.options(blocks, nvidia=chip.target.backend == "cuda")
    return triton.compile(source, target=chip.target, options=options), blocks


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
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a spill")
    arguments = parser.parse_args()
    plain = [(*case, {}) for case in itertools.product(SHAPES, MODES.items(), CHIPS)]
    value_and_grad, *_ = MODES.items()
    variants = itertools.product(SHAPES[1:-1], [value_and_grad], ("sm_90", "gfx942"), VARIANTS)
    rows = []
    for shape, (mode, options), target, variant in [*plain, *variants]:
        chip = CHIPS[target]
        compiled, blocks = compile_kernel(chip, shape, options, **variant)
        words = [f"{key}={value}" for key, value in variant.items()]
        rows.append(
            {
                "kernel": ", ".join([mode, *words]),
                "N, B, C": "{}, {}, {}".format(*shape),
                "target": target,
                "tile": f"{blocks.rows} x {blocks.block}",
                "points": blocks.segment,
                "warps": blocks.warps,
                **resources(compiled, chip, blocks.warps),
            }
        )
    print(headline(environment()), end="\n\n")
    print(table(rows))
    # Offsets of 64 bits, for classes gigabytes apart, have to run; they may spill.
    spills = [row for row in rows if row["spilled"] and "wide" not in row["kernel"]]
    too_large = [row for row in rows if row["shared"] > CHIPS[row["target"]].shared]
    print(f"\n{len(rows)} kernels: {len(spills) or 'no'} spills, {len(too_large)} too large")
    if not arguments.check:
        write_result("resources", {"kernels": rows})
    if spills or too_large:
        raise SystemExit(f"these spill or do not fit: {spills + too_large}")


if __name__ == "__main__":
    main()

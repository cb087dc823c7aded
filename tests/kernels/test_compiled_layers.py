"""What the layers' kernels become for GPUs, compiled without one."""

import importlib
import re

import pytest

pytest.importorskip("triton")

from fastgeo_kernels.stacked import conv_kernels, group_norm
from triton import compile as compile_kernel
from triton.compiler import ASTSource

from benchmarks.instructions import instructions
from benchmarks.resources import CHIPS, LAYERS, resources

path_update = importlib.import_module("fastgeo_kernels.path_update")


def compiled(target, kernel, constants, options, pointers, divided=()):
    """The kernel with pointers of 16 bytes, those in fp32 but for the ones that are named, and
    integers, of which 16 divides some."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = f"*{pointers.get(name, 'fp32')}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if kind != "i32" or name in divided:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_kernel(source, target=CHIPS[target].target, options=options)


def accesses(ptx):
    """Bytes of every load and store of global memory."""
    found = re.findall(r"(?:ld|st)\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(many or 1) * int(bits) // 8 for many, bits in found]


@pytest.mark.parametrize("target", CHIPS)
def test_the_update_loads_several_columns_at_once(target):
    """Where 16 divides their number; of any other number it loads one by one."""
    given = (23, True, 0.9, True, True, True, True)
    how = path_update.constants(*given), path_update.OPTIONS, {"copy_ptr": "bf16"}
    aligned, odd = (
        compiled(target, path_update.path_update_kernel, *how, divided) for divided in (("P",), ())
    )
    used = resources(aligned, CHIPS[target], path_update.OPTIONS["num_warps"])
    assert used["spilled"] == 0 and used["occupancy"] == 1
    if target != "gfx942":
        # Gradient twice, both ends, weight and velocity in and out; beside the copy in bf16 single
        # numbers: the rate, and sums of squares in two places.
        assert sorted(accesses(aligned.asm["ptx"])) == [4] * 4 + [8] * 8
        assert sorted(accesses(odd.asm["ptx"])) == [2] * 2 + [4] * 19


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("channels, pixels", LAYERS)
def test_the_norm_behind_a_sum_reads_the_gradient_that_relu_let_through_once_more(
    target, channels, pixels
):
    """Where a group is in tiles: x and that one a second time, not dy, the other use's gradient and
    y. Without another use there is one gradient less to read."""
    tile = group_norm.group_tile(pixels, channels, True, 2)
    constants = group_norm.group_constants(pixels, channels, tile, True, True)
    kernel, found = group_norm.group_backward_kernel, []
    pointers = {name: "bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {name: "fp32" for name in ("mean_ptr", "rstd_ptr", "dparams_ptr")}
    for uses in ({"other_ptr": None}, {}):
        binary = compiled(target, kernel, constants | uses, {"num_warps": tile.warps}, pointers)
        used = resources(binary, CHIPS[target], tile.warps)
        assert used["spilled"] == 0 and used["occupancy"] >= 0.25
        found.append(accesses(binary.asm.get("ptx", "")).count(16))
    each = tile.pixels * tile.channels * 2 // (16 * 32 * tile.warps)  # loads a thread of a tile
    streams = 5 if tile.whole else 7  # x, dy, y; x and the residual's gradient; it, and dx
    if target == "sm_90":
        assert found[1] - found[0] == each
        assert found[0] - streams * each in (0, 1)  # weights or their gradients, of some Tritons


def rounds(binary):
    """Instructions and matrix products of every loop that has some."""
    lines = instructions(binary.asm["cubin"])
    for at, line in enumerate(lines):
        jump = re.search(r"\bBRA (\d+)$", line)
        if jump and int(jump[1]) < at:
            body = lines[int(jump[1]) : at + 1]
            products = sum("HGMMA" in one for one in body)
            if products:
                yield len(body), products


@pytest.mark.parametrize("product, most", [("forward", 27), ("input", 30), ("weight", 54)])
def test_a_convolution_is_one_loop_with_few_instructions_a_product(product, most):
    """Of 64 by 64 by 16 numbers; nine loops, one a tap, took 33, 36 and 64."""
    sides, constants = ((32, 32), (32, 32)), {"PRECISION": "tf32"}
    if product == "weight":
        kernel = conv_kernels.conv_weight_kernel
        blocks = conv_kernels.weight_blocks(64, 9 * 64, 2, False)
    else:
        kernel = conv_kernels.conv_kernel
        blocks = conv_kernels.conv_blocks(64, 64, 2, False)
        constants["MIRRORED"] = product == "input"
    constants |= conv_kernels.constants(*sides, 64, 64, 3, 1, 1) | conv_kernels.tile(blocks)
    pointers = {name: "bf16" for name in ("x_ptr", "weight_ptr", "y_ptr", "dy_ptr")}
    options = conv_kernels.options(blocks, nvidia=True)
    ((body, products),) = rounds(compiled("sm_90", kernel, constants, options, pointers))
    assert products == 8 and body / products <= most

"""What the layers' kernels become for GPUs, compiled without one."""

import importlib
import re

import pytest

pytest.importorskip("triton")

from triton import compile as compile_kernel
from triton.compiler import ASTSource

from benchmarks.resources import CHIPS, resources

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

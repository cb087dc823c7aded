"""What the layers' kernels share: a Triton that may be missing, and when a kernel can run."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from typing import Callable, Sequence

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-untyped]  # it ships no types
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:
    triton = tl = None

# Set by TRITON_INTERPRET=1 before triton is imported: kernels run in Python, on CPU tensors.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_graph = threading.local()


def compiling() -> bool:
    """Whether values cannot be looked at, since torch.compile only records what is done."""
    return torch.compiler.is_compiling() or getattr(_graph, "recorded", False)


def recorded_whole(function: Callable) -> Callable:
    """A function that torch.compile records without following its Python: every name that it would
    follow is one more thing to look at before each call, which small tensors notice. A number that
    changes from call to call is recorded anew."""

    @functools.wraps(function)
    def recorded(*args):
        before = getattr(_graph, "recorded", False)
        _graph.recorded = True
        try:
            return function(*(float(x) if isinstance(x, torch.SymFloat) else x for x in args))
        finally:
            _graph.recorded = before

    return torch.compiler.allow_in_graph(recorded)


def jit(function=None, **options):
    """`triton.jit`, or nothing where there is no Triton."""
    if function is None:
        return functools.partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


def use_triton(
    name: str,
    impl: str,
    tensor: Tensor,
    unfit: str = "",
    dtypes: Sequence[torch.dtype] = HALF_AND_SINGLE,
) -> bool:
    """Whether an operation runs in Triton.

    Args:
        name: of the operation.
        impl: "triton", "torch", or "auto": Triton on a GPU where it can.
        tensor: what it works on.
        unfit: why it cannot run in Triton; empty if it can.
        dtypes: that the kernel takes.

    Raises:
        ValueError: another impl.
        RuntimeError: impl="triton" where it cannot run; the message says why.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "torch" or (impl == "auto" and not tensor.is_cuda):
        return False
    if triton is None:
        unfit = "the package triton is not installed"
    elif not tensor.is_cuda and not INTERPRETED:
        unfit = f"the input is on {tensor.device}, not on a GPU (nor is TRITON_INTERPRET=1 set)"
    elif tensor.dtype not in dtypes:
        words = ", ".join(str(dtype)[6:] for dtype in dtypes)
        unfit = f"it takes {words}, got {str(tensor.dtype)[6:]}"
    if unfit and impl == "triton":
        raise RuntimeError(f"{name}: impl='triton' cannot run: {unfit}")
    if unfit and not compiling():
        _say_once(f"{name} runs in plain PyTorch on a GPU: {unfit}")
    return not unfit


def on_device_of(tensor: Tensor):
    """The context in which a kernel is launched on the tensor's device."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


@functools.lru_cache(maxsize=None)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)

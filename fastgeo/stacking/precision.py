"""Numbers that a network is evaluated in: fp32, TF32 products, or a bf16 body with an fp32 head.

In bf16 the layers that take parameters, and so what follows them, run on bf16 copies of parameters
and inputs; parameters stay as they are, and so do their gradients' dtypes. The last layers before
the output, and all behind them, are in fp32: rounding the logits to bf16 would cost the gradient of
the divergence its digits where neighbours are close.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgeo.stacking.stacked import Stacked

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(precision: str) -> None:
    """ValueError unless it is one."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether a processor has units for products of bf16 numbers."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units: Any = torch.cpu
    return units._is_amx_tile_supported() or units._is_avx512_bf16_supported()


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products on a GPU as they are, or rounded to TF32, for a while; a CPU has no TF32.

    Args:
        precision: "tf32", or anything else for products as they are.
    """
    backends: Any = torch.backends  # whose stubs lack these settings
    older = backends.cuda.matmul, backends.cudnn
    newer = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    allowed = [_allows_tf32(backend) for backend in older]
    before = [backend.fp32_precision for backend in newer]
    for backend in older:
        backend.allow_tf32 = precision == "tf32"
    for backend in newer:  # behind the older setting, which changes these; "none" is another's
        backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for backend, allow in zip(older, allowed, strict=True):
            if allow is not None:
                backend.allow_tf32 = allow
        for backend, value in zip(newer, before, strict=True):
            backend.fp32_precision = value


def _allows_tf32(backend: Any) -> bool | None:
    """PyTorch's older setting; None where the newer one says otherwise, in which case it raises."""
    try:
        return backend.allow_tf32
    except RuntimeError:
        return None


REDUCTIONS = set("mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d".split())
REDUCTIONS |= {"adaptive_avg_pool2d", "adaptive_avg_pool3d"}


class Casts:
    """Which calls of a pass are layers of the body, and which of the head.

    A layer is a call that takes parameters, or what was computed of nothing else, beside something
    else. Those of the head have no layer behind them.

    Attributes:
        count, total: layers so far in the pass, and in all.
        of_body: names of parameters that layers of the body take as they are, and nothing else.
    """

    def __init__(self, record: Sequence[Any], outputs: Sequence[Stacked]):
        """record: `Entry`s of a pass in which all inputs were `Stacked`; outputs: what it gave."""
        layers = [
            i for i, entry in enumerate(record) if len({of is None for of, _ in entry.given}) == 2
        ]

        def behind(place: int) -> Iterator[int | None]:
            """Where what a call takes, besides parameters, comes from."""
            return (at for of, at in record[place].given if of is None)

        def reached(places: Iterable[int | None]) -> tuple[set[int], set[int]]:
            """The layers that these come from first, and the other calls on the way to them."""
            last, others, waiting = set(), set(), list(places)
            while waiting:
                place = waiting.pop()
                if place in layers:
                    last.add(place)
                elif place is not None and place not in others:
                    others.add(place)
                    waiting += behind(place)
            return last, others

        head, _ = reached(output.at for output in outputs)
        _, between = reached(at for layer in head for at in behind(layer))
        self._head = {layers.index(layer) for layer in head}
        self._means = {  # in front of the head: (layers before it, name)
            (sum(layer < place for layer in layers), record[place].name)
            for place in between
            if record[place].name in REDUCTIONS
        }
        read: dict[bool, set[str]] = {True: set(), False: set()}
        for place, entry in enumerate(record):
            body = place in layers and place not in head
            read[body] |= {name for of, at in entry.given if at is None for name in of or ()}
        self.of_body = read[True] - read[False]
        self.count, self.total = 0, len(layers)

    def given(self, name: str, args: Any, kwargs: dict) -> tuple[Any, dict]:
        """The arguments of a call in the dtype that it runs in."""
        known = [t.of for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Stacked)]
        tensors = sum(isinstance(t, Tensor) for t in pytree.tree_leaves((args, kwargs)))
        of_parameters = sum(of is not None for of in known)
        if 0 < of_parameters < tensors:
            self.count += 1
            if self.count - 1 in self._head:
                return _wide(args, kwargs)
            return _cast((args, kwargs), torch.bfloat16)
        if (self.count, name) in self._means:
            return _wide(args, kwargs)
        return args, kwargs


def _wide(args: Any, kwargs: dict) -> tuple[Any, dict]:
    double = any(_is(t, torch.float64) for t in pytree.tree_leaves((args, kwargs)))
    return _cast((args, kwargs), torch.float64 if double else torch.float32)


def _is(leaf: Any, dtype: torch.dtype) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return isinstance(leaf, Tensor) and leaf.dtype == dtype


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def one(leaf: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            if not leaf.is_floating_point() or leaf.dtype == dtype:
                return leaf
        if not isinstance(leaf, Stacked):
            return leaf.to(dtype)
        cast = Stacked(leaf.tensor.to(dtype))
        cast.of, cast.at = leaf.of, leaf.at
        return cast

    return pytree.tree_map_only(Tensor, one, value)

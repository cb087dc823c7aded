"""One optimisation step of all interior points of a path, in one pass over gradients and weights.

The gradient [M, P] of the M = N - 2 interior points is multiplied by the inverse of the path
Laplacian L = tridiag(-1, 2, -1), which makes it the gradient under the H1 inner product of paths,
and goes through SGD. That inverse is Green's function of the discrete Laplacian,

    inv(L)[i, j] = min(i, j) (M + 1 - max(i, j)) / (M + 1),    i, j = 1 ... M

so a row of the product is two running sums along the path, of j g_j up to i and of (M + 1 - j) g_j
beyond it: no matrix, and O(M) operations a column. The second sum is what is left of the sum over
all rows; its rounding errors are added up beside it, so that little can be left of much. A program
takes some columns, reads the gradient once for the sum over all rows and again, from the cache, for
the running ones, and rewrites the weights. All parameters lie side by side in one [M, P] tensor, so
that a step is one launch; it loads and stores several columns at a time where 16 divides P. With
the weights at hand it also says how far neighbours on the path are apart.
"""

from __future__ import annotations

from typing import Dict, Optional, Union

import torch
from torch import Tensor

from .launching import jit, on_device_of, tl, use_triton

BLOCK = 256  # columns of a program: its gradients, some 25 KB, stay in the caches
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # a fused product would spoil two-sum


@jit
def _add(total, lost, term):
    """total + term, and what rounding lost so far (Knuth's two-sum)."""
    new = total + term
    seen = new - total
    return new, lost + ((total - (new - seen)) + (term - seen))


@jit
def _square_between(a, b):
    """Of two rows; entries that are alike, be they infinite, are not apart."""
    away = tl.where(a == b, 0.0, b - a)
    return tl.sum(away * away, 0)


@jit
def path_update_kernel(
    grad_ptr,  # [M, P], as weight, velocity and copy
    weight_ptr,
    velocity_ptr,
    copy_ptr,
    ends_ptr,  # [2, P]
    squares_ptr,  # [programs, M + 1]
    rate_ptr,  # []
    P,
    M: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    PRECONDITION: tl.constexpr,
    VELOCITY: tl.constexpr,
    COPY: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of every point."""
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < P
    rate = tl.load(rate_ptr)
    before = tl.zeros([BLOCK], tl.float32)
    beyond = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    row = tl.cast(P, tl.int64) * 0
    if PRECONDITION:
        for i in range(M):
            at = row + col
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last")
            grad = grad.to(tl.float32)
            beyond, lost = _add(beyond, lost, grad * (M - i))
            row += P
        row -= row
    if APART:
        squares_ptr += tl.program_id(0).to(tl.int64) * (M + 1)
        previous = tl.load(ends_ptr + col, mask=mask, other=0.0)
    for i in range(M):
        at = row + col
        step = tl.load(grad_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
        step = step.to(tl.float32)
        if PRECONDITION:
            before += step * (i + 1)
            beyond, lost = _add(beyond, lost, step * (i - M))
            step = (before * (M - i) + (beyond + lost) * (i + 1)) * (1.0 / (M + 1))
        if VELOCITY:
            velocity = step + MOMENTUM * tl.load(velocity_ptr + at, mask=mask, other=0.0)
            tl.store(velocity_ptr + at, velocity, mask=mask)
            step = step + MOMENTUM * velocity if NESTEROV else velocity
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        if APART:
            tl.store(squares_ptr + i, _square_between(previous, weight))
            previous = weight
        weight -= rate * step
        tl.store(weight_ptr + at, weight, mask=mask)
        if COPY:
            tl.store(copy_ptr + at, weight.to(copy_ptr.dtype.element_ty), mask=mask)
        row += P
    if APART:
        end = tl.load(ends_ptr + P + col, mask=mask, other=0.0)
        tl.store(squares_ptr + M, _square_between(previous, end))


def constants(
    points: int,
    precondition: bool,
    momentum: float,
    nesterov: bool,
    velocity: bool,
    copy: bool,
    apart: bool = False,
) -> Dict[str, object]:
    """The constexpr arguments of a launch."""
    return dict(
        M=points,
        MOMENTUM=momentum,
        NESTEROV=nesterov,
        PRECONDITION=precondition,
        VELOCITY=velocity,
        COPY=copy,
        APART=apart,
        BLOCK=BLOCK,
    )


@torch.no_grad()
def path_update(
    weight: Tensor,
    grad: Tensor,
    lr: Union[float, Tensor],
    *,
    precondition: bool = True,
    momentum: float = 0.0,
    nesterov: bool = False,
    velocity: Optional[Tensor] = None,
    copy: Optional[Tensor] = None,
    ends: Optional[Tensor] = None,
    impl: str = "auto",
) -> Optional[Tensor]:
    """Takes an SGD step along the gradient, or along its product with the inverse path Laplacian.

    Equivalent to::

        squares = torch.cat([ends[:1], weight, ends[1:]]).diff(dim=0).square().sum(1)
        step = inverse_path_laplacian(M) @ grad if precondition else grad
        if momentum:
            velocity.mul_(momentum).add_(step)
            step = step + momentum * velocity if nesterov else velocity
        weight -= lr * step
        copy.copy_(weight)  # if one is given

    Args:
        weight: [M, P], the M interior points; changed.
        grad: [M, P], of the energy; fp32, bf16 or fp16.
        lr: learning rate, a number or a tensor of one fp32 number, which a captured graph reads
            anew at every replay.
        precondition: multiply by the inverse of tridiag(-1, 2, -1) along the path.
        momentum: of SGD, 0 for none.
        nesterov: of the momentum, as of `torch.optim.SGD`.
        velocity: [M, P] as weight, the state of the momentum, zeros at first; changed.
        copy: [M, P] in another dtype, receives the new weights.
        ends: [2, P] as weight, the two points that the path runs between.
        impl: "triton" (fp32 weights; on a CPU under TRITON_INTERPRET=1), "torch", or "auto".

    Returns:
        With ends, the squared distances of the M + 2 points from each other before the step,
        [M + 1], in fp32 or weight's precision; without, None.

    Raises:
        ValueError: tensors of another shape or layout than weight, ends of another dtype, a
            velocity without momentum or the other way round, nesterov without momentum, an unknown
            impl.
        RuntimeError: impl="triton" where it cannot run; the message says what is missing.

    Example:
        >>> weight = torch.zeros(3, 5)
        >>> path_update(weight, torch.ones(3, 5), lr=2.0)
        >>> weight[:, 0]
        tensor([-3., -4., -3.])
    """
    if weight.ndim != 2 or not weight.is_contiguous():
        raise ValueError(f"weight must be [M, P] and contiguous, got {_described(weight)}")
    for name, tensor in (("grad", grad), ("velocity", velocity), ("copy", copy)):
        if tensor is not None and (tensor.shape != weight.shape or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must be {list(weight.shape)} and contiguous, as weight, got "
                f"{_described(tensor)}"
            )
    if ends is not None and (
        (ends.shape, ends.dtype) != ((2, weight.shape[1]), weight.dtype) or not ends.is_contiguous()
    ):
        raise ValueError(
            f"ends must be [2, {weight.shape[1]}] and contiguous, {str(weight.dtype)[6:]} as "
            f"weight, got {_described(ends)}, {str(ends.dtype)[6:]}"
        )
    if (momentum != 0) != (velocity is not None):
        raise ValueError(f"momentum {momentum} needs {'a' if momentum else 'no'} velocity")
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum")
    if not use_triton("path_update", impl, weight, dtypes=(torch.float32,)):
        squares = None if ends is None else _squares(weight, ends)
        _plain(weight, grad, lr, precondition, momentum, nesterov, velocity, copy)
        return squares
    points, size = weight.shape
    programs = -(-size // BLOCK)
    if isinstance(lr, Tensor):
        rate = lr.to(weight.device, torch.float32)
    else:  # filled there: a copy would wait for the host
        rate = torch.full((), lr, dtype=torch.float32, device=weight.device)
    given = (velocity is not None, copy is not None, ends is not None)
    squares = None if ends is None else weight.new_empty(programs, points + 1)
    with on_device_of(weight):
        path_update_kernel[(programs,)](
            grad,
            weight,
            weight if velocity is None else velocity,
            weight if copy is None else copy,
            weight if ends is None else ends,
            weight if squares is None else squares,
            rate,
            size,
            **constants(points, precondition, momentum, nesterov, *given),
            **OPTIONS,
        )
    return None if squares is None else squares.sum(0)


def _squares(weight: Tensor, ends: Tensor) -> Tensor:
    """[M + 1], between neighbours; entries that are alike, be they infinite, are not apart."""
    points = torch.cat([ends[:1], weight, ends[1:]])
    away = points.diff(dim=0).masked_fill_(points[1:] == points[:-1], 0)
    return away.to(torch.promote_types(away.dtype, torch.float32)).square().sum(1)


def _plain(weight, grad, lr, precondition, momentum, nesterov, velocity, copy) -> None:
    precision = torch.promote_types(weight.dtype, torch.float32)
    step = grad.to(precision)
    if precondition:
        step = inverse_path_laplacian(len(grad), precision).to(step.device) @ step
    if velocity is not None:
        velocity.mul_(momentum).add_(step)
        step = step + momentum * velocity if nesterov else velocity
    weight.sub_(step.mul(lr))
    if copy is not None:
        copy.copy_(weight)


def inverse_path_laplacian(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[n, n], the inverse of tridiag(-1, 2, -1): min(i, j) (n + 1 - max(i, j)) / (n + 1).

    Example:
        >>> inverse_path_laplacian(2) * 3
        tensor([[2., 1.],
                [1., 2.]])
    """
    i = torch.arange(1, size + 1, dtype=dtype)
    return torch.minimum(i, i[:, None]) * (size + 1 - torch.maximum(i, i[:, None])) / (size + 1)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"

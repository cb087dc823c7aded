"""What the kernels of stacked layers have to do, in the interpreter and on a GPU.

The oracles are float64 by definition, from elementary operations; autograd gives their gradients.
"""

import itertools

import torch
import torch.nn.functional as F
from fastgeo_kernels import path_update, stacked_channel_norm, stacked_group_norm
from fastgeo_kernels.stacked.conv import conv_by
from fastgeo_kernels.stacked.norm import channel_norm_twice, group_norm_twice

EPS = 1e-5
BEHIND = [(False, False), (False, True), (True, False), (True, True)]  # residual, relu


def random(*shape, seed=0, device="cpu", dtype=torch.float32, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (shift + torch.randn(*shape, generator=generator)).to(device, dtype)


def channels_last(x):
    """[N, B, C, H, W] with (B, H, W, N, C) in memory."""
    return x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


def networks_around(x):
    """[N, B, C, H, W] with (N, B, H, W, C) in memory."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def assert_close(got, expected, tolerance, what=""):
    """Within a share of the largest entry, which is at least 1e-3."""
    assert got.isfinite().all(), what
    error = (got.double() - expected.double()).abs().max()
    largest = expected.double().abs().max().clamp(min=1e-3)
    assert error <= tolerance * largest, f"{what}: {error:.1e} of {largest:.1e}"


def with_saved(function, *args):
    """What a function returns, and the tensors that it keeps for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return function(*args), saved


def norm_by_definition(kind, x, weight, bias, residual, relu):
    """float64: statistics over C, H and W, or over C at each pixel."""
    axes = (2, 3, 4) if kind == "group" else (2,)
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.mean(axes, keepdim=True)
    z = centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()
    y = z * weight[:, None, :, None, None] + bias[:, None, :, None, None]
    y = y if residual is None else y + residual.double()
    return y.clamp(min=0) if relu else y


def norm(kind, x, weight, bias, residual, relu, impl):
    options = dict(residual=residual, relu=relu, impl=impl)
    if kind == "group":
        return stacked_group_norm(x, 1, weight, bias, EPS, **options)
    return stacked_channel_norm(x, weight, bias, EPS, **options)


def norm_twice(kind, x, weight, bias, residual, relu):
    options = dict(residual=residual, relu=relu, impl="triton")
    if kind == "group":
        return group_norm_twice(x, 1, weight, bias, EPS, **options)
    return channel_norm_twice(x, weight, bias, EPS, **options)


def check_norm(
    kind,
    shape,
    residual,
    relu,
    *,
    dtype=torch.float32,
    device="cpu",
    lay_out=channels_last,
):
    """Output and all gradients; in half precision as close as that dtype lets PyTorch be."""
    points, _, channels, *_ = shape
    options = dict(device=device, dtype=dtype)
    leaves = [
        lay_out(random(*shape, seed=1, shift=0.5, **options)),
        random(points, channels, seed=2, shift=1.0, **options),
        random(points, channels, seed=3, **options),
        lay_out(random(*shape, seed=4, **options)),
    ][: 4 if residual else 3]
    upstream = channels_last(random(*shape, seed=5, **options))
    # The backward pass computes ReLU's input again, which may have been rounded to 0 in y.
    exact = norm_by_definition(kind, *leaves[:3], leaves[3] if residual else None, False)
    upstream = upstream.masked_fill(exact.abs() < 1e-6, 0)

    def result(leaves, function, upstream=upstream):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*leaves[:3], leaves[3] if residual else None)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    # ReLU's gradient jumps at 0: the oracle gets the sign that rounding gave.
    got = result(leaves, lambda x, w, b, r: norm(kind, x, w, b, r, relu, "triton"))
    mask = (got[0] > 0).double() if relu else 1.0
    expected = result(leaves, lambda x, w, b, r: norm_by_definition(kind, x, w, b, r, False) * mask)
    names = ("y", "dx", "dweight", "dbias", "dresidual")
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, one, definition in zip(names, got, expected, strict=False):
        assert one.dtype == dtype, name
        assert_close(one, definition, tolerance, f"{kind} {shape} {residual} {relu} {name}")
    if relu:
        sharp = norm_by_definition(kind, *leaves[:3], leaves[3] if residual else None, True)
        assert_close(got[0], sharp, tolerance, "relu")
    again = result(leaves, lambda x, w, b, r: norm(kind, x, w, b, r, relu, "triton"))
    for name, one, two in zip(names, got, again, strict=False):
        assert torch.equal(one, two), f"{name} differs between two calls"


def check_norm_of_two_uses(kind, residual, relu, *, dtype=torch.float32, lay_out=channels_last):
    """The gradient of a sum of two uses is that of one use with both gradients added."""
    leaves = [
        lay_out(random(2, 1, 6, 3, 3, seed=1, dtype=dtype)),
        *(random(2, 6, seed=seed, shift=1.0, dtype=dtype) for seed in (2, 3)),
        *([networks_around(random(2, 1, 6, 3, 3, seed=4, dtype=dtype))] if residual else []),
    ]
    upstream = [lay_out(random(2, 1, 6, 3, 3, seed=seed, dtype=dtype)) for seed in (5, 6)]

    def run(function, *how):
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        return function(kind, *own[:3], own[3] if residual else None, relu, *how), own

    once, own = run(norm, "triton")
    both = (upstream[0].double() + upstream[1].double()).to(dtype)
    expected = torch.autograd.grad(once, own, both)
    (one, two), own = run(norm_twice)
    assert one.data_ptr() == two.data_ptr() and torch.equal(one, two) and torch.equal(one, once)
    got = torch.autograd.grad([one, two], own, upstream, retain_graph=True)
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, tolerance, f"{kind} {residual} {relu}")
    for use, dy in zip((one, two), upstream, strict=True):
        got = torch.autograd.grad(use, own, dy, retain_graph=True)
        alone, own_again = run(norm, "triton")
        expected = torch.autograd.grad(alone, own_again, dy)
        assert all(map(torch.equal, got, expected))


def check_variance_is_no_difference_of_squares(kind, device="cpu"):
    """Mean 1000 and deviation 1: E[x^2] - E[x]^2 in fp32 is off by several hundredths."""
    x = random(2, 2, 24, 3, 3, seed=1, shift=1000.0, device=device)
    weight, bias = torch.ones(2, 24, device=device), torch.zeros(2, 24, device=device)
    got = norm(kind, x, weight, bias, None, False, "triton")
    assert_close(got, norm_by_definition(kind, x, weight, bias, None, False), 1e-4)


def check_norm_saves_its_input_and_statistics(kind, device="cpu"):
    """No normalised copy: the input itself, numbers of [N, C] and [B, N], and y for its sign."""
    weight = random(2, 8, device=device).requires_grad_()
    for lay_out, (residual, relu) in itertools.product((channels_last, networks_around), BEHIND):
        x = lay_out(random(2, 3, 8, 2, 2, device=device))
        y, saved = with_saved(
            lambda x, r, relu: norm(kind, x, weight, weight, r, relu, "triton"),
            *(x, x if residual else None, relu),
        )
        large = [t.data_ptr() for t in saved if t.numel() == x.numel()]
        assert large == [x.data_ptr(), *([y.data_ptr()] if residual and relu else [])]
        assert y.stride() == x.stride()


def check_norm_keeps_a_nan(kind, device="cpu"):
    x = random(2, 2, 4, 2, 2, device=device)
    x[0, 1] = torch.nan
    weight = torch.ones(2, 4, device=device)
    y = norm(kind, x, weight, weight, x, True, "triton")
    assert y[0, 1].isnan().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()


# --- The update of a path -------------------------------------------------------------------------


def update_by_definition(weight, grad, lr, precondition, momentum, nesterov, velocity):
    """float64: the Laplacian itself is solved for, and SGD as in torch.optim.SGD."""
    step, points = grad.double(), len(grad)
    if precondition:
        laplacian = 2 * torch.eye(points, dtype=torch.float64, device=grad.device)
        laplacian -= torch.diag(laplacian.new_ones(points - 1), 1)
        laplacian -= torch.diag(laplacian.new_ones(points - 1), -1)
        step = torch.linalg.solve(laplacian, step)
    if momentum:
        velocity = momentum * velocity.double() + step
        step = step + momentum * velocity if nesterov else velocity
    return weight.double() - lr * step, velocity


def check_update(
    points,
    size,
    *,
    impl="triton",
    precondition=True,
    momentum=0.0,
    nesterov=False,
    dtype=torch.float32,
    copy=None,
    device="cpu",
):
    """Two steps, within rounding of the largest weight, step or velocity, and what lies between
    the points before each."""
    weight = random(points, size, seed=1, device=device)
    ends = random(2, size, seed=4, device=device)
    ends[:, 0] = weight[:, 0] = torch.inf  # as in a mask, where nothing moves
    velocity = torch.zeros_like(weight) if momentum else None
    rounded = None if copy is None else torch.full_like(weight, torch.nan, dtype=copy)
    rate = torch.tensor(0.3, device=device)
    expected, expected_velocity = weight.clone(), velocity
    for seed in (2, 3):
        grad = random(points, size, seed=seed, device=device, dtype=dtype)
        grad[:, 0] = 0
        between = torch.cat([ends[:1], weight, ends[1:]])[:, 1:].double().diff(dim=0)
        expected, expected_velocity = update_by_definition(
            expected, grad, 0.3, precondition, momentum, nesterov, expected_velocity
        )
        squares = path_update(
            *(weight, grad, rate),
            precondition=precondition,
            momentum=momentum,
            nesterov=nesterov,
            velocity=velocity,
            copy=rounded,
            ends=ends,
            impl=impl,
        )
        assert_close(squares, between.square().sum(1), 1e-6, "squares")
    assert (weight[:, 0] == torch.inf).all()
    weight, expected = weight[:, 1:], expected[:, 1:]
    rounded = None if copy is None else rounded[:, 1:]
    assert_close(weight, expected, 1e-6, "weight")
    if momentum:
        assert_close(velocity, expected_velocity, 1e-6, "velocity")
    if copy is not None:
        assert_close(rounded, weight, torch.finfo(copy).eps, "copy")


# --- Convolutions ---------------------------------------------------------------------------------


def conv_by_definition(x, weight, stride, padding):
    """float64: the sum over taps of shifted images times the tap's weights."""
    x, weight, size = x.double(), weight.double(), weight.shape[3]
    x = F.pad(x, (padding,) * 4)
    height, width = ((n - size) // stride + 1 for n in x.shape[3:])
    y = 0
    for i in range(size):
        for j in range(size):
            shifted = x[..., i : i + stride * height : stride, j : j + stride * width : stride]
            shifted = shifted[..., :height, :width]
            y = y + torch.einsum("nbchw,noc->nbohw", shifted, weight[..., i, j])
    return y


def check_conv(
    ways,
    shape,
    out,
    size,
    stride,
    *,
    dtype=torch.float32,
    device="cpu",
    lay_out=channels_last,
    shared=False,
    tolerance=None,
):
    """Output and gradients of N convolutions of [N, B, C, H, W] to `out` channels."""
    points, _, channels, *_ = shape
    options = dict(device=device, dtype=dtype)
    x = random(*(shape[1:] if shared else shape), seed=1, **options)
    x = x if shared else lay_out(x)
    weight = random(points, out, channels, size, size, seed=2, **options) / (size * channels**0.5)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    given = leaves[0].expand(points, *x.shape) if shared else leaves[0]
    expected = conv_by_definition(given, leaves[1], stride, size // 2)
    upstream = random(*expected.shape, seed=3, **options)
    expected = [expected, *torch.autograd.grad(expected, leaves, upstream.double())]
    y = conv_by(ways, given, leaves[1], stride, size // 2)
    upstream = lay_out(upstream)
    got = [y, *torch.autograd.grad(y, leaves, upstream, retain_graph=True)]
    if tolerance is None:
        tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, one, definition in zip(("y", "dx", "dweight"), got, expected, strict=True):
        assert one.dtype == dtype and one.shape == definition.shape, name
        assert_close(one, definition, tolerance, f"{ways} {shape} -> {out}, {size} {stride} {name}")
    again = torch.autograd.grad(y, leaves, upstream)
    if "triton" in ways:
        assert torch.equal(again[0], got[1]) and torch.equal(again[1], got[2])

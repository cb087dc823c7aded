"""The plain PyTorch operations against float64 definitions, finite differences and the loop."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastgeo_kernels import path_fisher_rao, path_js_div, path_js_div_value_and_grad

ops = SimpleNamespace(
    **{
        op.__name__: partial(op, impl="torch")
        for op in (path_fisher_rao, path_js_div, path_js_div_value_and_grad)
    }
)


def logits(points, batch, classes, distance=1.0, seed=0):
    """A path of float64 logits whose neighbours are about `distance` apart."""
    generator = torch.Generator().manual_seed(seed)
    start = 3 * torch.randn(1, batch, classes, generator=generator, dtype=torch.float64)
    steps = torch.randn(points - 1, batch, classes, generator=generator, dtype=torch.float64)
    return torch.cat([start, start + distance * steps.cumsum(0)])


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def js_div_by_definition(x):
    """H(m) - (H(p) + H(q)) / 2 in float64, [E, B]."""
    p = x.double().softmax(-1)
    return entropy((p[:-1] + p[1:]) / 2) - (entropy(p[:-1]) + entropy(p[1:])) / 2


SHAPES = [(2, 1, 2), (3, 7, 10), (25, 5, 17), (2, 3, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_path_js_div_is_the_float64_definition(shape, dtype, tolerance):
    x = logits(*shape).to(dtype)
    got = ops.path_js_div(x, reduction="none")
    assert got.dtype == dtype and got.shape == (shape[0] - 1, shape[1])
    torch.testing.assert_close(
        got.double(), js_div_by_definition(x), rtol=tolerance, atol=tolerance * 1e-2
    )
    torch.testing.assert_close(ops.path_js_div(x), got.mean(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.1, 1, 10])
def test_fp32_value_keeps_its_digits_for_near_equal_rows(distance):
    x = logits(4, 64, 10, distance).float()
    got = ops.path_js_div(x, reduction="none").double()
    torch.testing.assert_close(
        got, ops.path_js_div(x.double(), reduction="none"), rtol=1e-5, atol=0
    )


def test_near_equal_rows_follow_the_fisher_metric():
    """JSD -> |d|^2_Fisher / 8 (Eq. 1), with the error of the next order only."""
    x = logits(2, 16, 10, 1e-3)
    p, d = x[0].softmax(-1), x[1] - x[0]
    fisher = (p * d.square()).sum(-1) - (p * d).sum(-1).square()
    torch.testing.assert_close(
        ops.path_js_div(x, reduction="none")[0], fisher / 8, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_path_js_div_survives_underflow_and_saturation(dtype):
    hot = torch.full((4, 3, 5), -1e4, dtype=dtype)
    for point, hot_class in enumerate((0, 0, 1, 2)):
        hot[point, :, hot_class] = 1e4
    value, grad = ops.path_js_div_value_and_grad(hot)
    expected = torch.tensor([0, math.log(2), math.log(2)], dtype=value.dtype)
    assert torch.equal(value, expected)
    assert grad.dtype == dtype and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("batch", [1, 9, 101])
@pytest.mark.parametrize("classes", [1, 7, 10, 19, 33, 1000])
def test_equal_rows_have_exactly_no_divergence(batch, classes):
    """Also where a CPU sums one of two equal rows in another order: at the end of a tensor."""
    x = logits(1, batch, classes).float().expand(5, batch, classes)
    value, grad = ops.path_js_div_value_and_grad(x)
    assert torch.equal(value, torch.zeros(4))
    assert torch.equal(ops.path_fisher_rao(x), torch.zeros(4))
    assert torch.equal(grad, torch.zeros_like(x))


def test_gradient_is_the_finite_difference():
    x = logits(4, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.path_js_div(x, reduction="none"), x)


def test_value_and_grad_is_autograd_of_the_weighted_sum():
    x = logits(5, 7, 10).requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    value, grad = ops.path_js_div_value_and_grad(x.detach(), weight)
    expected = js_div_by_definition(x).mean(-1)
    torch.testing.assert_close(value, expected.detach())
    (expected_grad,) = torch.autograd.grad((weight * expected).sum(), x)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(
        grad.sum(-1), torch.zeros(5, 7, dtype=torch.float64), atol=1e-15, rtol=0
    )


def test_fp32_gradient_of_near_equal_rows():
    for distance in (1e-4, 1e-2, 1):
        x = logits(5, 32, 10, distance).float()
        _, grad = ops.path_js_div_value_and_grad(x)
        _, expected = ops.path_js_div_value_and_grad(x.double())
        error = (grad - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.max() < 2e-6, distance


def test_second_derivatives_raise_instead_of_vanishing():
    x = logits(3, 2, 4).requires_grad_()
    (grad,) = torch.autograd.grad(ops.path_js_div(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("distance", [1e-3, 0.1, 3])
def test_path_fisher_rao_is_the_float64_definition(distance):
    x = logits(6, 11, 10, distance)
    p = x.softmax(-1)
    angle = 2 * (p[:-1] * p[1:]).sqrt().sum(-1).clamp(max=1).acos()
    got = ops.path_fisher_rao(x, reduction="none")
    torch.testing.assert_close(got, angle, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ops.path_fisher_rao(x), angle.square().mean(-1).sqrt(), rtol=1e-6, atol=0
    )
    in_fp32 = ops.path_fisher_rao(x.float(), reduction="none").double()
    torch.testing.assert_close(
        in_fp32, ops.path_fisher_rao(x.float().double(), reduction="none"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    "bad, error, words",
    [
        ([[1.0]], TypeError, "floating point tensor, got list"),
        (torch.zeros(3, 4, 5, dtype=torch.long), TypeError, "torch.int64"),
        (torch.zeros(4, 5), ValueError, r"\[N, B, C\].*\[4, 5\]"),
        (torch.zeros(1, 4, 5), ValueError, r"N >= 2.*\[1, 4, 5\]"),
        (torch.zeros(3, 0, 5), ValueError, r"B >= 1.*\[3, 0, 5\]"),
    ],
)
def test_bad_logits_are_named(bad, error, words):
    for op in (ops.path_js_div, ops.path_js_div_value_and_grad, ops.path_fisher_rao):
        with pytest.raises(error, match=words):
            op(bad)


def test_bad_options_are_named():
    x = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError, match="'batchmean' or 'none', got 'sum'"):
        ops.path_js_div(x, reduction="sum")
    with pytest.raises(ValueError, match=r"edge_weight must be \[E\] = \[2\], got \[3\]"):
        ops.path_js_div_value_and_grad(x, torch.ones(3))

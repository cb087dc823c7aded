"""The divergence from a stored teacher, against the definition in float64."""

import math

import pytest
import torch
from fastgeo_kernels import js_div, top_k_js_div


def logits(count=6, classes=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, count, classes, generator=generator, dtype=torch.float64)


def by_definition(values, indices, student, rest, beta):
    """Probabilities written out: of K classes and the rest, or of all classes."""
    q = student.softmax(-1)
    p = values.exp()
    left = 1 - p.sum(-1, keepdim=True)
    if rest == "one":
        chosen = q.gather(-1, indices)
        p, q = torch.cat([p, left], -1), torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)
    else:
        spread = left / (q.shape[-1] - p.shape[-1])
        p = spread.expand(q.shape).scatter(-1, indices, p)
    if beta in (0, 1):
        first, second = (p, q) if beta == 0 else (q, p)
        return (first * (first / second).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("rest", ["one", "spread"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_it_is_the_definition(rest, beta):
    teacher, student = logits()
    values, indices = teacher.log_softmax(-1).topk(5)
    options = dict(rest=rest, beta=beta, reduction="none")
    student.requires_grad_()
    expected = by_definition(values, indices, student, rest, beta)
    got = top_k_js_div(values, indices, student, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    grads = [torch.autograd.grad(rows.sum(), student)[0] for rows in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13)
    single = top_k_js_div(values.float(), indices, student.detach().float(), **options)
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bounds_and_ends(beta):
    """One class for the rest never exceeds the divergence of all classes; a teacher that is flat
    beyond its K classes is the full divergence when spread."""
    teacher, student = logits(count=50)
    values, indices = teacher.log_softmax(-1).topk(8)
    options = dict(beta=beta, reduction="none")
    full = js_div(teacher, student, **options)
    assert (top_k_js_div(values, indices, student, **options) <= full).all()
    flat = teacher.clone().clamp(max=2.0).scatter(-1, indices, teacher.gather(-1, indices) + 9)
    flat = torch.full_like(teacher, -1.0).scatter(-1, indices, flat.gather(-1, indices))
    values = flat.log_softmax(-1).gather(-1, indices)
    got = top_k_js_div(values, indices, student, rest="spread", **options)
    torch.testing.assert_close(got, js_div(flat, student, **options), rtol=1e-9, atol=1e-12)


def test_nothing_left_masks_and_one_graph():
    teacher, student = logits()
    indices = torch.tensor([[3, 7]]).expand(6, 2)
    values = torch.tensor([0.25, 0.75], dtype=torch.float64).log().expand(6, 2)
    got = top_k_js_div(values, indices, student, beta=0.0, reduction="none")
    q = student.log_softmax(-1)[:, [3, 7]]
    torch.testing.assert_close(got, (values.exp() * (values - q)).sum(-1))
    labels = torch.tensor([1, -100, 2, -100, 3, 4])
    student[1] = math.nan

    def loss(student):
        return top_k_js_div(values, indices, student, labels=labels)

    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    expected = top_k_js_div(values[:4], indices[:4], student[labels != -100])
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, leaf)
    assert grad[labels != -100].abs().sum() > 0
    assert torch.equal(grad[labels == -100], torch.zeros_like(grad[labels == -100]))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student), expected)


@pytest.mark.parametrize("rest", ["one", "spread"])
def test_gradcheck_vmap_and_autocast(rest):
    teacher, student = logits()
    values, indices = teacher.log_softmax(-1).topk(5)

    def loss(values, indices, student):
        return top_k_js_div(values, indices, student, rest=rest, beta=0.3)

    leaf = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(values, indices, q), leaf)
    parts = [x.unflatten(0, (3, -1)) for x in (values, indices, student)]
    got = torch.vmap(torch.func.grad(loss, 2))(*parts)
    for one, given in zip(got, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(one, torch.func.grad(loss, 2)(*given))
    values, student = values.float(), student.float()
    expected = loss(values, indices, student)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(values, indices, student), expected)


def test_bad_arguments_are_named():
    teacher, student = logits()
    values, indices = teacher.log_softmax(-1).topk(5)
    with pytest.raises(ValueError, match="rest must be 'one' or 'spread', got 'none'"):
        top_k_js_div(values, indices, student, rest="none")
    with pytest.raises(ValueError, match=r"K < C, got \[6, 5\], \[6, 4\] and \[6, 40\]"):
        top_k_js_div(values, indices[:, :4], student)
    with pytest.raises(TypeError, match="p_values must be a floating point tensor"):
        top_k_js_div(indices, indices, student)

"""What the divergence behind a student's head has to do, in PyTorch, the interpreter, on a GPU."""

import math

import torch
import torch.nn.functional as F
from fastgeo_kernels import fused_linear_js_div, js_div


def heads(tokens=7, classes=11, seed=0, dtype=torch.float64, device="cpu"):
    """Hidden states, weight and bias of a student and of a teacher, of another width."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    student = [random(tokens, 4), random(classes, 4), random(classes)]
    teacher = [random(tokens, 6), random(classes, 6), random(classes)]
    return student, teacher


def check_is_the_unfused(impl, dtype, device="cpu"):
    """Value and gradients to hidden states, weight and bias, against `js_div` of float64 logits."""
    exact = dtype == torch.float64
    student, teacher = heads(dtype=dtype, device=device)
    labels = torch.tensor([0, -100, 1, 2, -100, 3, 4], device=device)
    weight = torch.linspace(0, 2, 7, device=device)
    for beta in (0.0, 0.1, 0.5, 1.0):
        for softcap, masks in (
            (None, {}),
            (5.0, dict(labels=labels, sample_weight=weight, normalizer=3.0)),
        ):
            options = dict(beta=beta, temperature=2.0, **masks)

            def fused(x, w, b, softcap=softcap, options=options):
                return fused_linear_js_div(
                    *(x, w, teacher[0], teacher[1]),
                    student_bias=b,
                    teacher_bias=teacher[2],
                    softcap=softcap,
                    impl=impl,
                    **options,
                )

            def unfused(x, w, b, softcap=softcap, options=options):
                logits = [F.linear(*(t.double() for t in head)) for head in (teacher, (x, w, b))]
                if softcap:
                    logits = [softcap * (y / softcap).tanh() for y in logits]
                return js_div(*logits, impl="torch", **options)

            results = []
            for function in (fused, unfused):
                leaves = [x.clone().requires_grad_() for x in student]
                value = function(*leaves)
                results.append([value.detach(), *torch.autograd.grad(2 * value, leaves)])
            for got, expected in zip(*results, strict=True):
                assert got.dtype == (torch.float32 if got.ndim == 0 and not exact else dtype)
                tolerance = dict(rtol=1e-12, atol=1e-14) if exact else dict(rtol=2e-5, atol=1e-6)
                torch.testing.assert_close(got.double(), expected.double(), **tolerance)


def check_tokens_that_count_nothing(impl, device="cpu"):
    student, teacher = heads(dtype=torch.float32, device=device)
    labels = torch.tensor([0, -100, 1, 2, -100, 3, 4], device=device)
    kept = labels != -100
    dirty = [x.clone() for x in (student[0], teacher[0])]
    dirty[0][1], dirty[1][4] = math.nan, math.inf
    results = []
    for x, t, masks in (
        (dirty[0], dirty[1], dict(labels=labels)),
        (student[0][kept], teacher[0][kept], {}),
    ):
        leaves = [x.clone().requires_grad_(), student[1].clone().requires_grad_()]
        value = fused_linear_js_div(*leaves, t, teacher[1], impl=impl, **masks)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    (value, hidden, weight), (expected, expected_hidden, expected_weight) = results
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(weight, expected_weight)
    torch.testing.assert_close(hidden[kept], expected_hidden)
    assert torch.equal(hidden[~kept], torch.zeros_like(hidden[~kept]))
    nothing = torch.full_like(labels, -100)
    leaf = student[0].clone().requires_grad_()
    value = fused_linear_js_div(leaf, student[1], *teacher[:2], labels=nothing, impl=impl)
    (grad,) = torch.autograd.grad(value, leaf)
    assert value == 0 and torch.equal(grad, torch.zeros_like(grad))


def check_compiles_as_one_graph(impl, backend="aot_eager", device="cpu"):
    student, teacher = heads(dtype=torch.float32, device=device)
    labels = torch.tensor([0, -100, 1, 2, -100, 3, 4], device=device)

    def loss(x, w):
        return fused_linear_js_div(x, w, *teacher[:2], beta=0.1, labels=labels, impl=impl)

    results = []
    for function in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in student[:2]]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def check_under_autocast(impl, device="cpu"):
    """The head in bf16, the divergence and the sums of gradients in fp32; a bf16 model alike."""
    student, teacher = heads(tokens=40, dtype=torch.float32, device=device)
    expected = fused_linear_js_div(*student[:2], *teacher[:2], impl=impl)
    exact = [x.clone().requires_grad_() for x in student[:2]]
    grads = torch.autograd.grad(fused_linear_js_div(*exact, *teacher[:2], impl=impl), exact)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in student[:2]]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            given = (x.to(dtype) for x in teacher[:2])
            value = fused_linear_js_div(*leaves, *given, impl=impl)
            value.backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0.02, atol=0)
        for leaf, grad in zip(leaves, grads, strict=True):
            assert leaf.grad.dtype == dtype
            error = (leaf.grad.float() - grad).norm() / grad.norm()
            assert error < 0.03, error

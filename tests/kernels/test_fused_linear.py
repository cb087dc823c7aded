"""The divergence behind a student's head, in plain PyTorch: the value, gradients and memory."""

import subprocess
import sys

import fused_claims as claims
import pytest
import torch
from fastgeo_kernels import fused_linear_js_div
from fastgeo_kernels.path_js_div import fused


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("logits", [1 << 26, 30])
def test_it_is_the_unfused_divergence(dtype, logits, monkeypatch):
    """All tokens at once, and two at a time."""
    monkeypatch.setattr(fused, "LOGITS", logits)
    claims.check_is_the_unfused("torch", dtype)
    claims.check_tokens_that_count_nothing("torch")


def test_gradcheck_and_one_graph():
    (x, w, b), (t, v, _) = claims.heads(tokens=3, classes=5)
    leaves = [z.requires_grad_() for z in (x, w, b)]

    def loss(x, w, b):
        return fused_linear_js_div(x, w, t, v, student_bias=b, beta=0.1, softcap=3.0)

    assert torch.autograd.gradcheck(loss, leaves)
    claims.check_compiles_as_one_graph("torch")
    claims.check_under_autocast("torch")


def test_other_derivatives_and_vmap_raise():
    """What is not there says so, instead of a wrong number."""
    (x, w, _), (t, v, _) = claims.heads()
    leaf = x.clone().requires_grad_()
    value = fused_linear_js_div(leaf, w, t, v)
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x, t: fused_linear_js_div(x, w, t, v))(x[None], t[None])


def test_a_teacher_s_logits_in_place_of_its_head():
    (x, w, _), (t, v, _) = claims.heads()
    logits = t @ v.T
    shaped = (z.view(7, 1, -1) for z in (x, logits))
    hidden, logits = shaped
    got = fused_linear_js_div(hidden, w, teacher_logits=logits, beta=0.0)
    torch.testing.assert_close(got, fused_linear_js_div(x, w, t, v, beta=0.0))


def test_gradients_that_are_not_wanted_are_not_computed(monkeypatch):
    from layer_claims import with_saved

    (x, w, b), (t, v, _) = claims.heads()
    for wanted in ((True, True, False), (True, False, False), (False, False, False)):
        leaves = [z.clone().requires_grad_(want) for z, want in zip((x, w, b), wanted, strict=True)]
        value, saved = with_saved(
            lambda x, w, b: fused_linear_js_div(x, w, t, v, student_bias=b), *leaves
        )
        kept = [z.shape for z in saved if z is not None]
        assert kept == [z.shape for z, want in zip((x, w, b), wanted, strict=True) if want]


MEMORY = """
import resource, sys, torch
from fastgeo_kernels import fused_linear_js_div
from fastgeo_kernels.path_js_div import fused
fused.LOGITS = 1 << 20
tokens = int(sys.argv[1])
x, t = torch.randn(tokens, 16, requires_grad=True), torch.randn(tokens, 16)
w, v = torch.randn(30_000, 16, requires_grad=True), torch.randn(30_000, 16)
fused_linear_js_div(x[:64], w, t[:64], v).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fused_linear_js_div(x, w, t, v).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_tokens():
    """[1,024, 30,000] logits of student and teacher are 234 MiB; resident memory grows by less than
    a tenth of them over that of 64 tokens."""
    run = [sys.executable, "-c", MEMORY, "1024"]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert grown < 24 << 10, f"{grown} KiB"


def test_bad_arguments_are_named():
    (x, w, b), (t, v, _) = claims.heads()
    for given, options, words in (
        ((x, w), {}, "give the teacher by teacher_hidden and its head, or by teacher_logits"),
        ((x, w, t, v), dict(teacher_logits=t), "give the teacher by"),
        ((x, v, t, v), {}, r"student_weight must be \[C, H\] and student_hidden \[..., H\], got"),
        ((x, w, t[:3], v), {}, r"logits must be \[7, 11\], as the student's, got \[3, 11\]"),
        ((x, w, t, v), dict(softcap=0.0), "softcap must be positive, got 0.0"),
        ((x, w, t, v), dict(student_bias=b[:3]), r"student_bias must be \[11\], got \[3\]"),
        ((x, w, t, v), dict(labels=torch.zeros(4)), r"labels must be \[7\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_linear_js_div(*given, **options)
    with pytest.raises(TypeError, match="teacher_weight must be a floating point tensor, got None"):
        fused_linear_js_div(x, w, t)

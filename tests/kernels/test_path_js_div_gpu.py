"""The Triton kernels on a device, at real sizes: `pytest -m gpu`."""

import fused_claims as heads
import js_div_claims as pairs
import path_js_div_claims as claims
import pytest
import torch
from fastgeo_kernels import (
    fused_linear_js_div,
    js_div,
    path_fisher_rao,
    path_js_div,
    path_js_div_value_and_grad,
    top_k_js_div,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, B, C: every tiling that choose_blocks knows, odd sizes, the ends of the ranges
SHAPES = [
    (2, 1, 1),
    (2, 1, 2),
    (25, 256, 10),
    (25, 257, 10),
    (3, 20_000, 10),
    (25, 65, 17),
    (5, 300, 128),
    (7, 129, 1000),
    (5, 33, 2000),
    (5, 33, 4096),
    (3, 5, 4097),
    (4, 3, 32768),
    (2, 2, 262_144),
    (1024, 3, 10),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", [1e-3, 1.0, 10.0])
def test_the_float64_definition(shape, dtype, distance):
    logits = claims.path(*shape, distance).to("cuda", dtype)
    weight = torch.rand(shape[0] - 1, device="cuda")
    claims.check_against_the_definition(logits, "triton", 1.0, weight)
    claims.check_against_the_definition(logits, "triton", 2.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symmetry_repetition_and_fisher_rao(shape):
    logits = claims.path(*shape, 1.0).cuda()
    claims.check_symmetry_and_repetition(logits, "triton")
    claims.check_fisher_rao(logits, "triton")


# The length of one class is 0, its derivative infinite.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1], ids=str)
def test_any_upstream_gradient(shape):
    if shape[1] == 1:
        shape = (shape[0], 4, shape[2])
    claims.check_any_upstream_gradient(claims.path(*shape, 1.0).cuda(), "triton")


def test_extremes_masks_and_strides():
    claims.check_survives_extremes("triton", "cuda", DTYPES)
    claims.check_masked_classes("triton", "cuda")
    claims.check_strides("triton", "cuda")


@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_nan_stays_in_its_rows(classes, poisoned_outputs):
    poisoned_outputs(123.0)
    claims.check_nan_stays_in_its_rows(classes, "triton", "cuda")


def test_offsets_beyond_32_bits():
    """Classes outermost, 2^19 rows apart: 64-bit offsets within a row."""
    base = torch.randn(2, 4200, 1 << 19, device="cuda", dtype=torch.bfloat16)
    logits = base.permute(0, 2, 1)
    got = path_js_div(logits, reduction="none", impl="triton")[:, ::65536]
    expected = path_js_div(logits[:, ::65536], reduction="none", impl="torch")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_auto_is_triton_and_never_waits_for_the_device():
    """Captured in a CUDA graph, where any synchronisation would fail, and replayed."""
    logits = claims.path(25, 256, 10, 1.0).cuda()
    expected = path_js_div_value_and_grad(logits)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        path_js_div_value_and_grad(logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path_js_div_value_and_grad(logits)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)
    torch.cuda.set_sync_debug_mode("error")
    try:
        path_js_div(logits.requires_grad_()).sqrt().sum().backward()
        path_fisher_rao(logits.detach(), sample_weight=torch.ones(256, device="cuda"))
        js_div(*logits.detach()[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch_at_the_paper_s_size(monkeypatch):
    monkeypatch.undo()  # poisoning is a launch, too
    logits = claims.path(25, 256, 10, 1.0).cuda()
    path_js_div_value_and_grad(logits)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        path_js_div_value_and_grad(logits)
        torch.cuda.synchronize()
    launched = [e.key for e in profile.key_averages() if e.device_type.name == "CUDA"]
    assert [name for name in launched if "path_rows" in name] and len(launched) == 1, launched


def test_compiled_with_inductor():
    logits = claims.path(25, 256, 10, 1.0).cuda()

    def loss(x):
        return path_js_div(2 * x, impl="triton").sqrt().sum()

    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(a).backward()
    torch.compile(loss, fullgraph=True)(b).backward()
    torch.testing.assert_close(b.grad, a.grad)


# --- Pairs, and every beta ------------------------------------------------------------------------


@pytest.mark.parametrize("beta", pairs.BETAS)
def test_pairs_have_their_digits(beta):
    for name, (p, q) in pairs.cases(20, 10).items():
        pairs.check_digits("triton", name, p, q, beta, device="cuda")
        pairs.check_digits("triton", f"{name}, temperature 3", p, q, beta, 3.0, "cuda")
    for classes in (700, 5000):
        for distance in (1e-3, 1.0, 10.0):
            given = pairs.rows(2, classes, distance)
            pairs.check_digits("triton", f"distance {distance}", *given, beta, device="cuda")


def test_paths_masks_labels_and_transforms_of_every_beta():
    pairs.check_path_is_its_edges("triton", "cuda")
    pairs.check_ends_are_kl("triton", "cuda")
    pairs.check_masked_classes("triton", "cuda")
    for classes in (9, 1000, 5000):
        pairs.check_rows_of_weight_0_are_not_there("triton", "cuda", classes)
    pairs.check_labels_and_normalizer("triton", "cuda")
    pairs.check_functional_transforms("triton", "cuda")
    pairs.check_compiles_as_one_graph("triton", "inductor", "cuda")
    pairs.check_under_autocast("triton", "cuda")
    pairs.check_inplace("triton", "cuda")


@pytest.mark.parametrize("classes", [1000, 32768])
def test_a_distillation_loss_is_captured(classes):
    """Labels, a device scalar as the normaliser, and both passes, without a wait for the device."""
    teacher, student = (x.cuda() for x in pairs.rows(64, classes, 1.0))
    student.requires_grad_()
    labels = torch.arange(64, device="cuda")
    labels[::3] = -100
    count = torch.tensor(100.0, device="cuda")
    options = dict(beta=0.1, labels=labels, normalizer=count)
    hidden = torch.randn(64, 16, device="cuda", requires_grad=True)
    head = torch.randn(classes, 16, device="cuda", requires_grad=True)
    values, indices = teacher.log_softmax(-1).topk(8)

    def step():
        found = []
        for value, leaf in (
            (js_div(teacher, student, **options), student),
            (fused_linear_js_div(hidden, head, teacher_logits=teacher, **options), head),
            (top_k_js_div(values, indices, student, **options), student),
        ):
            found += [value.detach(), torch.autograd.grad(value, leaf)[0]]
        return found

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def test_a_new_temperature_or_beta_compiles_nothing():
    from fastgeo_kernels.path_js_div.pairs import pair_rows_kernel

    p, q = (x.cuda() for x in pairs.rows(64, 300, 1.0))
    js_div(p, q, beta=0.1, temperature=1.0)
    (compiled, *_) = pair_rows_kernel.device_caches[torch.cuda.current_device()]
    before = len(compiled)
    for number in (0.2, 0.3, 0.7):
        js_div(p, q, beta=number, temperature=1 + number)
    assert len(compiled) == before


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_weight_makes_nan(bad):
    p, q = (x.cuda() for x in pairs.rows(3, 10, 1.0))
    assert js_div(p, q, sample_weight=torch.tensor([1.0, bad, 1.0], device="cuda")).isnan()


def test_a_fused_head(monkeypatch):
    from fastgeo_kernels.path_js_div import fused

    heads.check_is_the_unfused("triton", torch.float32, "cuda")
    monkeypatch.setattr(fused, "LOGITS", 50)
    heads.check_is_the_unfused("triton", torch.float32, "cuda")
    heads.check_tokens_that_count_nothing("triton", "cuda")
    heads.check_compiles_as_one_graph("triton", "inductor", "cuda")
    heads.check_under_autocast("triton", "cuda")

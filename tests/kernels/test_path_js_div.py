"""The path divergence in plain PyTorch, its options and its errors; Triton has its own files."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import path_js_div_claims as claims
import pytest
import torch
from fastgeo_kernels import (
    js_div,
    launching,
    layers,
    path_fisher_rao,
    path_js_div,
    path_js_div_value_and_grad,
)
from fastgeo_kernels.path_js_div import launch, reference
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 1024, 1025, 2048, 2049, 4096, 4097, 262_144])
@pytest.mark.parametrize("batch", [1, 64, 100_000])
@pytest.mark.parametrize("processors", [1, 132])
def test_a_row_is_tiled_only_where_no_tile_holds_it(classes, batch, processors):
    blocks = launch.choose_blocks(25, batch, classes, processors)
    assert blocks.tiled == (classes > launch.WHOLE_ROW)
    assert blocks.tiled or blocks.block >= classes
    assert blocks.rows == 1 or not blocks.tiled


@settings(max_examples=60, deadline=None)
@given(
    points=st.sampled_from([2, 3, 25]),
    batch=st.sampled_from([1, 7, 257]),
    classes=st.sampled_from([1, 2, 10, 17, 1000]),
    distance=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 10.0]),
    shift=st.sampled_from([0.0, 5.0, 300.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_torch_is_the_float64_definition(
    points, batch, classes, distance, shift, temperature, dtype, seed
):
    batch = min(batch, 7) if classes == 1000 else batch
    logits = claims.path(points, batch, classes, distance, seed, shift=shift).to(dtype)
    weight = torch.rand(points - 1, generator=torch.Generator().manual_seed(seed))
    claims.check_against_the_definition(logits, "torch", temperature, weight)


def test_torch_keeps_gradients_that_nearly_cancel():
    """Of so many rows, some have two heavy classes with nearly the same log(p / m)."""
    claims.check_against_the_definition(claims.path(3, 20_000, 10, 10.0), "torch", 2.0)


def test_torch_survives_underflow_and_saturation():
    claims.check_survives_extremes("torch", dtypes=(torch.float32, torch.bfloat16, torch.float16))


def test_torch_drops_masked_classes():
    claims.check_masked_classes("torch")
    claims.check_nan_stays_in_its_rows(9, "torch")


@pytest.mark.parametrize("distance", [1e-3, 1.0, 30.0])
def test_torch_is_symmetric_to_rounding_and_repeats_bit_for_bit(distance):
    claims.check_symmetry_and_repetition(claims.path(6, 33, 10, distance), "torch")


def test_torch_takes_any_upstream_gradient():
    claims.check_any_upstream_gradient(claims.path(4, 9, 10, 1.0), "torch")


def test_torch_takes_any_strides():
    claims.check_strides("torch")


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 10.0])
def test_torch_fisher_rao_is_the_float64_definition(distance):
    claims.check_fisher_rao(claims.path(4, 33, 10, distance), "torch")


def test_torch_under_grad_and_vmap():
    claims.check_functional_transforms("torch")


def test_torch_raises_for_second_and_forward_derivatives():
    claims.check_other_derivatives_raise("torch")


def test_torch_compiles_as_one_graph():
    claims.check_compiles_as_one_graph("torch")


def test_torch_under_autocast():
    """The arithmetic is fp32 whatever autocast says, and gradients have their logits' dtype."""
    logits = claims.path(3, 4, 9, 1.0).bfloat16().requires_grad_()
    expected = path_js_div(logits)
    with torch.autocast("cpu", torch.bfloat16):
        got = path_js_div(logits)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.autograd.grad(got.sum(), logits)[0].dtype == torch.bfloat16


def test_energy_of_a_free_point_falls():
    claims.check_energy_falls("torch")


def test_chunks_of_the_batch_change_nothing(monkeypatch):
    logits = claims.path(5, 13, 10, 1.0)
    value, grad = path_js_div_value_and_grad(logits)
    monkeypatch.setattr(reference, "CHUNK", 5 * 10 * 4)
    chunked, chunked_grad = path_js_div_value_and_grad(logits)
    torch.testing.assert_close(chunked, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked_grad, grad, rtol=1e-6, atol=1e-9)


def test_js_div_is_the_path_of_two_points_in_any_shape():
    p, q = claims.path(2, 12, 10, 1.0)
    p, q = p.view(3, 4, 10).requires_grad_(), q.view(3, 4, 10).requires_grad_()
    rows = js_div(p, q, reduction="none")
    expected = claims.by_definition(torch.stack([p, q]).flatten(1, 2).detach())[0]
    torch.testing.assert_close(rows.detach().double(), expected.view(3, 4), rtol=1e-5, atol=0)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    value = js_div(p, q, sample_weight=mask)
    torch.testing.assert_close(value, rows[mask].mean())
    value.backward()
    for x in (p, q):
        assert x.grad[mask].abs().sum(-1).min() > 0
        assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))


def test_layers_are_the_functions():
    logits = claims.path(3, 4, 5, 1.0)
    assert torch.equal(layers.PathJSDiv()(logits), path_js_div(logits))
    assert torch.equal(layers.JSDiv()(*logits[:2]), js_div(*logits[:2]))
    for layer in (layers.PathJSDiv, layers.JSDiv):
        assert "__init__" not in vars(layer) and not list(layer().parameters())


def test_weights_of_nothing_give_zero():
    logits, nothing = claims.path(3, 4, 5, 1.0), torch.zeros(4)
    value, grad = path_js_div_value_and_grad(logits, sample_weight=nothing)
    assert torch.equal(value, torch.zeros(2)) and torch.equal(grad, torch.zeros(3, 4, 5))


def test_sample_weights_are_differentiable():
    weight = torch.rand(4, dtype=torch.float64).requires_grad_()
    logits = claims.path(3, 4, 5, 1.0).double()
    assert torch.autograd.gradcheck(lambda w: path_js_div(logits, sample_weight=w), weight)


LOGITS = torch.zeros(3, 4, 5)
BAD_CALLS = [
    ((LOGITS.long(),), {}, TypeError, "floating point tensor, got torch.int64"),
    ((LOGITS.to(torch.complex64),), {}, TypeError, "floating point tensor, got torch.complex64"),
    ((LOGITS[0],), {}, ValueError, r"\[N, B, C\] with N >= 2.*got \[4, 5\]"),
    ((LOGITS[:1],), {}, ValueError, r"N >= 2.*got \[1, 4, 5\]"),
    ((LOGITS,), {"temperature": -1.0}, ValueError, "between 1e-6 and 1e6, got -1.0"),
    ((LOGITS,), {"temperature": 0.0}, ValueError, "between 1e-6 and 1e6, got 0.0"),
    ((LOGITS,), {"temperature": torch.ones(())}, TypeError, "Python number, got Tensor"),
    ((LOGITS,), {"sample_weight": torch.ones(3)}, ValueError, r"\[B\] = \[4\], got \[3\]"),
    ((LOGITS,), {"sample_weight": [1.0] * 4}, TypeError, "tensor of real numbers, got list"),
    (
        (LOGITS,),
        {"sample_weight": torch.ones(4, device="meta")},
        ValueError,
        "on the logits' device cpu, got meta",
    ),
    ((LOGITS,), {"impl": "cuda"}, ValueError, "'auto', 'triton' or 'torch', got 'cuda'"),
]


@pytest.mark.parametrize("arguments, options, error, words", BAD_CALLS)
@pytest.mark.parametrize("op", [path_js_div, path_js_div_value_and_grad, path_fisher_rao])
def test_bad_arguments_are_named(op, arguments, options, error, words):
    with pytest.raises(error, match=words):
        op(*arguments, **options)


def test_bad_weights_reductions_and_pairs_are_named():
    with pytest.raises(ValueError, match=r"edge_weight must be \[E\] = \[2\], got \[3\]"):
        path_js_div(LOGITS, edge_weight=torch.ones(3))
    with pytest.raises(ValueError, match="'batchmean' or 'none', got 'mean'"):
        path_js_div(LOGITS, reduction="mean")
    with pytest.raises(ValueError, match=r"one shape and device, got \(\[4, 5\].*\[4, 4\]"):
        js_div(LOGITS[0], LOGITS[0, :, :4])
    with pytest.raises(TypeError, match="q_logits must be a floating point tensor, got torch.i"):
        js_div(LOGITS[0], LOGITS[0].long())
    with pytest.raises(ValueError, match=r"sample_weight must be \[4\], got \[5\]"):
        js_div(LOGITS[0], LOGITS[0], sample_weight=torch.ones(5))


def test_triton_on_a_cpu_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    words = "cannot run: (the input is on cpu|the package triton is not installed)"
    with pytest.raises(RuntimeError, match=words):
        path_js_div(LOGITS, impl="triton")


def run(*command, **environment):
    """A process of its own; its output where it fails."""
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


def test_triton_kernels_under_the_interpreter():
    """The variable must be set before triton is imported, for a whole process."""
    file = ROOT / "tests" / "kernels" / "triton_interpreted.py"
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


def test_triton_kernels_compile_for_gpus_without_spills():
    """For sm_80, sm_90, sm_100 and gfx942: 182 of paths and 108 of pairs, 48 of the paper's norms,
    24 of its convolutions, 16 of the path's update."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "0"}
    out = run("-m", "benchmarks.resources", "--check", **environment)
    assert "378 kernels: none spills or is too large" in out


def test_a_new_temperature_or_beta_compiles_nothing():
    """No kernel has one of these as a constant, nor the length of a path or the size of a batch."""
    pytest.importorskip("triton")
    from fastgeo_kernels.path_js_div import pairs, rows, tiles

    kernels = (
        *(rows.path_rows_kernel, tiles.path_tiles_kernel),
        *(pairs.pair_rows_kernel, pairs.pair_tiles_kernel),
    )
    for kernel in kernels:
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        assert not constant & {"inv_t", "a", "b", "p_limit", "q_limit", "N", "B"}, kernel
        assert {"C", "KIND", "KEPT"} <= constant


def test_compiled_paths_are_short():
    """Of near rows 50 instructions a class and edge; and sums over up to 16 classes cross no
    threads, whatever layout this Triton chooses."""
    pytest.importorskip("triton")
    look = """if True:
        from benchmarks.resources import (
            CHIPS, MODES, compile_variant, path_instructions, path_variant
        )
        mode, options = next(iter(MODES.items()))
        for shape in (25, 256, 10), (25, 65536, 10), (25, 1024, 1000):
            variant = path_variant(CHIPS["sm_90"], shape, mode, options)
            compiled = compile_variant(variant, CHIPS["sm_90"])
            taken = path_instructions(compiled, variant)
            print(compiled.asm["ptx"].count("shfl.sync"), taken.always, taken.again)
    """
    out = run("-c", look, TRITON_INTERPRET="0")
    small, short, long = ([float(x) for x in line.split()] for line in out.splitlines())
    # Those of the batch mean, and of whether all rows of a program are near; else hundreds.
    assert small[0] < 60 and short[0] < 60
    if not launch.TRITON_3_6:  # whose code takes a tenth more, and jumps in an order of its own
        assert short[1] < 51 and long[1] < 50
        assert sum(short[1:]) < 80 and sum(long[1:]) < 80


def test_doc_examples_run():
    import doctest

    for name, examples in (("public", 4), ("fused", 1), ("top_k", 1)):
        module = importlib.import_module(f"fastgeo_kernels.path_js_div.{name}")
        results = doctest.testmod(module)
        assert results.failed == 0 and results.attempted >= examples, name

"""The Triton kernels under the interpreter; `test_path_js_div.py` runs this file in a process
with TRITON_INTERPRET=1. Grids are small: a program takes the interpreter 40 ms and more."""

from pathlib import Path

import fused_claims as heads
import js_div_claims as pairs
import path_js_div_claims as claims
import pytest
import torch
from fastgeo_kernels import (
    js_div,
    launching,
    path_js_div,
    path_js_div_value_and_grad,
)
from fastgeo_kernels.path_js_div import launch, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_claims import with_saved

assert launching.INTERPRETED, "set TRITON_INTERPRET=1"
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy: inf in unused branches
]


@pytest.fixture
def blocks(monkeypatch):
    """Sets the blocks of every launch."""
    return lambda *cut: monkeypatch.setattr(launch, "choose_blocks", lambda *_: launch.Blocks(*cut))


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Sets how many classes of a row a tile has: all of them, since the interpreter's time goes by
    tiles, but where a test is about these."""

    def put(number=None):
        monkeypatch.setattr(launch, "_piece", lambda _, blocks, aligned: number or blocks.block)

    put()
    return put


# rows, classes of a tile, points a program owns, warps, whether rows are longer than a tile
WAYS_TO_CUT = {
    "whole batch, whole path": (16, 32, 5, 1, False),
    "rows cut": (4, 32, 5, 1, False),
    "path cut": (16, 32, 2, 1, False),
    "a program each point": (16, 32, 1, 1, False),
    "classes tiled": (1, 8, 5, 1, True),
    "classes tiled, path cut": (1, 8, 2, 1, True),
    "classes tiled, a program each point": (1, 8, 1, 1, True),
}


@pytest.mark.parametrize("cut", WAYS_TO_CUT.values(), ids=WAYS_TO_CUT)
@pytest.mark.parametrize("points, distance", [(5, 1e-3), (5, 1.0), (5, 10.0), (2, 1.0)])
def test_every_way_to_cut_is_the_float64_definition(blocks, cut, points, distance):
    batch, classes = (1, 19) if cut[0] == 1 else (9, 19)
    blocks(*cut)
    logits = claims.path(points, batch, classes, distance, seed=1)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])[: points - 1]
    claims.check_against_the_definition(logits, "triton", 2.0, weight)
    claims.check_fisher_rao(logits, "triton")
    claims.check_symmetry_and_repetition(logits, "triton")


@pytest.mark.parametrize(
    "classes, piece, shift", [(10, 2, 0.0), (9, 1, 300.0), (8, 4, 0.0), (1000, 256, 5.0)]
)
def test_rows_in_pieces(pieces, classes, piece, shift):
    pieces(piece)
    batch = 1 if classes == 1000 else 5
    near, far = (claims.path(3, batch, classes, d, shift=shift) for d in (1e-3, 3.0))
    claims.check_against_the_definition(near, "triton")
    claims.check_against_the_definition(far, "triton", 2.0)
    claims.check_symmetry_and_repetition(torch.cat([near, far]), "triton")


def test_near_and_far_rows_of_one_program():
    """And near ones that are shifted by so much that the rounding of x - y shows."""
    steps = [claims.path(2, 4, 10, *how) for how in ((1e-3,), (1e-3, 1, 3.0, 500.0), (5.0,))]
    for logits in (torch.cat(steps[:2], 1), torch.cat(steps, 1)):
        claims.check_against_the_definition(logits, "triton")


@settings(max_examples=25, deadline=None)
@given(
    points=st.sampled_from([2, 3, 9]),
    batch=st.sampled_from([1, 7, 64]),
    classes=st.sampled_from([1, 2, 10, 17]),
    distance=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 10.0]),
    shift=st.sampled_from([0.0, 5.0, 300.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 2**20),
)
def test_small_rows_are_the_float64_definition(
    points, batch, classes, distance, shift, temperature, seed
):
    logits = claims.path(points, batch, classes, distance, seed, shift=shift)
    weight = torch.rand(points - 1, generator=torch.Generator().manual_seed(seed))
    claims.check_against_the_definition(logits, "triton", temperature, weight)


@pytest.mark.parametrize("classes", [1000, 5000])
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_large_rows_are_the_float64_definition(classes, distance):
    claims.check_against_the_definition(claims.path(3, 1, classes, distance), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiled", [False, True])
def test_half_precision_logits(blocks, dtype, tiled):
    """The interpreter truncates where a GPU rounds, so that a whole unit is allowed."""
    if tiled:
        blocks(1, 8, 3, 1, True)
    logits = claims.path(3, 3, 19, 1.0).to(dtype)
    value, grad = path_js_div_value_and_grad(logits, impl="triton")
    expected, expected_grad = path_js_div_value_and_grad(logits.float(), impl="torch")
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    assert grad.dtype == dtype
    torch.testing.assert_close(
        grad.float(), expected_grad, rtol=2 * torch.finfo(dtype).eps, atol=1.2e-7
    )


@pytest.mark.parametrize("tiled", [False, True])
def test_extremes_masks_strides_and_upstream(blocks, tiled):
    if tiled:
        blocks(1, 4, 9, 1, True)
    claims.check_survives_extremes("triton", dtypes=(torch.float32, torch.bfloat16, torch.float16))
    claims.check_masked_classes("triton")
    claims.check_any_upstream_gradient(claims.path(3, 4, 9, 1.0), "triton")
    if not tiled:
        claims.check_strides("triton")


@pytest.mark.parametrize("tiled", [False, True])
def test_nan_stays_in_its_rows(blocks, tiled, poisoned_outputs):
    if tiled:
        blocks(1, 4, 9, 1, True)
    poisoned_outputs(123.0)
    claims.check_nan_stays_in_its_rows(9, "triton")


def test_grad_vmap_and_one_graph():
    claims.check_functional_transforms("triton")
    claims.check_compiles_as_one_graph("triton")
    claims.check_other_derivatives_raise("triton")


def test_energy_of_a_free_point_falls():
    claims.check_energy_falls("triton")


def test_operators_pass_opcheck():
    logits, upstream = claims.path(3, 4, 5, 1.0), torch.rand(2, 4)
    kept = torch.tensor([True, False, True, True])
    torch.library.opcheck(operators.rows_op, (logits, None, 2.0, 0.5, False))
    torch.library.opcheck(operators.rows_op, (logits, kept, 2.0, 0.5, True))
    torch.library.opcheck(operators.grad_op, (logits, upstream, kept, 2.0, 0.1))
    torch.library.opcheck(operators.value_and_grad_op, (logits, None, None, True, 1.0, 0.5))
    torch.library.opcheck(operators.value_and_grad_op, (logits, upstream, kept, False, 1.0, 0.0))
    pair = (logits[0], logits[1])
    torch.library.opcheck(operators.pair_values_op, (*pair, kept, 1.0, 0.5))
    torch.library.opcheck(
        operators.pair_grads_op, (*pair, upstream[0], kept, 1.0, 1.0, True, False)
    )
    torch.library.opcheck(
        operators.pair_grads_over_op,
        (pair[0], pair[1].clone(), upstream[0], kept, 1.0, 0.5, True),
    )


def test_forward_saves_the_logits_and_nothing_else():
    logits = claims.path(3, 4, 5, 1.0).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        path_js_div(logits, reduction="none", impl="triton")
    assert [t.data_ptr() for t in saved] == [logits.data_ptr()]


def test_float64_is_not_for_triton():
    with pytest.raises(RuntimeError, match="takes float32, bfloat16, float16, got float64"):
        path_js_div(torch.zeros(2, 1, 3, dtype=torch.float64), impl="triton")


# --- Pairs, and every beta ------------------------------------------------------------------------


@pytest.mark.parametrize("beta", pairs.BETAS)
def test_pairs_have_their_digits(beta):
    for name, (p, q) in pairs.cases(20, 10).items():
        pairs.check_digits("triton", name, p, q, beta)
    pairs.check_digits("triton", "temperature 3", p, q, beta, 3.0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
def test_pairs_in_tiles_have_their_digits(blocks, beta):
    blocks(1, 8, 2, 1, True)
    cases = pairs.cases(1, 10)
    for name in ("distance 0.01", "distance 3", "distance 30", "margin 20, two winners"):
        pairs.check_digits("triton", name, *cases[name], beta)


def test_paths_and_pairs_of_every_beta():
    pairs.check_path_is_its_edges("triton", betas=(0.1, 1.0))
    pairs.check_masked_classes("triton", betas=(0.0, 0.1))
    pairs.check_rows_of_weight_0_are_not_there("triton", betas=(0.1,))


def test_paths_and_masks_in_tiles(blocks):
    blocks(1, 16, 2, 1, True)
    pairs.check_path_is_its_edges("triton", count=1, betas=(0.1,))
    p, q = pairs.rows(2, 9, 1.0)
    dirty, kept = torch.stack([p, q]), torch.tensor([False, True])
    dirty[1, 0] = torch.nan
    value, grad = path_js_div_value_and_grad(dirty, sample_weight=kept, impl="triton")
    student = dirty[1].clone().requires_grad_()
    pair = js_div(dirty[0], student, sample_weight=kept, impl="triton")
    expected = js_div(p[1:], q[1:], impl="torch")
    torch.testing.assert_close(value[0], expected)
    torch.testing.assert_close(pair.detach(), expected)
    (student_grad,) = torch.autograd.grad(pair, student)
    torch.testing.assert_close(student_grad, grad[1])
    assert grad.isfinite().all() and torch.equal(grad[:, 0], torch.zeros(2, 9))


def test_inplace():
    pairs.check_inplace("triton")


def test_ends_labels_and_normalizer():
    pairs.check_ends_are_kl("triton")
    pairs.check_labels_and_normalizer("triton")


def test_pairs_under_grad_vmap_one_graph_and_autocast():
    pairs.check_functional_transforms("triton")
    pairs.check_compiles_as_one_graph("triton")
    pairs.check_other_derivatives_raise("triton")
    pairs.check_under_autocast("triton")


def test_pairs_keep_their_arguments_and_compute_what_is_wanted():
    """No copy of either, and of two gradients the one that is asked for."""
    p, q = pairs.rows(6, 50, 1.0)
    q.requires_grad_()
    rows, saved = with_saved(lambda p, q: js_div(p, q, reduction="none", impl="triton"), p, q)
    assert [t.data_ptr() for t in saved] == [p.data_ptr(), q.data_ptr()]
    p_grad, q_grad = operators.pair_grads_op(p, q, torch.ones(6), None, 1.0, 0.5, False, True)
    assert p_grad.numel() == 0 and torch.equal(q_grad, torch.autograd.grad(rows.sum(), q)[0])


def test_a_fused_head(monkeypatch):
    from fastgeo_kernels.path_js_div import fused

    monkeypatch.setattr(fused, "LOGITS", 50)
    heads.check_is_the_unfused("triton", torch.float32)
    heads.check_tokens_that_count_nothing("triton")
    heads.check_compiles_as_one_graph("triton")


# --- In place of other projects' ------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_kernelize_puts_the_layers_in_place_of_liger_s(beta, monkeypatch):
    """Its values and gradients, of modules with their own settings, mapped by their names."""
    from liger_kernel import transformers as liger

    import kernels

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.jsd = liger.LigerJSD(beta=beta, ignore_index=-1)
            self.fused = liger.LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0, ignore_index=-1)

        def forward(self, x, w, teacher_x, teacher_w, labels):
            student, teacher = (h @ v.T for h, v in ((x, w), (teacher_x, teacher_w)))
            logs = student.log_softmax(-1), teacher.log_softmax(-1)
            fused = self.fused(x, w, teacher_x, teacher_w, labels)
            return self.jsd(*logs, labels) + 3 * fused

    for layer in (liger.LigerJSD, liger.LigerFusedLinearJSD):
        kernels.replace_kernel_forward_from_hub(layer, layer.__name__)
    (x, w, _), (t, v, _) = heads.heads(dtype=torch.float32)
    labels = torch.tensor([0, -1, 1, 2, -1, 3, 4])
    folder = Path(launching.__file__).parent
    mapping = {
        name: {"cpu": kernels.LocalLayerRepository(folder, layer_name=name)}
        for name in ("LigerJSD", "LigerFusedLinearJSD")
    }
    results = []
    for ours in (False, True):
        model = Model()
        if ours:
            with kernels.use_kernel_mapping(mapping):
                model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
            for name in ("jsd.LigerJSDFunction", "fused_linear_jsd.LigerFusedLinearJSDFunction"):
                monkeypatch.setattr(f"liger_kernel.transformers.{name}", None)
        leaves = [z.clone().requires_grad_() for z in (x, w)]
        value = model(*leaves, t, v, labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
